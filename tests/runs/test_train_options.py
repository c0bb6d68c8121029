"""Options of the trainer and of the training: what they change, and what they must not."""

import csv
import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import nn

from matchdistill.data import module as data_module
from matchdistill.models import small_resnet
from matchdistill.runs.build import build_module
from matchdistill.runs.machine import check_compiler
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.module import ClassificationModule
from matchdistill.tasks.optimizing import lr_factor

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


def column(out, name):
    """What a run has logged under a name, in order."""
    values = []
    for path in sorted((out / "logs").glob("version_*/metrics.csv")):
        with path.open() as file:
            values += [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
    return values


def metrics_of(out):
    """The metrics of a run without the time that it took."""
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["seconds"]
    return metrics


def by_hand(recipe, monkeypatch, processes=1):
    """The run of a recipe in float32 in a plain loop, each step on the mean loss of all its batches.

    Returns:
        The losses of the batches, [epoch][batch], and the student. The batches of several processes take turns.
    """
    loaders = []
    for rank in range(processes):
        with monkeypatch.context() as patch:
            patch.setattr(data_module, "rank_and_world", lambda rank=rank: (rank, processes))
            recipe.data.setup()
            loaders.append(recipe.data.train_dataloader())
    module = build_module(recipe).train()
    if module.distiller is not None:
        module.distiller.refresh(recipe.data.refresh_dataloader(recipe.distillation.refresh_images, 0))
    options = recipe.training
    optimizer = torch.optim.SGD(module.parameters(), options.lr, options.momentum, nesterov=True, weight_decay=1e-4)
    losses = []
    for epoch in range(options.epochs):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        batches = [batch for turn in zip(*loaders, strict=True) for batch in turn]
        groups = list(torch.arange(len(batches)).split(options.accumulate * processes))
        losses.append([])
        for step, group in enumerate(groups):
            for parameters in optimizer.param_groups:
                parameters["lr"] = options.lr * lr_factor(options, epoch + step / len(groups))
            parts = []
            for number in group.tolist():
                output, distilled = module.losses(batches[number][0])
                parts.append(F.cross_entropy(output, batches[number][1]) + sum(distilled.values()))
            optimizer.zero_grad()
            torch.stack(parts).mean().backward()
            optimizer.step()
            losses[-1] += [part.item() for part in parts]
    return losses, module.network()


def assert_weights_near(found, expected, rtol):
    """Of two students; running statistics aside, which are of one process's batches."""
    for name, value in expected.named_parameters():
        torch.testing.assert_close(
            found[name], value.detach(), rtol=rtol, atol=rtol, msg=lambda text, name=name: name + text
        )


OPTIONS = {
    "plain": ([], 1e-6),
    "channels_last": (["--trainer.channels_last=true"], 1e-4),
    "deterministic": (["--trainer.deterministic=true"], 1e-6),
    "prepared teacher": (["--trainer.prepare_teacher=true"], 1e-4),
    "teacher on ONNX Runtime": (["--teacher.engine=onnxruntime"], 1e-4),
    "accumulation": (["--training.accumulate=3"], 1e-5),
    "bf16": (["--trainer.precision=bf16-mixed"], 0.03),
    "average": (["--training.ema=0"], 1e-6),
    "compiled": (["--trainer.compile=true"], 1e-3),
}
OPTIONS["compiled, all others"] = (
    [argument for name, (arguments, _) in OPTIONS.items() for argument in arguments if "ONNX" not in name],
    0.03,
)
OPTIONS["bf16, teacher on ONNX Runtime"] = (["--trainer.precision=bf16-mixed", "--teacher.engine=onnxruntime"], 0.03)
OPTIONS["compiled, teacher on ONNX Runtime"] = (["--trainer.compile=true", "--teacher.engine=onnxruntime"], 1e-3)
OPTIONS["fp16"] = (["--trainer.precision=16-mixed", "--trainer.accelerator=gpu", "--trainer.devices=1"], 0.03)
MARKS = {
    "compiled": pytest.mark.slow,
    "compiled, all others": pytest.mark.slow,
    "compiled, teacher on ONNX Runtime": pytest.mark.slow,
    "bf16, teacher on ONNX Runtime": pytest.mark.slow,
    "fp16": (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
}


@pytest.mark.parametrize("method", ["mgd-amp", "none"])
@pytest.mark.parametrize("option", [pytest.param(name, marks=MARKS.get(name, ())) for name in OPTIONS])
def test_losses_are_those_of_a_plain_loop(tiny, tmp_path, monkeypatch, option, method):
    # As large as these losses take from the start: at a larger one the first steps would be left out to find it.
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=256.0))
    common = [f"--distillation.method={method}", "--data.train_limit=80", "--distillation.refresh_every=0"]
    arguments, tolerance = OPTIONS[option]
    fit(tiny(*common, *arguments), tmp_path / "run", quiet=True)
    accumulate = [argument for argument in arguments if "accumulate" in argument]
    losses, student = by_hand(tiny(*common, *accumulate), monkeypatch)
    expected = [sum(epoch) / len(epoch) for epoch in losses]
    assert column(tmp_path / "run", "train/loss") == pytest.approx(expected, rel=tolerance)
    assert len(losses[0]) == 4
    assert_weights_near(load_file(tmp_path / "run" / "student.safetensors"), student, 10 * tolerance)


