import argparse
import collections
import copy
import datetime
import enum
import pathlib
import pickle
import random
import resource
import signal
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from matchdistill.models import load_weights, save_weights, small_resnet


class Hostile:
    """Unpickled by an ordinary loader, it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "executed")


@pytest.fixture
def source():
    torch.manual_seed(1)
    return small_resnet(num_classes=3, width=4)


@pytest.fixture
def target():
    torch.manual_seed(2)
    return small_resnet(num_classes=3, width=4)


def same(first, second):
    return all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


def refusal(module, path, strict=True):
    """The one-line error of a load that must leave the module as it was."""
    before = copy.deepcopy(module)
    with pytest.raises(ValueError) as info:
        load_weights(module, path, strict)
    assert same(before, module)
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.ckpt", "w.bin", "w.safetensors", "w"])
def test_round_trip(tmp_path, source, target, name):
    (save_file if name.endswith("safetensors") else torch.save)(source.state_dict(), tmp_path / name)
    assert load_weights(target, tmp_path / name) == []
    assert same(source, target)


def test_legacy_format_and_half_precision(tmp_path, source, target):
    torch.save(copy.deepcopy(source).half().state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    load_weights(target, tmp_path / "w.pt")
    assert target.fc.weight.dtype == torch.float32
    torch.testing.assert_close(target.fc.weight, source.fc.weight, atol=1e-3, rtol=1e-3)


def prefixed(prefix):
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"checkpoint": 1, "model": {"state_dict": prefixed("module.")(state)}},
        lambda state: {"state_dict": {**prefixed("student.")(state), "normaliser.weight": torch.ones(3)}},
        lambda state: {"state_dict": {**prefixed("distiller.student.")(state), "distiller.index": torch.ones(3)}},
        lambda state: {"student": state},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        prefixed("student._orig_mod."),
        prefixed("module.student.module."),
        prefixed("model."),
        lambda state: collections.OrderedDict(state),
    ],
)
def test_usual_nestings(tmp_path, source, target, wrap):
    torch.save(wrap(source.state_dict()), tmp_path / "w.ckpt")
    assert load_weights(target, tmp_path / "w.ckpt") == []
    assert same(source, target)


@pytest.mark.parametrize("name", ["student", "model", "module"])
def test_a_name_of_the_model_itself_is_not_taken_for_a_wrapper(tmp_path, source, target, name):
    source, target = nn.ModuleDict({name: source}), nn.ModuleDict({name: target})
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert same(source, target)


def test_file_without_batch_counts(tmp_path, source, target):
    state = {key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    assert load_weights(target, tmp_path / "old.pth") == []
    assert torch.equal(source.fc.weight, target.fc.weight)


class Mode(enum.Enum):
    FAST = 1


class Config(dict):
    pass


class Holder:
    def __init__(self):
        self.value = torch.ones(3)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "extra",
    [
        argparse.Namespace(lr=0.1, out=pathlib.Path("/x"), mode=Mode.FAST),
        np.float64(71.2),
        np.arange(5),
        np.random.default_rng(0),
        random.getstate(),
        pathlib.Path("/x"),
        collections.defaultdict(list, {"loss": [1.0]}),
        datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
        {pathlib.Path("a"): {pathlib.Path("b")}},
        Config(lr=1),
        Holder(),
    ],
    ids=lambda extra: type(extra).__name__,
)
def test_inert_objects_of_a_training_script_are_skipped(tmp_path, source, target, extra, zipped):
    path = tmp_path / "checkpoint.pth"
    for content in ({"model": source.state_dict(), "extra": extra}, {"extra": extra, "model": source.state_dict()}):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert load_weights(target, path) == []
        assert same(source, target)


def test_weights_inside_a_mapping_of_another_class(tmp_path, source, target):
    torch.save(Config(model=collections.defaultdict(list, source.state_dict())), tmp_path / "w.pt")
    assert load_weights(target, tmp_path / "w.pt") == []
    assert same(source, target)


def test_a_whole_model_is_refused_with_a_way_out(tmp_path, source, target):
    for content in (source, {"model": source, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(3)}}}}):
        torch.save(content, tmp_path / "w.pt")
        message = refusal(target, tmp_path / "w.pt")
        assert "matchdistill.models.small.SmallResNet" in message
        assert "torch.save(model.state_dict()" in message


class Reducing:
    """Pickled as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "args"),
    [(eval, ("1",)), (getattr, (Path, "home")), (exec, ("",)), (__import__, ("os",)), (pathlib.os.system, ("true",))],
)
def test_code_beside_the_weights_is_refused_not_skipped(tmp_path, source, target, function, args):
    torch.save({"model": source.state_dict(), "extra": Reducing(function, *args)}, tmp_path / "w.pt")
    assert "it holds Python objects or code" in refusal(target, tmp_path / "w.pt")


