"""The distilling `Trainer` of Hugging Face on detectors and on networks for pixels, small ones with random weights."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from matchdistill import MatchingDistiller

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    DetrConfig,
    ResNetConfig,
    RTDetrConfig,
    RTDetrResNetConfig,
    SegformerConfig,
    TrainingArguments,
    UperNetConfig,
)

from matchdistill.integrations.transformers import MatchingTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = 3


def stages(width: int, first: int = 1) -> dict[str, Any]:
    """Options of a small ResNet."""
    sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width, 4 * width, 8 * width]}
    names = [f"stage{number}" for number in range(first, 5)]
    return {**sizes, "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": names}


def detr(width: int, labels: int = LABELS) -> nn.Module:
    sides = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "layers")}
    config = DetrConfig(
        backbone_config=ResNetConfig(**stages(width, 2)),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_labels=labels,
        dropout=0.0,
        **sides,
    )
    # It freezes the first layers of its backbone, and with the names that these have now all of it.
    return AutoModelForObjectDetection.from_config(config).requires_grad_(True)


def rt_detr(width: int, labels: int = LABELS) -> nn.Module:
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(**stages(width, 2)),
        encoder_hidden_dim=16,
        encoder_in_channels=[2 * width, 4 * width, 8 * width],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_queries=5,
        num_denoising=0,
        num_labels=labels,
    )
    return AutoModelForObjectDetection.from_config(config)


def segformer(width: int, labels: int = LABELS) -> nn.Module:
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
        num_attention_heads=[1, 1, 2, 2],
        sr_ratios=[4, 2, 1, 1],
        decoder_hidden_size=2 * width,
        num_labels=labels,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    return AutoModelForSemanticSegmentation.from_config(config)


def upernet(width: int, labels: int = LABELS) -> nn.Module:
    config = UperNetConfig(
        backbone_config=ResNetConfig(**stages(width)),
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=4 * width,
        auxiliary_channels=8,
        num_labels=labels,
    )
    return AutoModelForSemanticSegmentation.from_config(config)


class Scenes(torch.utils.data.Dataset):
    """Random images whose right half is padding, with boxes and with a class for every pixel."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        chance = torch.Generator().manual_seed(index)
        pixels = torch.randn(3, 64, 64, generator=chance)
        centers = torch.rand(2, 2, generator=chance) / 2 + 0.25
        boxes = torch.cat([centers, torch.full((2, 2), 0.2)], 1)
        counts = torch.zeros(64, 64, dtype=torch.int64)
        counts[:, : 64 if index % 2 else 32] = 1
        return {
            "pixel_values": pixels,
            "pixel_mask": counts,
            "objects": {"class_labels": torch.randint(LABELS, (2,), generator=chance), "boxes": boxes},
            "pixels": torch.randint(LABELS, (64, 64), generator=chance),
        }


