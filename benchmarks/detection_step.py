"""What a step of a distilled detector costs, beside the student's own step and the teacher's backbone.

The networks of the recipes coco_retinanet_r50_r18_1x and coco_maskrcnn_r50_r18_1x, untrained, on random images of two sizes,
so that there is padding. The three are timed in turn, in one process; the ratio is the median over the rounds of
distilled / (alone + teacher), whose target is 1.05.

    python -m benchmarks.detection_step --size 320 --batch 2 --rounds 15
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import interleaved
from matchdistill.data.scenes import write_scenes
from matchdistill.files import write_json
from matchdistill.runs.build import build_module
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.tasks.detection.parts import distilled_part, padded_batches
from matchdistill.tasks.module import DistilledModule

RECIPES = ("coco_retinanet_r50_r18_1x", "coco_maskrcnn_r50_r18_1x")
TARGET = 1.05


def batch_of(size: int, count: int, classes: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Random images (3, H, W) of two widths and the same eight objects on each of them."""
    images = [torch.rand(3, size, size * (3 + number % 2) // 4) for number in range(count)]
    corners = torch.rand(8, 2) * size / 4
    boxes = torch.cat([corners, corners + size / 8 + torch.rand(8, 2) * size / 4], 1)
    targets = []
    for image in images:
        masks = torch.zeros(8, *image.shape[1:], dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": boxes, "labels": torch.arange(8) % classes + 1, "masks": masks})
    return images, targets


def stepper(module: DistilledModule, batch: Any) -> Callable[[], None]:
    """A step of training: forward, backward, optimiser."""
    optimizer = torch.optim.SGD((value for value in module.parameters() if value.requires_grad), lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(module.batch_losses(batch).values())).sum().backward()
        optimizer.step()

    return step


def measure(recipe: Recipe, size: int, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of the three by round, and their ratio."""
    alone = build_module(Recipe.of(recipe.config, distillation__method="none")).train()
    distilled = build_module(recipe).train()
    batch = batch_of(size, count, recipe.data.num_classes)
    distilled.refresh([batch])  # type: ignore[arg-type]
    teacher = distilled.teacher
    assert teacher is not None
    with padded_batches(distilled.network()) as padded:
        distilled.batch_losses(batch)
    body: nn.Module = distilled_part(teacher, pyramid=False)

    @torch.inference_mode()
    def forward() -> None:
        body(padded[0].tensors)

    works = {"alone": stepper(alone, batch), "teacher": forward, "distilled": stepper(distilled, batch)}
    seconds = interleaved(works, rounds)
    ratios = [own / (a + t) for a, t, own in zip(*seconds.values(), strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": medians, "ratio": statistics.median(ratios), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=320, help="pixels of the shorter side")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    machine = f"{torch.get_num_threads()} threads ({platform.machine()}), torch {torch.__version__}"
    results: dict[str, Any] = {**vars(options), "machine": machine, "target": TARGET, "detectors": {}}
    plain = [f"--{role}.options.backbone_weights=null" for role in ("student", "teacher")]
    sizes = [f"--{role}.options.min_size={options.size}" for role in ("student", "teacher")]
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder, "scenes"), 1, 1, 64)  # only for the number of classes
        for name in RECIPES:
            recipe = load_recipe(name, f"--data.root={folder}/scenes", "--data.batch_size=1", *plain, *sizes)
            found = measure(recipe, options.size, options.batch, options.rounds)
            print(f"{name}: {found['ratio']:.3f} of alone + teacher; seconds {found['seconds']}", flush=True)
            results["detectors"][name] = found
    write_json(Path(__file__).parent / "results" / "detection_step.json", results)


if __name__ == "__main__":
    main()