def test_an_object_is_not_made_and_its_class_not_imported(tmp_path, source, target, monkeypatch):
    """Whatever class a file names: neither `__init__`, `__setstate__` nor the import of its module happens."""
    (tmp_path / "trap.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').write_text('')\nclass A: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trap = type("A", (), {"__module__": "trap", "__reduce__": lambda self: (self.__class__, (), {"x": 1})})
    monkeypatch.setitem(sys.modules, "trap", types.SimpleNamespace(A=trap))
    torch.save({"model": source.state_dict(), "extra": trap()}, tmp_path / "w.pt")
    monkeypatch.delitem(sys.modules, "trap")
    load_weights(target, tmp_path / "w.pt")
    assert same(source, target)
    assert "trap" not in sys.modules
    assert not (tmp_path / "ran").exists()


def test_the_one_prefix_under_which_all_names_fit(tmp_path, source, target):
    state, other = source.state_dict(), small_resnet(num_classes=3, width=4).state_dict()
    for content in (
        {"model": state, "model_ema": other},
        {"state_dict": state, "state_dict_ema": prefixed("module.")(other)},
        {"ema": {"module": state}, "epoch": torch.ones(3)},
        {"n_averaged": torch.tensor(2), **prefixed("module.")(state)},
        {**prefixed("online_model.")(state), **prefixed("ema_model.")(other)},
        {"student": state, "teacher": other},
        {"teacher": small_resnet(num_classes=5, width=8).state_dict(), "net": state},
        prefixed("_fsdp_wrapped_module.")(state),
        {key.replace("layer1.", "layer1._checkpoint_wrapped_module."): value for key, value in state.items()},
    ):
        torch.save(content, tmp_path / "w.pt")
        target = small_resnet(num_classes=3, width=4)
        assert load_weights(target, tmp_path / "w.pt") == []
        assert same(source, target)


def test_two_places_that_fit_are_named(tmp_path, source, target):
    torch.save({"a": source.state_dict(), "b": small_resnet(num_classes=3, width=4).state_dict()}, tmp_path / "w.pt")
    assert "in several places, 'a', 'b'" in refusal(target, tmp_path / "w.pt")


def test_what_lies_beside_a_part_is_told(tmp_path, source, target):
    torch.save({**prefixed("net.")(source.state_dict()), "head.weight": torch.ones(2, 2)}, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"'net\.' fit and are taken; 1 beside them, such as head\.weight"):
        load_weights(target, tmp_path / "w.pt")
    assert same(source, target)


def changed(state, key, change):
    return {name: change(value) if name == key else value for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value * float("nan"), "fc.weight has 24 numbers of 24 that are not finite"),
        (lambda value: value.index_fill(0, torch.tensor([1]), float("-inf")), "fc.weight has 8 numbers of 24"),
        (lambda value: value.double() + 1e300, "fc.weight has 24 numbers of 24 that are not finite"),
        (lambda value: value.to(torch.complex64), "fc.weight is complex64, the model's is float32"),
        (lambda value: (value * 100).to(torch.int8), "fc.weight is int8, the model's is float32: are they the codes"),
        (lambda value: value.bool(), "fc.weight is bool, the model's is float32"),
        (lambda value: torch.empty_like(value, device="meta"), "has a shape but no values"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_numbers_that_no_weights_are(tmp_path, source, change, said, strict):
    source, target = small_resnet(num_classes=3, width=2), small_resnet(num_classes=3, width=2)
    torch.save(changed(source.state_dict(), "fc.weight", change), tmp_path / "w.pt")
    assert said in refusal(target, tmp_path / "w.pt", strict)


def test_numbers_in_other_forms_and_constants_that_are_infinite(tmp_path):
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    source, target = Masked(), Masked()
    for change in (torch.Tensor.double, torch.Tensor.bfloat16, torch.Tensor.to_sparse, nn.Parameter):
        torch.save(changed(source.state_dict(), "weight", change), tmp_path / "w.pt")
        assert load_weights(target, tmp_path / "w.pt") == []
        torch.testing.assert_close(target.weight, source.weight, atol=1e-2, rtol=1e-2)


def test_a_file_that_holds_itself_or_nests_without_end_stops_at_once(tmp_path, source, target):
    looped = {"model": source.state_dict()}
    looped["model_ema"] = looped["again"] = looped
    torch.save(looped, tmp_path / "w.pt")
    assert load_weights(target, tmp_path / "w.pt") == []
    wide = {"value": 1}
    for _ in range(60):
        wide = {"a": wide, "b": wide}
    torch.save(wide, tmp_path / "w.pt")
    assert "no state dict" in refusal(target, tmp_path / "w.pt")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
@pytest.mark.parametrize("where", ["alone", "nested"])
def test_hostile_pickle_is_refused(tmp_path, target, save, where):
    hostile = Hostile(tmp_path / "executed")
    path = tmp_path / "w.pt"
    save(hostile if where == "alone" else {"state_dict": {"fc.weight": hostile}}, path)
    assert "refused: not a weights file of tensors and plain values alone; it holds Python" in refusal(target, path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_hostile_pickle_of_any_protocol_is_not_executed(tmp_path, target, protocol):
    path = tmp_path / "w.bin"
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "executed"), protocol=protocol))
    message = refusal(target, path)
    assert "Python objects or code" in message
    assert "weights_only" not in message
    assert not (tmp_path / "executed").exists()


