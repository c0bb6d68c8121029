"""How good a run's networks are on the validation images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from matchdistill.models import load_weights
from matchdistill.models.detection import weightless
from matchdistill.models.trust import check_trusted
from matchdistill.runs.build import BUILDERS, build_teacher, check_network, make_task
from matchdistill.runs.export import load_detector, load_exported
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.train import machine_trainer, quieten


def validate(
    recipe: Recipe, run: Path, weights: Path | None = None, trust: bool = False
) -> dict[str, dict[str, float]]:
    """Measure the student of a run, and its teacher where its weights are there.

    Args:
        recipe: of the run.
        run: its folder.
        weights: what the student is loaded from, a checkpoint or exported weights, or its exported program (.onnx, .pt2);
            None: its final weights.
        trust: build networks by whatever functions the recipe names, and load `.pt2` files, which can run code.

    Returns:
        For "student" and "teacher" the metrics by name: the shares of images right ("top1", and with more than 5 classes
        "top5"), or of a detector its average precisions ("ap", "ap50", ..., "mask_ap", ...).

    Raises:
        ValueError: weights that are missing or do not fit, or a package that is missing for them; or something that would
            run code that is not trusted.
    """
    quieten()
    if not trust:
        check_trusted(run, *((network.name, network.options) for network in (recipe.student, recipe.teacher)))
        if weights is not None and weights.suffix.lower() == ".pt2":
            raise ValueError(f"{weights}: torch.export can run code that is in a file: give --trust if it is your own")
    data = recipe.data
    data.setup()
    student: nn.Module
    if weights is not None and weights.suffix.lower() in (".onnx", ".pt2"):
        student = ExportedDetector(weights) if recipe.task == "detection" else Exported(weights)
    else:
        options = weightless(recipe.student.options)
        student = BUILDERS[recipe.task](recipe.student.name, data.num_classes, **options)
        load_weights(student, weights or run / WEIGHTS)
    if not isinstance(student, ExportedDetector):
        check_network(student, data, "student")
    teacher = _teacher(recipe, run / "teacher" / WEIGHTS)
    module = make_task(recipe, student, teacher)
    trainer = machine_trainer(recipe.trainer, logger=False, enable_progress_bar=False)
    trainer.validate(module, data, verbose=False)
    return {"student": module.result, "teacher": module.teacher_result}


class Exported(nn.Module):
    """An exported program as a student: on the CPU and in its own precision, whatever the trainer's."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.run = load_exported(path, "onnx" if path.suffix.lower() == ".onnx" else "pt2")

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits."""
        with torch.autocast("cpu", enabled=False):
            return self.run(images.float().cpu()).to(images.device)


class ExportedDetector(nn.Module):
    """An exported program (.onnx) as a student: on the CPU and in its own precision, whatever the trainer's."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        if path.suffix.lower() != ".onnx":
            raise ValueError(f"{path}: detectors are measured from weights (.safetensors, .ckpt) or .onnx")
        self.find = load_detector(path)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Images (3, H, W) -> detections."""
        found = [(image.device, self.find(image.float().cpu())) for image in images]
        return [{name: value.to(device) for name, value in own.items()} for device, own in found]


def _teacher(recipe: Recipe, trained: Path) -> nn.Module | None:
    """The teacher with its weights; None if the recipe has none, or would have to train it first."""
    weights = trained if recipe.teacher.training.epochs else recipe.teacher.weights
    if recipe.teacher.name is None or weights is None or (weights is trained and not trained.is_file()):
        return None
    return build_teacher(recipe, weights)