@pytest.mark.parametrize("how", ["--trainer.prepare_teacher=true", "--teacher.engine=onnxruntime"])
@pytest.mark.parametrize("method", ["mgd-amp", "fitnets", "kd"])
def test_a_prepared_teacher_is_trained_and_measured_as_it_is(tiny, tmp_path, method, how):
    """Its weights are loaded after it was built, here those of its own training."""
    common = [f"--distillation.method={method}", "--data.train_limit=80", "--teacher.training.epochs=2"]
    for name, options in (("run", [how]), ("plain", [])):
        fit(tiny(*common, *options), tmp_path / name, quiet=True)
    losses = [column(tmp_path / name, "train/loss") for name in ("run", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    first, second = (metrics_of(tmp_path / name) for name in ("run", "plain"))
    assert first["teacher"] == second["teacher"]


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        (
            "--trainer.prepare_teacher=true",
            "prepare_teacher is for torch, but teacher.engine is onnxruntime: leave one",
        ),
        ("--trainer.accelerator=gpu", "runs on the CPU, but trainer.accelerator is gpu: leave one out"),
    ],
)
def test_what_does_not_go_with_onnx_runtime(tiny, argument, told):
    with pytest.raises(ValueError, match=told):
        tiny("--teacher.engine=onnxruntime", argument)


def test_channels_last_reaches_networks_and_images(tiny):
    wide = ("--trainer.channels_last=true", "--student.options={width: 8}")
    module = build_module(tiny(*wide))
    for network in (module.network(), module.teacher):
        assert network.layer2.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert not network.layer2.conv1.weight.is_contiguous()
    images, _ = module.on_after_batch_transfer((torch.rand(2, 3, 8, 8), torch.zeros(2)), 0)
    assert images.is_contiguous(memory_format=torch.channels_last)
    narrow = build_module(tiny("--trainer.channels_last=true"))  # where it may crash: see `corrupts_memory`
    assert narrow.network().layer2.conv1.weight.is_contiguous()
    plain = build_module(tiny())
    assert plain.teacher.layer2.conv1.weight.is_contiguous()
    images = torch.rand(2, 3, 8, 8)
    assert plain.on_after_batch_transfer((images, torch.zeros(2)), 0)[0] is images
    kd = build_module(tiny(*wide, "--distillation.method=kd"))
    assert not kd.teacher.layer2.conv1.weight.is_contiguous()


@pytest.fixture
def validated(monkeypatch):
    """The epochs that end with a validation."""
    epochs = []

    def recorded(self, batch, number, step=ClassificationModule.validation_step):
        if number == 0:
            epochs.append(self.current_epoch)
        return step(self, batch, number)

    monkeypatch.setattr(ClassificationModule, "validation_step", recorded)
    return epochs


