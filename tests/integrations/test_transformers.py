"""The distilling `Trainer` of Hugging Face, on small networks with random weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from distributed import run
from matchdistill import MatchingDistiller

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from matchdistill.integrations.transformers import MATCHING, MatchingDistillation, MatchingTrainer  # noqa: E402
from matchdistill.models import build_model, build_segmenter  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Pictures(torch.utils.data.Dataset):
    """Random images with labels, as image processors give them."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": index % 4}


def resnet(width: int, labels: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = [width, 2 * width, 4 * width, 8 * width]
    config = ResNetConfig(
        embedding_size=width, hidden_sizes=sizes, depths=[1, 1, 1, 1], layer_type="basic", num_labels=labels
    )
    return ResNetForImageClassification(config)


def vit(width: int, labels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=32,
        patch_size=8,
        num_labels=labels,
    )
    return ViTForImageClassification(config)


def arguments(out: Path, **options: Any) -> TrainingArguments:
    usual = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.02,
        "save_strategy": "epoch",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    return TrainingArguments(str(out), **{**usual, **options})


def trainer(out: Path, student: nn.Module, teacher: nn.Module | None = None, **options: Any) -> MatchingTrainer:
    own = {name: options.pop(name) for name in ("refresh_every", "distillation", "callbacks") if name in options}
    teacher = resnet(8, labels=7, seed=1) if teacher is None else teacher
    return MatchingTrainer(student, arguments(out, **options), train_dataset=Pictures(), teacher=teacher, **own)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and torch.equal(value, its) for (name, value), (other, its) in pairs)