def test_a_script_is_refused_without_advice_to_run_it(tmp_path, target):
    path = tmp_path / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(path)
    message = refusal(target, path)
    assert "Python objects or code" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_truncated_file(tmp_path, source, target, name, kept):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "damaged or truncated" in refusal(target, path)


@pytest.mark.parametrize("content", [b"hello world" * 50, bytes(range(256))])
def test_something_else_than_weights(tmp_path, target, content):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    assert "not a weights file" in refusal(target, path)


@pytest.mark.parametrize(
    ("content", "found"), [({"epoch": 1, "weights": {"a": 2}}, "epoch, weights"), ([1], "list"), ({}, "dict")]
)
def test_file_without_a_state_dict(tmp_path, target, content, found):
    torch.save(content, tmp_path / "w.pt")
    message = refusal(target, tmp_path / "w.pt")
    assert "no state dict" in message
    assert found in message


def test_missing_file_and_folder(tmp_path, target):
    assert "no such file" in refusal(target, tmp_path / "absent.pt")
    assert "a folder" in refusal(target, tmp_path)


def test_another_architecture(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    target = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    message = refusal(target, tmp_path / "w.pt")
    assert "does not fit Sequential" in message
    assert "looks like another architecture" in message
    assert message.count("; ") == 7 + 2
    assert f"and {20 + len(source.state_dict()) - 8} more" in message


def test_few_differences_are_named_with_both_shapes(tmp_path, source, target):
    state = source.state_dict()
    state["stem.0.weight"] = torch.zeros(4, 1, 3, 3)
    state["extra.bias"] = state.pop("fc.bias")
    torch.save(state, tmp_path / "w.pt")
    message = refusal(target, tmp_path / "w.pt")
    for part in (
        "stem.0.weight is (4, 1, 3, 3) in the file, (4, 3, 3, 3) in the model",
        "fc.bias (3,) is missing",
        "extra.bias (3,) is unexpected",
    ):
        assert part in message
    assert "another architecture" not in message

    left = load_weights(target, tmp_path / "w.pt", strict=False)
    assert len(left) == 3
    assert torch.equal(target.fc.weight, source.fc.weight)


@pytest.mark.parametrize("strict", [True, False])
def test_another_number_of_classes(tmp_path, source, strict):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    target = small_resnet(num_classes=10, width=4)
    if strict:
        message = refusal(target, tmp_path / "w.pt")
        assert "for 3 classes, the model has 10" in message
        assert "num_classes=3" in message
    else:
        left = load_weights(target, tmp_path / "w.pt", strict=False)
        assert [line.split()[0] for line in left] == ["fc.weight", "fc.bias"]
        assert torch.equal(target.layer3.conv1.weight, source.layer3.conv1.weight)


def test_a_fresh_head_but_nothing_else_of_its_own(tmp_path, source):
    torch.save(source.state_dict(), tmp_path / "w.pt")
    target = small_resnet(num_classes=10, width=4)
    head = target.fc.weight.clone()
    left = load_weights(target, tmp_path / "w.pt", fresh_head=True)
    assert [line.split()[0] for line in left] == ["fc.weight", "fc.bias"]
    assert torch.equal(target.fc.weight, head)
    assert torch.equal(target.layer3.conv1.weight, source.layer3.conv1.weight)
    before = small_resnet(num_classes=10, width=8)
    with pytest.raises(ValueError, match="does not fit SmallResNet"):
        load_weights(before, tmp_path / "w.pt", fresh_head=True)


def test_weights_that_cannot_be_written_are_an_oserror_and_leave_the_old_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(nn.Linear(2, 2), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*weights\.safetensors|too large"):
            save_weights(nn.Linear(100, 100), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