@pytest.mark.parametrize(
    ("every", "arguments", "expected"),
    [
        (1, [], [0, 1, 2, 3, 4]),
        (2, [], [1, 3, 4]),
        (5, [], [4]),
        (100, [], [4]),
        (3, ["--training.warmup_epochs=3"], [2, 5, 7]),
    ],
)
def test_validation_every_few_epochs_and_after_the_last(tiny, tmp_path, validated, capsys, every, arguments, expected):
    arguments = ["--training.epochs=5", "--distillation.method=kd", *arguments]
    fit(tiny(*arguments, f"--training.validate_every={every}"), tmp_path / "run")
    assert validated == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [number for number, line in enumerate(lines) if "top-1" in line] == expected
    fit(tiny(*arguments), tmp_path / "every", quiet=True)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "every")
    weights = load_file(tmp_path / "every" / "student.safetensors")
    assert all(
        torch.equal(value, weights[name]) for name, value in load_file(tmp_path / "run/student.safetensors").items()
    )


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_validation_after_the_last_epoch_of_a_resumed_run(tiny, tmp_path, validated, monkeypatch, epochs):
    arguments = ("--training.epochs=4", "--training.validate_every=3", "--distillation.method=kd")
    with monkeypatch.context() as patch:

        def stop(self):
            if self.current_epoch == epochs - 1:
                patch.setattr(ClassificationModule, "on_train_epoch_start", lambda _: (_ for _ in ()).throw(KeyError))
                patch.setattr("matchdistill.runs.train.save_student", lambda *_: (_ for _ in ()).throw(KeyError))

        patch.setattr(ClassificationModule, "on_train_epoch_end", stop)
        with pytest.raises(KeyError):
            fit(tiny(*arguments), tmp_path / "run", quiet=True)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["epoch"] == epochs - 1
    fit(tiny(*arguments), tmp_path / "run", resume=True, quiet=True)
    assert validated == [2, 3]
    fit(tiny("--training.epochs=4", "--distillation.method=kd"), tmp_path / "every", quiet=True)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "every")


def test_weights_that_an_epoch_without_validation_spoils_are_not_saved(tiny, tmp_path):
    steps = ("--training.schedule=steps", "--training.milestones=[2]", "--training.gamma=1e30", "--data.batch_size=60")
    recipe = tiny("--training.epochs=6", "--training.validate_every=5", *steps)
    with pytest.raises(FloatingPointError, match=r"output in evaluation mode is (nan|inf) at step 3 \(epoch 2\)"):
        fit(recipe, tmp_path / "run", quiet=True)
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(value.abs().max() < 1e4 for value in saved["state_dict"].values() if value.is_floating_point())


@pytest.mark.parametrize("section", ["training", "teacher.training"])
@pytest.mark.parametrize("every", [0, -2])
def test_validation_must_come_at_some_time(tiny, section, every):
    with pytest.raises(
        ValueError, match=rf"{section}.validate_every is {every}: expected a whole number from 1 on \(1: every epoch\)"
    ):
        tiny(f"--{section}.validate_every={every}")


def without_norm(num_classes):
    """No batch norm: its losses do not depend on how images come in batches."""
    layers = (
        nn.Conv2d(3, 4, 3, 2),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, num_classes),
    )
    return nn.Sequential(*layers)


def test_accumulated_gradients_are_those_of_a_large_batch(tiny, tmp_path):
    common = ("--student.name=test_train_options:without_norm", "--student.options={}", "--data.train_limit=80")
    common += ("--distillation.method=kd", "--data.augment=false")
    for name, arguments in (("large", ["batch_size=40"]), ("accumulated", ["batch_size=10"])):
        accumulate = "--training.accumulate=" + ("4" if name == "accumulated" else "1")
        fit(tiny(*common, accumulate, *(f"--data.{argument}" for argument in arguments)), tmp_path / name, quiet=True)
    large, accumulated = (load_file(tmp_path / name / "student.safetensors") for name in ("large", "accumulated"))
    for name, value in large.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-4, atol=1e-6)
    for name in ("train/loss", "val/top1"):
        assert column(tmp_path / "accumulated", name) == pytest.approx(column(tmp_path / "large", name), rel=1e-5)
    saved = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("large", "accumulated")]
    assert saved[0]["global_step"] == saved[1]["global_step"] == 4
    assert saved[0]["lr_schedulers"][0]["_last_lr"] == saved[1]["lr_schedulers"][0]["_last_lr"]


