"""How much of the teacher's features the student's channels can say while it trains, by each method.

The share of the variance of the teacher's features, on test images, that is explained by an affine map of all of the
student's channels, fitted on training images (`explained.py`): before training, after a few epochs, and at its end.

    python -m benchmarks alignment-explained [--out runs/alignment_digits] [--seeds 3]
    python -m benchmarks alignment-explained --student narrow_scratch --out runs/transfer --seeds 1

Axes: Cs student channels, Ct teacher channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from benchmarks.alignment_digits import METHODS
from benchmarks.explained import explained, moments, of_all
from benchmarks.transfer import RESULTS, STUDENTS
from matchdistill.distiller import MatchingDistiller
from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.runs.build import build_module
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.train import fit

NAME = "alignment_explained"
EPOCHS = (0, 2, 10)  # measured before these, and at the end
IMAGES = 1000  # that maps are fitted on
ROWS = ("alone", "mgd-amp", "mgd-align", "ofd", "fitnets")
RECIPES = {
    "quickstart": "quickstart",
    "pretrained": "transfer_fashion_mnist",
    "narrow_scratch": "transfer_fashion_mnist_narrow",
}
TITLES = {"quickstart": "Quickstart's digits, 8 channels from scratch", **STUDENTS}
Student = Literal["quickstart", "pretrained", "narrow_scratch"]


def shares(teacher: nn.Module, student: nn.Module, train: Any, test: Any, example: Tensor | None = None) -> list[float]:
    """The share at each position, from shallow to deep, given batches (images, labels) to fit on and to measure on."""
    with torch.random.fork_rng():
        distiller = MatchingDistiller(copy.deepcopy(teacher), copy.deepcopy(student), example=example)
        measured = zip(distiller.positions, moments(distiller, train), moments(distiller, test), strict=True)
        return [explained(of_all(fitted, position.student_channels), each) for position, fitted, each in measured]


class Watch(pl.Callback):
    """Measures a student while it trains.

    Args:
        recipe: a packaged recipe with a teacher.
        teacher: the teacher's weights, a file.
        out: file for what is found: shares by epoch.
    """

    def __init__(self, recipe: str, teacher: str, out: str) -> None:
        with torch.random.fork_rng():
            built = build_module(load_recipe(recipe).with_trained_teacher(Path(teacher))).teacher
        assert built is not None
        self.teacher = built
        self.out, self.found = Path(out), dict[str, list[float]]()

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Before some of the epochs."""
        if trainer.current_epoch in EPOCHS:
            self._measure(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        """After the last epoch."""
        self._measure(trainer, module)
        write_json(self.out, self.found)

    def _measure(self, trainer: pl.Trainer, module: Any) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        loaders = data.refresh_dataloader(IMAGES, 0), data.val_dataloader()
        example = next(iter(loaders[1]))[0][:1]
        self.found[str(trainer.current_epoch)] = shares(self.teacher, module.network(), *loaders, example)


def markdown(results: dict[str, dict[str, dict[str, dict[str, list[float]]]]]) -> str:
    """The tables of `results`: shares by student, method, seed, epoch and position."""
    lines = [
        "# What the student's channels can say of the teacher's features",
        "",
        "`python -m benchmarks alignment-explained`, and with `--student`: the share of the variance, in percent, that an",
        "affine map of all student channels explains on test images, at the positions from shallow to deep. It is the",
        "mean over seeds.",
    ]
    for student, by_method in results.items():
        runs = next(iter(by_method.values()))
        epochs = list(next(iter(runs.values())))
        lines += ["", f"## {TITLES[student]}", "", f"Seeds: {', '.join(runs)}.", ""]
        lines += [f"| method | {' | '.join(f'after {epoch} epochs' for epoch in epochs)} |"]
        lines += [f"|---{'|---' * len(epochs)}|"]
        for method, by_seed in by_method.items():
            means: list[Tensor] = [torch.tensor([run[epoch] for run in by_seed.values()]).mean(0) for epoch in epochs]
            cells = [" / ".join(f"{100 * share:.0f}" for share in mean.tolist()) for mean in means]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(
    out: Path = Path("runs/alignment_digits"),
    seeds: int = 3,
    epochs: int | None = None,
    student: Student = "quickstart",
    methods: Sequence[str] = ROWS,
) -> None:
    """Train a student by each method, and measure it meanwhile.

    Args:
        out: folder of the runs; the teacher of `alignment-digits`, or of `transfer`, is taken.
        seeds: runs of each method.
        epochs: of a student; default: the recipe's.
        student: which one.
        methods: which rows.
    """
    torch.set_num_threads(1)
    recipe, digits = load_recipe(RECIPES[student]), student == "quickstart"
    if epochs is not None:
        recipe = Recipe.of(recipe.config, training__epochs=epochs)
    weights = out / ("digits/teacher" if digits else "teacher") / WEIGHTS
    fit(recipe.for_teacher(), weights.parent, resume=True, quiet=True)
    recipe, path = recipe.with_trained_teacher(weights), RESULTS / f"{NAME}.json"
    results: dict[str, Any] = read_json(path) if path.exists() else {}
    for seed in range(seeds):
        for method in methods:
            folder = out / "explained" / student / method / f"seed{seed}"
            found = folder.with_name(f"seed{seed}.json")
            arguments = {"recipe": RECIPES[student], "teacher": str(weights.resolve()), "out": str(found.resolve())}
            watch = {"class_path": f"{__name__}.Watch", "init_args": arguments}
            # Without an own weight, a method has the one that is best on the transfer recipes.
            changes = METHODS[method] if digits else {"method": METHODS[method]["method"]}
            given = {f"distillation__{key}": value for key, value in changes.items()}
            if not found.exists():
                fit(Recipe.of(recipe.config, seed=seed, trainer__callbacks=[watch], **given), folder, quiet=True)
            by_method = results.setdefault(student, {})
            by_method.setdefault(method, {})[str(seed)] = read_json(found)
            print(student, method, seed, by_method[method][str(seed)], flush=True)
            write_json(path, results)
            atomic_write(path.with_suffix(".md"), lambda to: to.write_text(markdown(results), encoding="utf-8"))
