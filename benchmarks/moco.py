"""MoCo-v2 alone and with MGD, small: Fashion-MNIST without its labels, which serve to measure alone.

The teacher learns by MoCo-v2 from 5,000 images, then the student from 3,000 others: alone, and by MGD-AMP with the weight
that equals the paper's at 224 px. Images have 16 px, for which the networks are made. Interrupted, the same command goes on
with what is missing.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from matchdistill.files import atomic_write, write_json
from matchdistill.messages import console
from matchdistill.runs.compare import compare
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.summary import Mean, summarise
from matchdistill.runs.train import fit
from matchdistill.tasks.neighbours import BY_LABELS

RESULTS = Path(__file__).parent / "results"
MEASURED = {metric.name: metric for metric in BY_LABELS}
METHODS = ["none", "mgd-amp"]
NETWORK = "matchdistill.models:small_resnet"
EPOCHS = 8
CHANGED: dict[str, Any] = {
    "data.name": "fashion-mnist",
    "data.root": "null",
    "data.workers": 0,
    "data.image_size": 16,
    "data.batch_size": 64,
    "data.train_part": [10_000, 13_000],
    "data.val_limit": 2000,
    "data.bank_limit": "null",
    "teacher.name": NETWORK,
    "teacher.weights": "null",
    "teacher.options": {"width": 24},
    "teacher.train_part": [0, 5000],
    "student.name": NETWORK,
    "student.options": {"width": 8},
    "objective.queue": 2048,
    "objective.momentum": 0.99,  # 0.999 would leave the key encoder near its start in 400 steps
    "distillation.weights": {"mgd": 2.5},  # of means: equals the paper's form for ResNet-18 at 224 px
    "distillation.refresh_every": [0, 1, 2, 3, 6],
    "distillation.refresh_images": 2000,
    "trainer.accelerator": "cpu",
    "trainer.loggers": ["csv"],
}
TRAINING: dict[str, Any] = {
    "epochs": EPOCHS,
    "lr": 0.06,
    "momentum": 0.9,
    "nesterov": "false",
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "warmup_steps": 60,
    "validate_every": EPOCHS,
}


def small() -> Recipe:
    """The recipe of MoCo-v2 with MGD at the size of a core and half an hour."""
    changed = CHANGED | {
        f"{prefix}training.{key}": value for prefix in ("", "teacher.") for key, value in TRAINING.items()
    }
    return load_recipe("moco_resnet50_resnet18", *(f"--{key}={value}" for key, value in changed.items()))


def markdown(results: dict[str, Any]) -> str:
    """The table of `results`."""
    lines = [
        "# MoCo-v2 alone and with MGD",
        "",
        f"`{results['command']}`; {len({run['seed'] for run in results['runs']})} seeds; {results['machine']}.",
        "Accuracy in percent on 2,000 test images of Fashion-MNIST, ± half of the 95% interval over seeds; differences are",
        "paired by seed. The features are frozen, the training images are the neighbours and train the probe.",
        "",
        f"| | {' | '.join(f'{metric.label} | to none' for metric in BY_LABELS)} |",
        f"|{'---|' * (1 + 2 * len(BY_LABELS))}",
        f"| teacher | {' |  | '.join(metric.shown(results['teacher'][name]) for name, metric in MEASURED.items())} | |",
    ]
    for method in METHODS:
        cells = [
            cell
            for name in MEASURED
            for entry in results["summary"][name]
            if entry["method"] == method
            for cell in (shown(entry[name], name), shown(entry["difference"], name, "+"))
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(mean: dict[str, Any] | None, metric: str, sign: str = "") -> str:
    """A `Mean` of `results` for a table, empty where there is none."""
    return "" if mean is None else Mean(**mean).shown(MEASURED[metric], sign)


def run(out: Path = Path("runs/moco"), seeds: int = 3, jobs: int = 1) -> None:
    """MoCo-v2 alone and with MGD on small images: k-NN and a linear probe.

    Args:
        out: where the runs are kept.
        seeds: runs of each method.
        jobs: runs at a time.
    """
    recipe = small()
    torch.set_num_threads(1)
    fit(recipe.for_teacher(), out / "teacher", resume=(out / "teacher").exists())
    recipe = recipe.with_trained_teacher(out / "teacher" / WEIGHTS)
    torch.set_num_threads(jobs)  # which compare divides
    runs = compare(recipe, out / "students", METHODS, seeds, jobs, console()).runs
    recipe.config["teacher"]["weights"] = "the benchmark's own"  # not this machine's path
    results = {
        "command": "python -m benchmarks moco",
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, one thread per run",
        "teacher": next(run.teacher for run in runs if run.teacher),
        "summary": {
            name: [entry.plain(metric) for entry in summarise(runs, METHODS, metric=metric)]
            for name, metric in MEASURED.items()
        },
        "runs": [{key: run.plain()[key] for key in ("method", "seed", "student", "seconds")} for run in runs],
        "recipe": recipe.config,
    }
    write_json(RESULTS / "moco.json", results)
    atomic_write(RESULTS / "moco.md", lambda path: path.write_text(markdown(results)))
    print(markdown(results))
