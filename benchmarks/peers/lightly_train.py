"""lightly-train in the place of the methods of `python -m benchmarks features`: its default method of distilling.

Teacher, student, images without labels, their size, epochs and batch are the same, and so is the fine-tuning. Learning rate,
augmentation and loss are the package's own. It needs an environment with both packages, and the teacher that the benchmark
has trained into the same folder:

    pip install lightly-train . '.[transfer]'
    python -m benchmarks.peers.lightly_train --out runs/features --students pretrained --seeds 0
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightly_train
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.features import LABELS, PEER, RESULTS, STUDENTS, Scale, distilling, tuning
from matchdistill.files import read_json, write_json
from matchdistill.runs.build import build_teacher
from matchdistill.runs.recipe import Recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.train import fit
from matchdistill.runs.validate import validate
from matchdistill.tasks import TASKS

METHOD = "lightly-train"
COMMAND = "python -m benchmarks.peers.lightly_train"


class Wrapped(nn.Module):
    """An EfficientNet-Lite as lightly-train wants a model: its last map (N, C, h, w), and the mean of that.

    Args:
        network: the EfficientNet-Lite.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.network.extract_features(images)}  # type: ignore[operator]

    def forward_pool(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"pooled_features": found["features"].mean((2, 3), keepdim=True)}

    def feature_dim(self) -> int:
        return int(self.network._fc.in_features)  # type: ignore[union-attr, arg-type]

    def get_model(self) -> nn.Module:
        return self.network

    def architecture_info(self) -> dict[str, str]:
        return {"model_type": "convolutional", "norm_type": "batchnorm"}


def write_images(recipe: Recipe, folder: Path) -> None:
    """The training images of a recipe as files."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe.data.setup()
    for number, image in enumerate(recipe.data.train_set.data.images):
        Image.fromarray(image.numpy()).convert("RGB").save(folder / f"{number}.png")


def distil(recipe: Recipe, teacher: Path, images: Path, out: Path) -> float:
    """Train a student of a recipe by lightly-train; returns the seconds."""
    torch.manual_seed(recipe.seed)
    recipe.data.setup()
    student = TASKS[recipe.task].build(recipe.student, None)
    started = time.monotonic()
    lightly_train.pretrain(
        out=out,
        data=images,
        model=Wrapped(student),
        method="distillation",
        method_args={"teacher": Wrapped(build_teacher(recipe, teacher).eval())},
        epochs=recipe.training.epochs,
        batch_size=recipe.data.options.batch_size,
        num_workers=0,
        accelerator="cpu",
        devices=1,
        seed=recipe.seed,
        transform_args={"image_size": (recipe.data.image_size, recipe.data.image_size)},
        overwrite=True,
    )
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/features"))
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    scale, teacher = Scale(), options.out / "teacher" / WEIGHTS
    kept: list[dict[str, Any]] = read_json(RESULTS / PEER)["runs"] if (RESULTS / PEER).exists() else []
    for seed in options.seeds:
        for student in options.students:
            recipe = distilling(student, "mgd-amp", seed, teacher, scale)  # for its data and networks
            folder = options.out / student / METHOD / f"seed{seed}"
            exported, images = folder / "distilled" / "exported_models" / "exported_last.pt", folder / "images"
            seconds = 0.0
            if not exported.exists():
                write_images(recipe, images)
                seconds = distil(recipe, teacher, images, folder / "distilled")
            measured = validate(recipe, folder, exported, trust=True)["student"]
            for labels in LABELS:
                tuned = fit(tuning(student, labels, seed, exported, scale), folder / f"labels{labels}", resume=True)
                row = {
                    "student": student,
                    "method": METHOD,
                    "seed": seed,
                    "labels": labels,
                    "top1": tuned.student["top1"],
                }
                kept = [each for each in kept if any(each[key] != row[key] for key in list(row)[:4])]
                kept.append({**row, **measured, "seconds": [round(seconds, 1), tuned.seconds]})
                about = {
                    "command": COMMAND,
                    "package": f"lightly-train {lightly_train.__version__}",
                    "scale": asdict(scale),
                }
                write_json(RESULTS / PEER, {**about, "runs": kept})


if __name__ == "__main__":
    main()
