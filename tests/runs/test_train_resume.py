import errno
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train import folder_arguments, write_images

from matchdistill import files
from matchdistill.matched import MatchedPosition
from matchdistill.runs import train as training
from matchdistill.runs.averaging import TRAINED
from matchdistill.runs.compare import compare
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.store import NEEDED, AtomicCheckpoints, claim, load_student
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.module import ClassificationModule

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")

# Its server imports everything once; each process is a fork of it, in which nothing has run yet.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["matchdistill.runs.train"])

LASTING = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "results")


def same(first, second):
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def checkpoint(out):
    return torch.load(out / "last.ckpt", weights_only=True)


def assert_same_end(out, expected):
    """Two runs ended alike: weights, optimiser, matching, margins, normalisation, metrics."""
    first, second = checkpoint(out), checkpoint(expected)
    for key in LASTING:
        assert same(first[key], second[key]), key
    assert same(load_file(out / "student.safetensors"), load_file(expected / "student.safetensors"))
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (out, expected)]
    for measured in metrics:
        del measured["seconds"]
    assert metrics[0] == metrics[1]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def after(calls, function, then=die):
    """The function, which ends the process when it has been called so often."""
    left = [calls]

    def counted(*args, **kwargs):
        result = function(*args, **kwargs)
        left[0] -= 1
        return then() if left[0] == 0 else result

    return counted


def half_a_file(content, path):
    buffer = io.BytesIO()
    torch.serialization.save(content, buffer)
    Path(path).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def fit_until(moment, count, config, out, resume):
    torch.set_num_threads(1)
    if moment == "step":
        ClassificationModule.training_step = after(count, ClassificationModule.training_step)
    elif moment == "refresh":
        MatchedPosition.solve = after(count, MatchedPosition.solve)
    elif moment == "saved":
        AtomicCheckpoints.save_checkpoint = after(count, AtomicCheckpoints.save_checkpoint)
    elif moment == "saving":
        left = [count]

        def save(content, path):
            left[0] -= 1
            if left[0]:
                torch.serialization.save(content, path)
            else:
                half_a_file(content, path)
                die()

        torch.save = save
    elif moment == "student":
        training.save_student = after(count, training.save_student)
    elif moment == "looked":
        training.look = after(count, training.look)
    elif moment == "writing":  # any file but a checkpoint
        files.os.fsync = after(count, files.os.fsync)
    fit(Recipe.of(config), out, resume, quiet=True)


def killed(moment, count, recipe, out, resume=False):
    process = processes.Process(target=fit_until, args=(moment, count, recipe.config, out, resume))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "metrics.json").exists()


RANDOM = ("--distillation.method=mgd-rd+kd", "--training.epochs=5", "--data.augment=true")


@pytest.fixture
def whole(tiny, tmp_path):
    """The uninterrupted run: 5 epochs of 3 steps, a refresh every second epoch."""
    fit(tiny(*RANDOM), tmp_path / "whole", quiet=True)
    return tmp_path / "whole"


