"""How much of the teacher's features the student's channels can say while it trains, by each method, on digits.

The share of the variance of the teacher's features, on test images, that is explained by an affine map of all of the
student's channels, fitted on training images (`explained.py`): before training, after a few epochs, and at its end.

    python -m benchmarks alignment-explained [--out runs/alignment_digits] [--seeds 3]

Axes: Cs student channels, Ct teacher channels.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from benchmarks.alignment_digits import METHODS, RESULTS
from benchmarks.explained import explained, moments, of_all
from matchdistill.distiller import MatchingDistiller
from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.models import load_weights, small_resnet
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.train import fit

NAME = "alignment_explained"
EPOCHS = (0, 2, 10)  # measured before these, and at the end
IMAGES = 1000  # that maps are fitted on
ROWS = ("alone", "mgd-amp", "mgd-align", "ofd", "fitnets")


def shares(teacher: nn.Module, student: nn.Module, train: Any, test: Any) -> list[float]:
    """The share at each position, from shallow to deep, given batches (images, labels) to fit on and to measure on."""
    with torch.random.fork_rng():
        distiller = MatchingDistiller(copy.deepcopy(teacher), copy.deepcopy(student))
        measured = zip(distiller.positions, moments(distiller, train), moments(distiller, test), strict=True)
        return [explained(of_all(fitted, position.student_channels), each) for position, fitted, each in measured]


class Watch(pl.Callback):
    """Measures a student while it trains.

    Args:
        teacher: weights of the quickstart's teacher.
        out: file for what is found: shares by epoch.
    """

    def __init__(self, teacher: str, out: str) -> None:
        self.teacher = small_resnet(width=32)
        load_weights(self.teacher, teacher)
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
        self.found[str(trainer.current_epoch)] = shares(self.teacher, module.network(), *loaders)


def markdown(results: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """The table of `results`: shares by method, seed, epoch and position."""
    by_method = {method: list(by_seed.values()) for method, by_seed in results.items()}
    epochs = list(next(iter(by_method.values()))[0])
    lines = [
        "# What the student's channels can say of the teacher's features",
        "",
        "`python -m benchmarks alignment-explained`, on the quickstart's digits: the share of the variance, in percent,",
        "that an affine map of all student channels explains on test images, at the three positions from shallow to deep,",
        f"{len(by_method[next(iter(by_method))])} seeds, mean.",
        "",
        f"| method | {' | '.join(f'after {epoch} epochs' for epoch in epochs)} |",
        f"|---{'|---' * len(epochs)}|",
    ]
    for method, runs in by_method.items():
        means: list[Tensor] = [torch.tensor([run[epoch] for run in runs]).mean(0) for epoch in epochs]
        cells = [" / ".join(f"{100 * share:.0f}" for share in mean.tolist()) for mean in means]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(out: Path = Path("runs/alignment_digits"), seeds: int = 3, epochs: int = 40) -> None:
    """Train the quickstart's student by each method, and measure it meanwhile.

    Args:
        out: folder of the runs; the teacher of `alignment-digits` is taken.
        seeds: runs of each method.
        epochs: of a student.
    """
    torch.set_num_threads(1)
    recipe = Recipe.of(load_recipe("quickstart").config, training__epochs=epochs)
    weights = out / "digits" / "teacher" / WEIGHTS
    fit(recipe.for_teacher(), weights.parent, resume=True, quiet=True)
    recipe, results = recipe.with_trained_teacher(weights), dict[str, Any]()
    for seed in range(seeds):
        for method in ROWS:
            folder = out / "explained" / method / f"seed{seed}"
            found = folder.with_name(f"seed{seed}.json")
            arguments = {"teacher": str(weights.resolve()), "out": str(found.resolve())}
            watch = {"class_path": f"{__name__}.Watch", "init_args": arguments}
            changes = {f"distillation__{key}": value for key, value in METHODS[method].items()}
            if not found.exists():
                fit(Recipe.of(recipe.config, seed=seed, trainer__callbacks=[watch], **changes), folder, quiet=True)
            results.setdefault(method, {})[str(seed)] = read_json(found)
            print(method, seed, results[method][str(seed)], flush=True)
        write_json(RESULTS / f"{NAME}.json", results)
        atomic_write(RESULTS / f"{NAME}.md", lambda to: to.write_text(markdown(results), encoding="utf-8"))
