"""What distilling without labels is worth to a student that is then fine-tuned on few labels.

The students of the recipes features_fashion_mnist and features_fashion_mnist_narrow learn the features of a fine-tuned
EfficientNet-Lite2 by each method, are then fine-tuned as transfer_fashion_mnist has it, and stand beside the same students
fine-tuned right away. Everything is smaller than in the recipes, by `Scale`, so that two cores suffice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.runs.metrics import RunMetrics
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.summary import summarise
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.module import ACCURACIES
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.neighbours import KNN, PROBE

RESULTS = Path(__file__).parent / "results"
PEER = "features_lightly_train.json"  # what `benchmarks.peers.lightly_train` writes
ALONE = "none"
METHODS = ("mgd-amp", "mgd-align", "fitnets", "ofd")
STUDENTS = {
    "pretrained": "EfficientNet-Lite0, pre-trained on ImageNet",
    "narrow": "a third of its width, from scratch",
}
LABELS = {100: 10, 300: 5, 1000: 2}  # images with labels: epochs of fine-tuning
TOP1 = ACCURACIES[0]


@dataclass(frozen=True)
class Scale:
    """How much smaller the runs are than the recipes.

    Attributes:
        size: height and width of the images in pixels.
        images: without labels; the recipes have 30,000.
        epochs: of distilling.
        teacher_epochs: of fine-tuning the teacher on 5,000 images.
        bank: images with labels by which students are measured after distilling.
        val: validation images.
        refresh: images of a refresh of the matching.
    """

    size: int = 32
    images: int = 3000
    epochs: int = 1
    teacher_epochs: int = 2
    bank: int = 500
    val: int = 1000
    refresh: int = 500


def run(out: Path = Path("runs/features"), seeds: int = 3, scale: Scale = Scale()) -> None:
    """Distil without labels, fine-tune on few labels, and write the tables; goes on where it was cut.

    Args:
        out: folder of the runs.
        seeds: how many.
        scale: how much smaller than the recipes the runs are.
    """
    torch.set_num_threads(1)
    teacher = out / "teacher"
    epochs = f"--teacher.training.epochs={scale.teacher_epochs}"
    fit(_recipe("transfer_fashion_mnist", scale, epochs).for_teacher(), teacher, resume=True)
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        for student in STUDENTS:
            for method in (ALONE, *METHODS):
                folder = out / student / method / f"seed{seed}"
                # Without distilling nothing is trained: the student is measured as it begins.
                distilled = fit(distilling(student, method, seed, teacher / WEIGHTS, scale), folder, resume=True)
                weights = None if method == ALONE else folder / WEIGHTS
                for labels in LABELS:
                    tuned = fit(tuning(student, labels, seed, weights, scale), folder / f"labels{labels}", resume=True)
                    found.append(
                        {
                            "student": student,
                            "method": method,
                            "seed": seed,
                            "labels": labels,
                            "top1": tuned.student["top1"],
                            **distilled.student,
                            "teacher": distilled.teacher,
                            "seconds": [distilled.seconds, tuned.seconds],
                        }
                    )
                write(
                    {
                        "command": "python -m benchmarks features",
                        "machine": machine("cpu"),
                        "scale": asdict(scale),
                        "runs": found,
                    }
                )


def _recipe(name: str, scale: Scale, *arguments: str) -> Recipe:
    """A recipe at a scale's size."""
    config = load_recipe(name).config
    roles = [role for role in ("teacher", "student") if "image_size" in config[role]["options"]]
    options = [f"--{role}.options.image_size={scale.size}" for role in roles]
    given = [
        f"--data.image_size={scale.size}",
        f"--data.val_part=[3000, {3000 + scale.val}]",
        "--trainer.accelerator=cpu",
    ]
    return load_recipe(name, *given, *options, *arguments)


def distilling(student: str, method: str, seed: int, teacher: Path, scale: Scale) -> Recipe:
    """What distils a student by a method."""
    return _recipe(
        "features_fashion_mnist" + "_narrow" * (student == "narrow"),
        scale,
        f"--seed={seed}",
        f"--distillation.method={method}",
        f"--distillation.refresh_images={scale.refresh}",
        f"--teacher.weights={teacher.resolve()}",
        f"--data.train_limit={scale.images}",
        f"--data.bank_limit={scale.bank}",
        f"--training.epochs={scale.epochs}",
        "--training.warmup_epochs=0",
        "--training.warmup_steps=10",
    )