@pytest.mark.parametrize(
    ("moment", "count", "epochs"),
    [
        ("step", 11, 3),
        ("saved", 2, 2),
        ("saving", 3, 2),
        ("student", 1, 5),
        ("looked", 1, 5),
        ("writing", 3, 0),
        pytest.param("writing", 12, 1, marks=pytest.mark.slow),  # the first after the first checkpoint
        pytest.param("step", 1, 0, marks=pytest.mark.slow),
        pytest.param("step", 8, 2, marks=pytest.mark.slow),
        pytest.param("refresh", 4, 2, marks=pytest.mark.slow),
        pytest.param("saved", 1, 1, marks=pytest.mark.slow),
        pytest.param("saved", 3, 3, marks=pytest.mark.slow),
        pytest.param("saved", 5, 5, marks=pytest.mark.slow),
        pytest.param("saving", 1, 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_the_uninterrupted_one(tiny, tmp_path, whole, moment, count, epochs):
    out = tmp_path / "run"
    killed(moment, count, tiny(*RANDOM), out)
    assert (out / "last.ckpt").exists() == (epochs > 0)
    if epochs:
        assert checkpoint(out)["epoch"] == epochs - 1
    assert (out / ".lock").exists()
    fit(tiny(*RANDOM), out, resume=True, quiet=True)
    assert_same_end(out, whole)
    for each in (out, whole):  # the kill has left nothing, and nothing is missing
        assert not list(each.rglob(".*"))
    first, second = ({path.name for path in (each / "evidence").iterdir()} for each in (out, whole))
    assert first == second


AVERAGED = ("--training.ema=0.8", "--training.accumulate=2", "--training.validate_every=2")


@pytest.mark.parametrize(
    ("moment", "count", "arguments"),
    [
        ("step", 11, ()),
        ("saved", 5, ()),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("saved", 1, ()),
                ("saving", 3, ()),
                ("student", 1, ()),
                ("step", 8, ("--trainer.channels_last=true", "--trainer.deterministic=true")),
                ("step", 8, ("--trainer.precision=bf16-mixed",)),
            )
        ),
    ],
)
def test_a_killed_run_that_averages_its_weights(tiny, tmp_path, moment, count, arguments):
    recipe = tiny(*RANDOM, *AVERAGED, *arguments)
    fit(recipe, tmp_path / "whole", quiet=True)
    killed(moment, count, recipe, tmp_path / "run")
    fit(tiny(*RANDOM, *AVERAGED, *arguments), tmp_path / "run", resume=True, quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    first, second = (checkpoint(tmp_path / name) for name in ("run", "whole"))
    assert same(first[TRAINED], second[TRAINED])
    assert not torch.equal(first[TRAINED]["fc.weight"], first["state_dict"]["distiller.student.fc.weight"])


@pytest.mark.parametrize(("moment", "count"), [("step", 11), pytest.param("saved", 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_that_matches_by_its_own_steps(tiny, tmp_path, moment, count, every):
    arguments = (*RANDOM, "--distillation.refresh_online=2", f"--distillation.refresh_every={every}")
    fit(tiny(*arguments), tmp_path / "whole", quiet=True)
    killed(moment, count, tiny(*arguments), tmp_path / "run")
    fit(tiny(*arguments), tmp_path / "run", resume=True, quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_killed_run_that_is_aligned(tiny, tmp_path):
    arguments = (*RANDOM, "--distillation.method=mgd-align")
    fit(tiny(*arguments), tmp_path / "whole", quiet=True)
    killed("step", 11, tiny(*arguments), tmp_path / "run")
    fit(tiny(*arguments), tmp_path / "run", resume=True, quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tiny, tmp_path, whole):
    out = tmp_path / "run"
    for number, moment in enumerate(("step", "saved", "saving", "step")):
        killed(moment, 2, tiny(*RANDOM), out, resume=number > 0)
    fit(tiny(*RANDOM), out, resume=True, quiet=True)
    assert_same_end(out, whole)


def test_the_seeds_of_a_resumed_run_do_not_come_from_outside(tiny, tmp_path, whole):
    killed("saved", 2, tiny(*RANDOM), tmp_path / "run")
    torch.manual_seed(12345)
    fit(tiny(*RANDOM), tmp_path / "run", resume=True, quiet=True)
    assert_same_end(tmp_path / "run", whole)


TEACHER = ("--teacher.weights=null", "--teacher.training.epochs=3", "--distillation.method=mgd-amp+kd")


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("step", 5),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("saved", 2), ("saved", 3), ("student", 1), ("step", 10))
        ),
    ],
)
def test_killed_while_the_teacher_is_trained(tiny, tmp_path, moment, count):
    for name in ("whole", "run"):
        if name == "run":
            killed(moment, count, tiny(*TEACHER), tmp_path / name)
        fit(tiny(*TEACHER), tmp_path / name, resume=True, quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert_same_end(tmp_path / "run" / "teacher", tmp_path / "whole" / "teacher")


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "count"), [("step", 8), ("saved", 2)])
def test_killed_with_worker_processes(tiny, tmp_path, moment, count):
    recipe = tiny(*RANDOM, "--data.workers=1")
    fit(recipe, tmp_path / "whole", quiet=True)
    killed(moment, count, recipe, tmp_path / "run")
    fit(tiny(*RANDOM, "--data.workers=1"), tmp_path / "run", resume=True, quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_everything_that_training_needs_is_in_the_checkpoint(whole):
    names = checkpoint(whole)["state_dict"].keys()
    for number in range(3):
        for part in ("index", "margin", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
            assert f"distiller.positions.{number}.{part}" in names
    assert not any("teacher" in name for name in names)
    assert len(checkpoint(whole)["optimizer_states"][0]["state"]) > 3 * 2
    assert [path.name for path in whole.glob("*.ckpt")] == ["last.ckpt"]


@pytest.mark.pages
def test_a_run_that_was_killed_before_its_page(tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_report", lambda folders: None)
        metrics = fit(tiny("--distillation.method=none"), out, quiet=True)
    assert not (out / "report.html").exists()
    assert fit(tiny("--distillation.method=none"), out, resume=True, quiet=True) == metrics
    assert "What they find" in (out / "report.html").read_text()


def test_a_comparison_that_was_moved_goes_on(tiny, tmp_path):
    arguments = ("--teacher.weights=null", "--teacher.training.epochs=1")
    report = compare(tiny(*arguments), tmp_path / "old", ["kd"], 1)
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "new" / "cells" / "kd" / "seed0" / "metrics.json").unlink()
    again = compare(tiny(*arguments), tmp_path / "new", ["kd"], 1)
    assert again.runs[0].student == report.runs[0].student


def moved(root):
    return (f"--data.root={root}", "--data.workers=1", "--trainer.log_every=7", "--data.skip_corrupt=true")


@pytest.mark.parametrize("finished", [False, True])
def test_what_changes_nothing_may_change(tiny, tmp_path, finished):
    """The data on another disk, the workers that read it, the logs."""
    root, arguments = write_images(tmp_path / "insects"), ("--distillation.method=none", "--data.augment=false")
    for name in ("whole", *(["run"] if finished else [])):
        fit(tiny(*folder_arguments(root), *arguments), tmp_path / name, quiet=True)
    if not finished:
        killed("saved", 1, tiny(*folder_arguments(root), *arguments), tmp_path / "run")
    root.rename(tmp_path / "elsewhere")
    recipe = tiny(*folder_arguments(root), *arguments, *moved(tmp_path / "elsewhere"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(recipe, tmp_path / "run", resume=True, quiet=True)
    assert sum("data.workers was 0" in str(each.message) for each in caught) == (not finished)
    first, second = (checkpoint(tmp_path / name) for name in ("run", "whole"))
    for key in LASTING:
        assert same(first[key], second[key]), key
    if not finished:
        assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["data"]["workers"] == 1
    with pytest.raises(ValueError, match="differs in data: resume with the same values"):
        fit(tiny(*folder_arguments(root), *arguments, "--data.image_size=8"), tmp_path / "run", resume=True, quiet=True)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def truncated(path, tmp_path):
    path.write_bytes(path.read_bytes()[:-200])


def emptied(path, tmp_path):
    path.write_bytes(b"")


def malicious(path, tmp_path):
    torch.save({**torch.load(path, weights_only=True), "results": Payload(tmp_path / "executed")}, path)


def malicious_pickle(path, tmp_path):
    path.write_bytes(pickle.dumps(Payload(tmp_path / "executed"), protocol=4))


def a_state_dict(path, tmp_path):
    torch.save(torch.load(path, weights_only=True)["state_dict"], path)


def without_version(path, tmp_path):
    whole = torch.load(path, weights_only=True)
    del whole["pytorch-lightning_version"]
    torch.save(whole, path)


def a_list(path, tmp_path):
    torch.save([1, 2], path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncated, "last.ckpt: not a checkpoint, or a damaged or truncated one"),
        (emptied, "last.ckpt: not a checkpoint, or a damaged"),
        (malicious, "last.ckpt is refused: .* it holds Python objects or code .*, which are not loaded$"),
        (malicious_pickle, "last.ckpt is refused: .* it seems to hold Python objects or code, which are not loaded$"),
        (a_state_dict, "last.ckpt is not the checkpoint of a run: it has no state_dict"),
        (a_list, "last.ckpt is not the checkpoint of a run: expected a dict, found list"),
        (without_version, "last.ckpt is not the checkpoint of a run: it has no pytorch-lightning_version$"),
    ],
)
def test_checkpoints_that_are_refused(tiny, tmp_path, spoil, message):
    out = tmp_path / "run"
    recipe = tiny("--distillation.method=none")
    fit(recipe, out, quiet=True)
    (out / "metrics.json").unlink()
    spoil(out / "last.ckpt", tmp_path)
    before = (out / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=message) as info:
        fit(tiny("--distillation.method=none"), out, resume=True, quiet=True)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "executed").exists()
    assert not (out / "metrics.json").exists()
    assert (out / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("key", NEEDED)
def test_a_checkpoint_must_have_all_that_lightning_reads(tmp_path, key):
    torch.save({other: {} for other in NEEDED if other != key}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=f"last.ckpt is not the checkpoint of a run: it has no {key}$"):
        AtomicCheckpoints().load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("content", ['{"method": "no', "[]", '{"method": "none"}'])
def test_metrics_that_are_damaged(tiny, tmp_path, content):
    recipe = tiny("--distillation.method=none")
    claim(recipe, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"run/metrics.json") as info:
        fit(recipe, tmp_path / "run", resume=True, quiet=True)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("content", ["", '{"name": "x"', '{"name": "x", "options": [], "num_classes": 2}'])
def test_a_description_of_the_student_that_is_damaged(tmp_path, content):
    (tmp_path / "student.safetensors").touch()
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ValueError, match=r"model.json") as info:
        load_student(tmp_path)
    assert "\n" not in str(info.value)


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def broken_zip(*_):
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")


@pytest.mark.parametrize(("failure", "message"), [(no_space, "No space left"), (broken_zip, "cannot write checkpoint")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tiny, tmp_path, monkeypatch, failure, message):
    out = tmp_path / "run"
    saved = []

    def save(content, path):
        Path(path).write_bytes(b"half")
        return failure() if saved else (torch.serialization.save(content, path), saved.append(1))

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=message) as info:
        fit(tiny("--distillation.method=none"), out, quiet=True)
    assert "\n" not in str(info.value)
    assert checkpoint(out)["epoch"] == 0
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    monkeypatch.undo()
    fit(tiny("--distillation.method=none"), out, resume=True, quiet=True)
    fit(tiny("--distillation.method=none"), tmp_path / "whole", quiet=True)
    assert_same_end(out, tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, pytest.param(20_000, marks=pytest.mark.slow), 60_000])
def test_a_full_disk(tiny, small_disk, capfd, room):
    out = small_disk / "run"
    recipe = tiny("--distillation.method=none", "--training.epochs=40")
    write, filler = AtomicCheckpoints.save_checkpoint, small_disk / "filler"

    def save_and_fill(self, content, path, storage_options=None):
        write(self, content, path, storage_options)
        if not filler.exists():
            free = os.statvfs(small_disk)
            filler.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - room))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AtomicCheckpoints, "save_checkpoint", save_and_fill)
        with pytest.raises(OSError, match=r"No space left|cannot write checkpoint"):
            fit(recipe, out)
    assert capfd.readouterr().err == ""
    epoch = checkpoint(out)["epoch"]
    assert epoch < 39
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    filler.unlink()
    finished = fit(tiny("--distillation.method=none", "--training.epochs=40"), out, resume=True, quiet=True)
    assert finished.epochs == 40