def test_deterministic_algorithms_for_the_run_alone(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ClassificationModule,
        "on_train_end",
        lambda _: seen.append(torch.are_deterministic_algorithms_enabled()),
        raising=False,
    )
    for option in ("true", "false"):
        fit(tiny("--distillation.method=none", f"--trainer.deterministic={option}"), tmp_path / option, quiet=True)
    assert seen == [True, False]


def test_compilation_without_a_compiler_is_refused(tiny, tmp_path, monkeypatch):
    import torch._inductor.config

    check_compiler.cache_clear()
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    said = r"^trainer.compile needs a C\+\+ compiler .* or train without: .*no-such-compiler"
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),  # monkeypatch would not put it back
        pytest.raises(ValueError, match=said) as info,
    ):
        fit(tiny("--trainer.compile=true"), tmp_path / "run")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_networks_are_compiled_anew_with_their_hooks(tiny, tmp_path):
    """Code that was compiled for a student without hooks is not taken for one of the same class that has some."""
    for method in ("none", "fitnets"):
        torch._dynamo.utils.counters.clear()
        arguments = (f"--distillation.method={method}", "--training.epochs=1")
        plain, compiled = tmp_path / method, tmp_path / f"{method} compiled"
        fit(tiny(*arguments, "--trainer.compile=true"), compiled, quiet=True)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        fit(tiny(*arguments), plain, quiet=True)
        assert column(compiled, "train/loss") == pytest.approx(column(plain, "train/loss"), rel=1e-3)
        found, expected = (load_file(out / "student.safetensors") for out in (compiled, plain))
        assert found.keys() == expected.keys()


def test_accumulation_of_no_batch(tiny):
    with pytest.raises(
        ValueError,
        match=r"teacher.training.accumulate is 0: expected a whole number from 1 on \(1: a step for every batch\)",
    ):
        tiny("--teacher.training.accumulate=0")


def test_a_run_of_an_older_version_goes_on(tiny, tmp_path):
    """Its recipe lacks the keys that came later, which then had what are the defaults now."""
    out, path = tmp_path / "run", tmp_path / "run" / "recipe.yaml"
    metrics = fit(tiny("--distillation.method=kd"), out, quiet=True)
    config = yaml.safe_load(path.read_text())
    for section in (config["training"], config["teacher"]["training"]):
        for name in ("validate_every", "accumulate", "ema"):
            del section[name]
    for name in ("channels_last", "compile", "deterministic"):
        del config["trainer"][name]
    path.write_text(yaml.safe_dump(config))
    assert fit(tiny("--distillation.method=kd"), out, resume=True) == metrics
    with pytest.raises(ValueError, match=r"recipe.yaml differs in training: resume with the same values"):
        fit(tiny("--distillation.method=kd", "--training.ema=0.9"), out, resume=True)


def partly_frozen(num_classes):
    """A student whose builder has put the batch norms of a part into evaluation mode."""
    model = small_resnet(num_classes, width=2)
    for module in (model.stem, *model.stem.modules()):
        module.eval().requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "arguments", [[], ["--training.ema=0.5", "--training.validate_every=2"]], ids=["plain", "averaged"]
)
def test_what_the_builder_put_into_evaluation_mode_stays_so(tiny, tmp_path, monkeypatch, arguments):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    name = ["--student.name=test_train_options:partly_frozen", "--student.options={}"]
    fit(tiny(*name, "--distillation.refresh_every=1", *arguments), tmp_path / "run", quiet=True)
    weights = load_file(tmp_path / "run" / "student.safetensors")
    counts = {name: int(value) for name, value in weights.items() if name.endswith("num_batches_tracked")}
    assert {value for name, value in counts.items() if name.startswith("stem")} == {0}
    assert {value for name, value in counts.items() if not name.startswith("stem")} == {2 * 3}