def tuning(student: str, labels: int, seed: int, weights: Path | None, scale: Scale) -> Recipe:
    """What fine-tunes a student, be it from a file of weights."""
    return _recipe(
        "transfer_fashion_mnist" + "_narrow" * (student == "narrow"),
        scale,
        f"--seed={seed}",
        "--distillation.method=none",
        "--teacher.training.epochs=0",
        f"--data.train_limit={labels}",
        f"--training.epochs={LABELS[labels]}",
        "--student.fresh_head=true",
        *([] if weights is None else [f"--student.weights={weights.resolve()}"]),
    )


def write(results: dict[str, Any]) -> None:
    """Keep results as JSON, and their tables, of the peer too."""
    write_json(RESULTS / "features.json", results)
    if (RESULTS / PEER).exists():
        results = {**results, "runs": results["runs"] + read_json(RESULTS / PEER)["runs"]}
    atomic_write(RESULTS / "features.md", lambda path: path.write_text(markdown(results)))


def markdown(results: dict[str, Any]) -> str:
    """The tables of results."""
    scale, own = results["scale"], results["machine"]
    teacher = next((run["teacher"] for run in results["runs"] if "teacher" in run), {})
    about = (
        f"Images of {scale['size']} px. The teacher, EfficientNet-Lite2, was pre-trained on ImageNet and fine-tuned on "
        f"5,000 images with labels (epochs: {scale['teacher_epochs']}, and one to warm up). Students learn its features on "
        f"{scale['images']:,} other images without labels (epochs: {scale['epochs']}), and are then fine-tuned on yet "
        "others with labels (epochs, and one to warm up: "
        + ", ".join(f"{epochs} on {labels:,} images" for labels, epochs in LABELS.items())
        + f"). Accuracy in percent on {scale['val']:,} test images, ± half of the 95% interval over "
        "the seeds (none: a single seed), each with images of its own; differences to the same student without distilling "
        "are paired by seed."
    )
    lines = [
        "# Distilling without labels",
        "",
        f"`{results['command']}`; {own['cpu']}, {own['threads']} thread, torch {own['torch']}.",
        "",
        about,
    ]
    if teacher:
        lines += ["", f"The teacher: {', '.join(f'{m.label} {100 * teacher[m.name]:.2f}' for m in (KNN, PROBE))}."]
    for student, title in STUDENTS.items():
        runs = [run for run in results["runs"] if run["student"] == student]
        if runs:
            lines += ["", f"## {title[0].upper()}{title[1:]}", "", *_table(runs)]
    return "\n".join(lines) + "\n"


def _table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """The table of one student."""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    columns = [*(f"{labels:,} labels | to {ALONE}" for labels in LABELS), KNN.label, PROBE.label]
    yield f"| method | seeds | {' | '.join(columns)} |"
    yield "|" + "---|" * (len(LABELS) * 2 + 4)
    for method in methods:
        own = [run for run in runs if run["method"] == method]
        cells = [cell for labels in LABELS for cell in _cells(runs, method, labels, TOP1)]
        cells += [_cells(own, method, max(LABELS), metric)[0] for metric in (KNN, PROBE)]
        yield f"| {method} | {len({run['seed'] for run in own})} | {' | '.join(cells)} |"


def _cells(runs: list[dict[str, Any]], method: str, labels: int, metric: Metric) -> list[str]:
    """Mean and difference of a method, empty where it has none."""
    chosen = [run for run in runs if run["labels"] == labels and metric.name in run]
    if not any(run["method"] == method for run in chosen):
        return ["", ""]
    as_metrics = [
        RunMetrics("classification", run["method"], run["seed"], 0, {metric.name: run[metric.name]}, {}, {}, [], 0.0)
        for run in chosen
    ]
    return summarise(as_metrics, [method], ALONE, metric)[0].cells(metric)[:2]