def of_boxes(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as image processors of detectors give it."""
    stacked = {name: torch.stack([each[name] for each in samples]) for name in ("pixel_values", "pixel_mask")}
    return {**stacked, "labels": [each["objects"] for each in samples]}


def of_pixels(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as image processors of semantic segmentation give it."""
    images, labels = (torch.stack([each[name] for each in samples]) for name in ("pixel_values", "pixels"))
    return {"pixel_values": images, "labels": labels}


def trainer(
    out: Path, student: nn.Module, teacher: nn.Module, collate: Callable[..., Any], **options: Any
) -> MatchingTrainer:
    usual = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 0.001,
        "save_strategy": "epoch",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    return MatchingTrainer(
        student,
        TrainingArguments(str(out), **{**usual, **options}),
        train_dataset=Scenes(),
        data_collator=collate,
        teacher=teacher,
    )


def pre_hooks(module: nn.Module) -> Any:
    return module._forward_pre_hooks.values()


def values_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize(
    ("teacher", "student", "collate"),
    [
        pytest.param(rt_detr, detr, of_boxes, id="DETR from RT-DETR"),
        pytest.param(detr, rt_detr, of_boxes, id="RT-DETR from DETR", marks=pytest.mark.slow),
        pytest.param(upernet, segformer, of_pixels, id="SegFormer from UperNet"),
        pytest.param(segformer, upernet, of_pixels, id="UperNet from SegFormer", marks=pytest.mark.slow),
        pytest.param(upernet, detr, of_boxes, id="DETR from UperNet", marks=pytest.mark.slow),
    ],
)
def test_a_run_its_resume_and_its_student(tmp_path: Path, teacher: Any, student: Any, collate: Any) -> None:
    """A whole run; the first epoch's checkpoint taken up again ends at the same bits, and the student loads as ever."""
    torch.manual_seed(0)
    big, small = teacher(8, 7), student(4)
    if teacher is upernet and student is detr:  # which has no argument for the mask of the padding
        collate_of = collate
        collate = lambda samples: {k: v for k, v in collate_of(samples).items() if k != "pixel_mask"}  # noqa: E731
    start = copy.deepcopy(small)
    model = trainer(tmp_path / "run", small, big, collate)
    model.train()
    logs = {name: value for each in model.state.log_history for name, value in each.items()}
    assert logs["distillation_loss"] > 0
    assert "matching/cost_3" in logs
    assert [type(module) for module in small.modules()] == [type(module) for module in start.modules()]
    left = [hook for module in small.modules() for hook in (*module._forward_hooks.values(), *pre_hooks(module))]
    assert not any(hook.__module__.startswith("matchdistill") for hook in left)  # SegFormer has some of its own
    model.save_model(str(tmp_path / "student"))
    auto = AutoModelForObjectDetection if collate is not of_pixels else AutoModelForSemanticSegmentation
    loaded = auto.from_pretrained(tmp_path / "student")
    expected = values_of(small)
    assert list(loaded.state_dict()) == list(start.state_dict())
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())

    again = copy.deepcopy(start)
    resumed = trainer(tmp_path / "run", again, big, collate)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("teacher", "student", "collate"),
    [pytest.param(rt_detr, detr, of_boxes, id="DETR"), pytest.param(upernet, segformer, of_pixels, id="SegFormer")],
)
def test_a_step_is_the_models_own_loss_and_ours(tmp_path: Path, teacher: Any, student: Any, collate: Any) -> None:
    """One step of plain gradient descent over all images, in a loop of one's own; padding counts in neither loss."""
    torch.manual_seed(0)
    big, small = teacher(8, 7), student(4)
    expected = copy.deepcopy(small)
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.01}
    model = trainer(tmp_path, small, copy.deepcopy(big), collate, **options)
    seen: list[dict[str, Any]] = []
    small.register_forward_pre_hook(
        lambda module, args, given: seen.append(given) if module.training else None, with_kwargs=True
    )
    model.train()
    batch = seen[-1]
    assert "labels" in batch
    images = {name: batch[name] for name in ("pixel_values", "pixel_mask") if name in batch}
    mask = images["pixel_mask"].bool() if collate is of_boxes else None
    distiller = MatchingDistiller(big, expected)
    with torch.no_grad():
        order = collate([Scenes()[index] for index in range(8)])
        distiller.refresh([{name: order[name] for name in images}], forward=lambda given: refresh(expected, given))
    expected.train()
    optimizer = torch.optim.SGD([*expected.parameters(), *nn.Module.parameters(distiller.positions)], 0.01)
    with distiller.capture(**images) as captured:
        loss = expected(**batch).loss
    (loss + distiller.loss(captured, mask)).backward()
    optimizer.step()
    for (name, value), (other, its) in zip(small.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(value, its, rtol=1e-4, atol=1e-6)


def refresh(network: nn.Module, given: dict[str, torch.Tensor]) -> Any:
    network(**given)
    return given["pixel_mask"].bool() if "pixel_mask" in given else None