def test_it_trains_as_a_loop_of_ones_own_does(tmp_path: Path) -> None:
    """Two epochs of plain gradient descent, the matching of the first one kept."""
    student, teacher = resnet(4), resnet(8, labels=7, seed=1)
    expected, batches = copy.deepcopy(student), []

    class Seen(TrainerCallback):
        """Keeps the images of each step, whose order is the trainer's own."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            batches.append([])

    model = trainer(tmp_path, student, copy.deepcopy(teacher), refresh_every=0, callbacks=[Seen()])
    student.register_forward_pre_hook(
        lambda module, args, kwargs: batches[-1].append(kwargs) if batches and module.training else None,
        with_kwargs=True,
    )
    model.train()
    assert [len(batch) for batch in batches] == [1] * 6
    distiller = MatchingDistiller(teacher, expected)
    images = [{"pixel_values": torch.stack([Pictures()[index]["pixel_values"] for index in range(24)])}]
    distiller.refresh(images)
    parameters = [*expected.parameters(), *nn.Module.parameters(distiller.positions)]
    optimizer = torch.optim.SGD(parameters, 0.02)
    expected.train()
    for (given,) in batches:
        with distiller.capture(pixel_values=given["pixel_values"]) as captured:
            loss = expected(**given).loss
        (loss + distiller.loss(captured)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, value), (other, its) in zip(student.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(value, its, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("networks", [(resnet, vit), (vit, resnet), (vit, vit)])
def test_the_student_is_what_it_would_be_without(tmp_path: Path, networks: Any) -> None:
    teacher, student = networks[0](16, 7), networks[1](8)
    plain = copy.deepcopy(student)
    model = trainer(tmp_path, student, teacher)
    before = copy.deepcopy(teacher.state_dict())
    model.train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert list(student.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in student.modules()] == [type(module) for module in plain.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())
    model.save_model(str(tmp_path / "student"))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert same(loaded, student)
    assert not (tmp_path / "student" / MATCHING).exists()
    logs = {name: value for each in model.state.log_history for name, value in each.items()}
    assert logs["distillation_loss"] > 0
    assert "matching/cost_0" in logs
    guests = sum(len(group["params"]) for group in model.optimizer.param_groups)
    assert guests == len(list(student.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_strategy": "steps", "save_steps": 2},
        {"optim": "adamw_torch", "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0},
    ],
)
def test_a_resumed_run_ends_as_the_uncut_one(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = resnet(4)
    trainer(tmp_path / "run", whole, num_train_epochs=3, **options).train()
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert len(checkpoints) > 1
    state = load_file(checkpoints[0] / MATCHING)
    assert "0.index" in state
    resumed = resnet(4, seed=5)
    model = trainer(tmp_path / "again", resumed, num_train_epochs=3, **options)
    model.train(resume_from_checkpoint=str(checkpoints[0]))
    assert same(resumed, whole)
    last = f"again/{checkpoints[-1].name}/{MATCHING}"
    found = load_file(tmp_path / last)
    for name, value in load_file(checkpoints[-1] / MATCHING).items():
        assert torch.equal(found[name], value), name


def test_accumulated_batches_weigh_as_one(tmp_path: Path) -> None:
    """Without batch norms: four batches of two are one of eight."""
    first, second = vit(8), vit(8)
    options = {"save_strategy": "no", "max_steps": 2}
    for student, more in (
        (first, {"per_device_train_batch_size": 8}),
        (second, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    ):
        # The norm of the batch would tell two images from eight.
        norm = {"norm": lambda channels: nn.Identity()}
        trainer(tmp_path, student, vit(16, 7), distillation=norm, **options, **more).train()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_ones_own_trainer(tmp_path: Path) -> None:
    """With a loss of its own, labels that are smoothed, evaluation, and a second training."""

    class Own(Trainer):
        calls = 0

        def compute_loss(self, *given: Any, **options: Any) -> Any:
            Own.calls += 1
            return super().compute_loss(*given, **options)

    class Mine(MatchingDistillation, Own):
        pass

    student = resnet(4)
    options = arguments(tmp_path, label_smoothing_factor=0.1, eval_strategy="epoch", save_strategy="no")
    mine = Mine(
        student, options, train_dataset=Pictures(), eval_dataset=Pictures(), teacher=resnet(8, labels=7), max_images=16
    )
    mine.train()
    assert Own.calls == 2 * 3 * 2
    before = copy.deepcopy(student.state_dict())
    assert torch.isfinite(torch.tensor(mine.evaluate()["eval_loss"]))
    mine.train()
    assert not torch.equal(before["classifier.1.weight"], student.state_dict()["classifier.1.weight"])
    assert sum(len(group["params"]) for group in mine.optimizer.param_groups) == len(list(student.parameters()))


def test_mixed_precision(tmp_path: Path) -> None:
    model = trainer(tmp_path, resnet(4), bf16=True, max_steps=2, save_strategy="no")
    model.train()
    losses = [each["distillation_loss"] for each in model.state.log_history if "distillation_loss" in each]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)


def test_what_cannot_work_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no option 'los_weight'"):
        trainer(tmp_path, resnet(4), distillation={"los_weight": 1})
    with pytest.raises(ValueError, match="leave it out"):
        trainer(tmp_path, resnet(4), distillation={"online": 2})
    with pytest.raises(ValueError, match="refresh_every is -1"):
        trainer(tmp_path, resnet(4), refresh_every=-1)
    frozen = trainer(tmp_path, resnet(4))
    frozen.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="no parameter of the student"):
        frozen.train()
    several = trainer(tmp_path, resnet(4))
    several.args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel"):
        several.train()


def test_a_teacher_that_is_no_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher='google/vit': expected a network, got a str: load it first"):
        trainer(tmp_path, resnet(4), teacher="google/vit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (build_model, {"embedding_size": 4, "hidden_sizes": [4, 8, 16, 32], "depths": [1] * 4, "layer_type": "basic"}),
        (
            build_segmenter,
            {"hidden_sizes": [4, 8, 16, 32], "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8},
        ),
    ],
)
def test_a_student_without_its_loss_is_refused(tmp_path: Path, build: Any, options: dict[str, Any]) -> None:
    kind = "resnet" if build is build_model else "segformer"
    student = build(f"transformers:{kind}", 4, **options)
    with pytest.raises(ValueError, match="does not return the loss that the trainer needs: build it by transformers"):
        trainer(tmp_path, student)
    trainer(tmp_path, resnet(4), teacher=student if kind == "resnet" else None)  # a teacher may be one


@pytest.mark.parametrize(
    ("teacher", "options"),
    [(vit(16, 7), {}), (None, {"taps": [("resnet.encoder.stages.3", "resnet.encoder.stages.3")]})],
)
def test_checkpoints_of_others_are_named(tmp_path: Path, teacher: Any, options: dict[str, Any]) -> None:
    """Of another teacher, of other taps, and of the plain trainer."""
    trainer(tmp_path / "ours", resnet(4), max_steps=1, save_strategy="steps", save_steps=1).train()
    other = trainer(tmp_path / "next", resnet(4), teacher, distillation=options, max_steps=2)
    with pytest.raises(ValueError, match=r"matching\.safetensors is of another teacher, student or other taps"):
        other.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-1"))
    plain = arguments(tmp_path / "plain", max_steps=1, save_strategy="steps", save_steps=1)
    Trainer(resnet(4), plain, train_dataset=Pictures()).train()
    with pytest.raises(ValueError, match="checkpoint of a trainer without distillation, it has no matching"):
        other.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))


def _rank(out: Path, rank: int) -> dict[str, Tensor]:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    student = resnet(4)
    model = trainer(out, student, num_train_epochs=2, per_device_train_batch_size=4, ddp_backend="gloo")
    kept: dict[str, Tensor] = {}
    release = model._release

    def keep() -> None:
        if model.distiller is not None:
            kept.update({f"position {name}": value.clone() for name, value in _state(model.distiller)})
        release()

    model._release = keep  # type: ignore[method-assign]
    model.train()
    assert dist.get_world_size() == 2
    return {**student.state_dict(), **kept}


def _state(distiller: MatchingDistiller) -> Any:
    return distiller.positions.state_dict().items()  # type: ignore[attr-defined]


class Worker:
    """A rank's work, with where it writes; a class, as processes are started with it."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __call__(self, rank: int) -> dict[str, Tensor]:
        return _rank(self.out, rank)


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path: Path) -> None:
    first, second = run(Worker(tmp_path / "out"), tmp_path)
    trained = [name for name in first if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert any(name.startswith("position") for name in trained)
    for name in trained:
        assert torch.equal(first[name], second[name]), name
