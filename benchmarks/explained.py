"""How much of a teacher's features its student's channels can say: each by one channel, or all together.

Before any training of the student: the share of the variance of the teacher's features, on test images, that is explained
by an affine map fitted on training images. The map is of one channel, matched or at random, which is what the student-side
norm of MGD can do; or of all student channels, which is the adapter of FitNets and OFD. For the pre-trained student of
transfer_fashion_mnist, whose groups have one channel.

    python benchmarks/explained.py --set teacher.weights=runs/transfer/teacher/student.safetensors teacher.training.epochs=0

Axes: Cs student channels, Ct teacher channels, M samples (images and positions).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from matchdistill.distiller import MatchingDistiller
from matchdistill.features import FeatureDistiller
from matchdistill.files import write_json
from matchdistill.functional import random_assignment
from matchdistill.probing import evaluating
from matchdistill.runs.build import build_module
from matchdistill.runs.recipe import load_recipe

RIDGE = 1e-3  # of the mean variance: the map of 1,280 channels has few samples


def moments(distiller: FeatureDistiller, loader: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """For each position the mean products (Cs + 1 + Ct) squared of student channels, 1 and teacher channels."""
    sums: list[Tensor] = [torch.zeros(()) for _ in distiller.positions]
    with torch.no_grad(), evaluating(distiller.student):
        for images, _ in loader:
            with distiller.capture() as captured:
                distiller.student(images)
            teacher = distiller._teacher(captured)
            for number, position in enumerate(distiller.positions):
                maps = position.maps(captured.values[number], teacher[number])
                student, target = (each.movedim(1, -1).flatten(0, -2).double() for each in maps)  # (M, C)
                values = torch.cat([student, torch.ones(len(student), 1, dtype=torch.float64), target], 1)
                sums[number] = sums[number] + values.T @ values
    return [
        total / total[position.student_channels, position.student_channels]
        for total, position in zip(sums, distiller.positions, strict=True)
    ]


def one_to_one(fitted: Tensor, index: Tensor) -> Tensor:
    """The affine map (Cs + 1, Ct) that gives every teacher channel of an index (Cs,) by its student channel alone."""
    inputs = len(index) + 1
    weights = torch.zeros_like(fitted[:inputs, inputs:])
    for student, teacher in enumerate(index.tolist()):
        own = [student, inputs - 1]
        weights[own, teacher] = torch.linalg.solve(fitted[own][:, own], fitted[own, inputs + teacher])
    return weights


def of_all(fitted: Tensor, student_channels: int) -> Tensor:
    """The affine map (Cs + 1, Ct) of all student channels, by ridge regression."""
    inputs = student_channels + 1
    within = fitted[:inputs, :inputs]
    ridge = RIDGE * within.diagonal().mean() * torch.eye(inputs, dtype=within.dtype)
    return torch.linalg.solve(within + ridge, fitted[:inputs, inputs:])


def explained(weights: Tensor, test: Tensor) -> float:
    """Share of the variance that a map (Cs + 1, Ct) explains, of mean products as `moments` gives them."""
    inputs = len(weights)
    within, across, target = test[:inputs, :inputs], test[:inputs, inputs:], test[inputs:, inputs:]
    error = target.trace() - 2 * (weights * across).sum() + (weights * (within @ weights)).sum()
    variance = target.trace() - across[-1].square().sum()  # the row before the last of the student side is that of 1
    return float(1 - error / variance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="*", default=[], help="options of the recipe, --set KEY=VALUE ...")
    options = parser.parse_args()
    given = ["--data.train_limit=null", "--data.train_part=[5000, 11000]", "--data.val_part=[0, 3000]"]
    recipe = load_recipe("transfer_fashion_mnist", *given, *(f"--{each}" for each in options.set))
    recipe.data.options.augment = False
    distiller = build_module(recipe).distiller
    assert isinstance(distiller, MatchingDistiller)
    loader = recipe.data.refresh_dataloader(6000, 0)
    distiller.refresh(loader, 6000)
    results = []
    train, test = moments(distiller, loader), moments(distiller, recipe.data.val_dataloader())
    for position, fitted, held_out in zip(distiller.positions, train, test, strict=True):
        assert position.matching is not None
        maps = {
            "random": one_to_one(fitted, random_assignment(position.matching.cost)[:, 0]),
            "matched": one_to_one(fitted, position.index[:, 0]),
            "all": of_all(fitted, position.student_channels),
        }
        shares = {name: explained(weights, held_out) for name, weights in maps.items()}
        results.append({"position": position.name, "channels": position.student_channels, **shares})
        print(results[-1], flush=True)
    write_json(Path(__file__).parent / "results" / "explained.json", results)


if __name__ == "__main__":
    main()