@pytest.mark.parametrize("arguments", [(), ("--data.batch_size=60",)], ids=["some steps", "one step"])
def test_an_exploding_run_keeps_the_last_good_checkpoint(tiny, tmp_path, arguments):
    """With a single step an epoch, its end is the first to see what that step has done to the weights."""
    out = tmp_path / "run"
    recipe = tiny(
        "--distillation.method=mgd-amp",
        "--training.epochs=6",
        "--training.schedule=steps",
        "--training.milestones=[2]",
        "--training.gamma=1e30",
        *arguments,
    )
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step \d+ \(epoch 2\): training stops"):
        fit(recipe, out, quiet=True)
    good = checkpoint(out)
    assert good["epoch"] == 1
    weights = [value for value in good["state_dict"].values() if value.is_floating_point()]
    assert all(value.isfinite().all() and value.abs().max() < 1e4 for value in weights)
    assert not (out / "metrics.json").exists()
    assert not (out / "student.safetensors").exists()


def test_a_position_that_is_not_finite(tiny, tmp_path, monkeypatch):
    out, recipe = tmp_path / "run", tiny("--distillation.method=mgd-amp", "--training.epochs=4")
    loss, calls = MatchedPosition.loss, []

    def spoiled(self, *args):
        calls.append(self.name)
        return loss(self, *args) * (float("inf") if len(calls) > 3 * 7 and "layer2" in self.name else 1)

    monkeypatch.setattr(MatchedPosition, "loss", spoiled)
    message = (
        r"the distillation loss of position 1 \(layer2.relu2:input -> layer2.relu2:input\) is inf at step 7 "
        r"\(epoch 2\): training stops and the checkpoint of the last whole epoch is kept"
    )
    with pytest.raises(FloatingPointError, match=message):
        fit(recipe, out, quiet=True)
    assert checkpoint(out)["epoch"] == 1
    assert checkpoint(out)["global_step"] == 6
    monkeypatch.undo()
    resumed = tiny("--distillation.method=mgd-amp", "--training.epochs=4")
    fit(resumed, out, resume=True, quiet=True)
    fit(tiny("--distillation.method=mgd-amp", "--training.epochs=4"), tmp_path / "whole", quiet=True)
    assert_same_end(out, tmp_path / "whole")
