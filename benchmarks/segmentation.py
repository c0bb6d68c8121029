"""The segmentation benchmark: the recipe segmentation_scenes from backbones that are pre-trained on ImageNet.

DeepLabV3 over EfficientNet-Lite2 learns from 1,000 scenes of Fashion-MNIST items, LR-ASPP over Lite0 from 150 others, alone
and by MGD-AMP. Interrupted, the same command goes on with what is missing.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.detection import PRETRAINED, for_timm
from benchmarks.harness import machine
from matchdistill.data.scenes import write_scenes
from matchdistill.files import atomic_write, write_json
from matchdistill.messages import console
from matchdistill.runs.compare import compare
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.summary import Mean, summarise
from matchdistill.runs.train import fit
from matchdistill.tasks.segmentation.module import OF_CLASS, PIXELS

RESULTS = Path(__file__).parent / "results"
METHODS = ["none", "mgd-amp"]
SIZE = 96  # pixels
SCENES = 1150, 150  # for training and validation
MEASURED = {metric.name: metric for metric in PIXELS}


def recipe(scenes: Path, weights: dict[str, Path]) -> Recipe:
    """The packaged recipe on the scenes, over pre-trained backbones."""
    changed: dict[str, Any] = {
        "data.root": scenes,
        "teacher.options.backbone_weights": weights["lite2"],
        "student.options.backbone_weights": weights["lite0"],
        "trainer.accelerator": "cpu",
    }
    return load_recipe("segmentation_scenes", *(f"--{key}={value}" for key, value in changed.items()))


def markdown(results: dict[str, Any]) -> str:
    """The tables of `results`."""
    described, seeds = results["machine"], len({run["seed"] for run in results["runs"]})
    lines = [
        "# The segmentation benchmark",
        "",
        f"`{results['command']}`; {described['cpu']}, {described['threads']} thread, torch {described['torch']}.",
        f"In percent on {SCENES[1]} validation scenes of {SIZE} px, {seeds} seeds, ± half of the 95% interval over seeds;",
        "differences are paired by seed. One weight of the loss, 0.1, was used; none was chosen by these images.",
        "",
        f"| | {' | '.join(f'{metric.label} | to none' for metric in PIXELS)} |",
        "|---" * (2 * len(PIXELS) + 1) + "|",
    ]
    teacher = [cell for metric in PIXELS for cell in (f"{100 * results['teacher'][metric.name]:.2f}", "")]
    lines.append(f"| teacher | {' | '.join(teacher)} |")
    for method in METHODS:
        cells = [
            cell
            for metric in PIXELS
            for entry in results["summary"][metric.name]
            if entry["method"] == method
            for cell in (shown(entry[metric.name], metric.name), shown(entry["difference"], metric.name, "+"))
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += [
        "",
        "IoU by class, means over the seeds:",
        "",
        "| class | teacher | none | mgd-amp |",
        "|---|---|---|---|",
    ]
    for name in (key for key in results["teacher"] if key.startswith(OF_CLASS)):
        means = [_mean_of(results["runs"], method, name) for method in METHODS]
        values = " | ".join(f"{100 * value:.1f}" for value in (results["teacher"][name], *means))
        lines.append(f"| {name.removeprefix(OF_CLASS)} | {values} |")
    return "\n".join(lines) + "\n"


def _mean_of(runs: list[dict[str, Any]], method: str, name: str) -> float:
    values = [run["student"][name] for run in runs if run["method"] == method]
    return sum(values) / len(values)


def shown(mean: dict[str, Any] | None, metric: str, sign: str = "") -> str:
    """A `Mean` of `results` for a table, empty where there is none."""
    return "" if mean is None else Mean(**mean).shown(MEASURED[metric], sign)


def run(out: Path = Path("runs/segmentation"), seeds: int = 3, jobs: int = 1) -> None:
    """DeepLabV3 over Lite2 teaches LR-ASPP over Lite0, on scenes: alone against MGD-AMP.

    Args:
        out: folder of the runs.
        seeds: runs of each method.
        jobs: runs at a time.
    """
    torch.set_num_threads(1)
    if not (scenes := out / "scenes").exists():
        write_scenes(scenes, *SCENES, SIZE)
    given = recipe(scenes, {name: for_timm(name, out) for name in PRETRAINED})
    fit(given.for_teacher(), out / "teacher", resume=True)
    trained = given.with_trained_teacher(out / "teacher" / WEIGHTS)
    runs = compare(trained, out / "students", METHODS, seeds, jobs, console()).runs
    results = {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": machine("cpu"),
        "teacher": next(each.teacher for each in runs if each.teacher),
        "summary": {
            name: [entry.plain(metric) for entry in summarise(runs, METHODS, metric=metric)]
            for name, metric in MEASURED.items()
        },
        "runs": [{key: each.plain()[key] for key in ("method", "seed", "student", "seconds")} for each in runs],
        "recipe": json.loads(json.dumps(trained.config).replace(f"{out.resolve()}/", "").replace(f"{out}/", "")),
    }
    write_json(RESULTS / "segmentation.json", results)
    atomic_write(RESULTS / "segmentation.md", lambda path: path.write_text(markdown(results), encoding="utf-8"))
