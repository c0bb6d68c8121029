"""What makes the matching of a pre-trained student better: one change at a time on a transfer recipe.

A variant is a change of the recipe, a patch of the code, or both. Accuracies are of the first 3,000 test images, which the
recipe itself does not report, unless data.val_part says otherwise. Runs of one seed have the same student and images, so
that differences are paired by seed; ± is half of their 95% interval, without which there is a single seed.

    python benchmarks/transfer_study.py --out runs/study --seeds 100 101 102 --jobs 2 [-- VARIANT ...]

Axes: Cs student channels, Ct teacher channels, G group, * position axes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from matchdistill.distiller import MatchingDistiller
from matchdistill.files import atomic_write, write_json
from matchdistill.matched import MatchedPosition
from matchdistill.position import FeaturePosition
from matchdistill.runs.metrics import RunMetrics, read_metrics
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.summary import summarise
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.module import ACCURACIES, ClassificationModule

Patch = Callable[[], None]
DIVERGED = "diverged.json"
BASE = "every 2"  # what the others are compared with: MGD as the recipe has it


def averaged(memory: float) -> Patch:
    """Costs are averaged over the refreshes, exponentially."""

    def patch() -> None:
        solve = MatchedPosition.solve

        def wrapped(self: MatchedPosition, sums: Any) -> Any:
            cost = sums.compute()
            before = self.__dict__.get("average", cost)
            self.__dict__["average"] = average = memory * before + (1 - memory) * cost
            sums.compute = lambda: average
            return solve(self, sums)

        MatchedPosition.solve = wrapped

    return patch


def matched_on(
    change: Callable[[MatchedPosition, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Patch:
    """The costs, not the loss, are of changed features (student, teacher)."""

    def patch() -> None:
        maps = MatchedPosition.maps

        def wrapped(self: MatchedPosition, student: torch.Tensor, teacher: torch.Tensor) -> Any:
            values = maps(self, student, teacher)
            return values if torch.is_grad_enabled() else change(self, *values)  # a refresh has no gradients

        MatchedPosition.maps = wrapped

    return patch


def normalised(position: MatchedPosition, student: torch.Tensor, teacher: torch.Tensor) -> Any:
    """The student's features as the loss sees them."""
    norm = position.norm
    return F.batch_norm(student, None, None, norm.weight, norm.bias, training=True), teacher


def centred(position: MatchedPosition, student: torch.Tensor, teacher: torch.Tensor) -> Any:
    """Each map without its mean: the cosine is the correlation within an image."""
    return tuple(values - values.mean((2, 3), keepdim=True) for values in (student, teacher))


def rectified(position: MatchedPosition, student: torch.Tensor, teacher: torch.Tensor) -> Any:
    """Behind the activation."""
    return student.relu(), teacher.relu()


def measured_margins() -> None:
    """Margins are measured, whatever batch norms there are."""
    FeaturePosition.margin_norm = property(lambda self: None)


def decaying(shape: Callable[[float], float]) -> Patch:
    """The weight of the features' loss follows the share of the training that is done."""

    def patch() -> None:
        losses = ClassificationModule.losses

        def wrapped(self: ClassificationModule, images: torch.Tensor) -> Any:
            output, found = losses(self, images)
            done = self.global_step / self.trainer.estimated_stepping_batches
            return output, {n: v * shape(done) if n == "features" else v for n, v in found.items()}

        ClassificationModule.losses = wrapped

    return patch


def norm_like_teacher() -> None:
    """The student-side norm starts with the scale and shift of the matched teacher channels."""
    refresh = MatchingDistiller.refresh

    def wrapped(self: MatchingDistiller, *args: Any, **kwargs: Any) -> Any:
        first = not self.has_matching
        matchings = refresh(self, *args, **kwargs)
        for position in self.positions if first else ():
            norm = position._margin_norm[1]
            with torch.no_grad():
                position.norm.weight.copy_(norm.weight.abs()[position.index].mean(1))
                position.norm.bias.copy_(norm.bias[position.index].mean(1))
        return matchings

    MatchingDistiller.refresh = wrapped


def mgd(**changes: Any) -> dict[str, Any]:
    return {"method": "mgd-amp", **changes}


VARIANTS: dict[str, tuple[dict[str, Any], Patch | None]] = {
    "none": ({"method": "none"}, None),
    **{
        f"kd {t:g} {w:g}": ({"method": "kd", "kd_temperature": t, "weights__kd": w}, None)
        for t in (1.5, 4.0)
        for w in (0.3, 1.0)
    },
    **{f"fitnets {w:g}": ({"method": "fitnets", "weights__fitnets": w}, None) for w in (1.0, 3.0, 10.0, 30.0, 100.0)},
    **{f"at {w:g}": ({"method": "at", "weights__at": w}, None) for w in (0.1, 1.0, 10.0, 100.0)},
    **{f"ofd {w:g}": ({"method": "ofd", "weights__ofd": w}, None) for w in (1.0, 5.0, 20.0, 80.0)},
    "every 2": (mgd(), None),
    "random": ({"method": "random-amp"}, None),
    **{f"weight {w:g}": (mgd(weights__mgd=w), None) for w in (1.0, 2.0, 10.0, 20.0)},
    "weights doubling": (mgd(weights__mgd=[0.625, 1.25, 2.5, 5.0]), None),
    "last two": (mgd(weights__mgd=[0.0, 0.0, 5.0, 5.0]), None),
    "last": (mgd(weights__mgd=[0.0, 0.0, 0.0, 5.0]), None),
    "once": (mgd(refresh_every=0), None),
    "every 1": (mgd(refresh_every=1), None),
    "log": (mgd(refresh_every=[0, 1, 3]), None),
    "online 2": (mgd(refresh_online=2), None),
    "tolerance 0.001": (mgd(refresh_tolerance=0.001), None),
    **{f"hysteresis {h:g}": (mgd(hysteresis=h), None) for h in (0.1, 0.3, 0.6)},
    "averaged 0.5": (mgd(), averaged(0.5)),
    "averaged 0.9": (mgd(), averaged(0.9)),
    "normalised": (mgd(), matched_on(normalised)),
    "centred": (mgd(), matched_on(centred)),
    "rectified": (mgd(), matched_on(rectified)),
    "centred once": (mgd(refresh_every=0), matched_on(centred)),
    "rectified once": (mgd(refresh_every=0), matched_on(rectified)),
    "measured margins": (mgd(), measured_margins),
    "linear decay": (mgd(), decaying(lambda done: 1 - done)),
    "linear decay of 10": (mgd(weights__mgd=10.0), decaying(lambda done: 1 - done)),
    "first half": (mgd(), decaying(lambda done: float(done < 0.5))),
    "norm like teacher": (mgd(), norm_like_teacher),
    "norm like teacher, once": (mgd(refresh_every=0), norm_like_teacher),
    **{f"norm like teacher {w:g}": (mgd(weights__mgd=w), norm_like_teacher) for w in (0.5, 1.0, 2.0)},
    "norm like teacher, linear decay": (mgd(), lambda: (norm_like_teacher(), decaying(lambda done: 1 - done)())),
}


def run(config: dict[str, Any], variant: str, seed: int, out: Path) -> RunMetrics:
    """One run of a variant."""
    torch.set_num_threads(1)
    changes, patch = VARIANTS[variant]
    recipe = Recipe.of(config, seed=seed, **{f"distillation__{key}": value for key, value in changes.items()})
    if patch is not None:
        patch()
    return fit(recipe, folder_of(out, variant, seed), resume=True, quiet=True)


def main(program: str = "python benchmarks/transfer_study.py", about: str = __doc__ or "") -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--recipe", default="transfer_fashion_mnist")
    parser.add_argument("--name", help="of the results; default: the recipe's")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="*", default=[], help="further options of the recipe, --set KEY=VALUE ...")
    options = parser.parse_args()
    given = ["--data.val_part=[0, 3000]", *(f"--{each}" for each in options.set)]
    recipe = load_recipe(options.recipe, *given)
    if recipe.teacher.training.epochs:
        fit(recipe.for_teacher(), options.out / "teacher", resume=True)
        recipe = recipe.with_trained_teacher(options.out / "teacher" / WEIGHTS)
    cells = [(variant, seed) for variant in options.variants for seed in options.seeds]
    # A process for each run: the patches stay in it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(run, recipe.config, *cell, options.out): cell for cell in cells}
        for future in as_completed(futures):
            variant, seed = futures[future]
            try:
                told = f"{future.result().student['top1']:.2%}"
            except FloatingPointError as error:
                told = str(error)
                write_json(folder_of(options.out, variant, seed) / DIVERGED, {"error": told})
            print(f"{variant}, seed {seed}: {told}", flush=True)
    found = collect(options.out)
    name, chosen = options.name or options.recipe, [variant for variant in found if len(found) < len(VARIANTS)]
    write(name, options.recipe, options.set, found, command(program, name, options.recipe, options.set, chosen), about)


def command(program: str, name: str, recipe: str, given: list[str], chosen: list[str]) -> str:
    """The command that gives the results of a recipe."""
    named = [f"--name {name}"] if name != recipe else []
    more = [f"--recipe {recipe}", *named, *([f"--set {' '.join(given)}"] if given else [])]
    if named and chosen:  # not one that grows, variant by variant
        more.append("-- " + " ".join(f'"{variant}"' for variant in chosen))
    return f"{program} --out runs/{name} {' '.join(more)}"


def write(
    name: str, recipe: str, given: list[str], found: dict[str, dict[str, float | None]], run: str, about: str
) -> None:
    """Keep the results of a recipe, which a command has given, as JSON and as a table."""
    results = Path(__file__).parent / "results"
    write_json(results / f"{name}_study.json", {"recipe": recipe, "set": given, "base": BASE, "top1": found})
    text = f"# The study of {name}\n\n`{run}`\n\n{about.partition('    python')[0].strip()}\n\n{markdown(found)}"
    atomic_write(results / f"{name}_study.md", lambda path: path.write_text(text))


def folder_of(out: Path, variant: str, seed: int) -> Path:
    """The folder of a run."""
    return out / variant.replace(" ", "_") / f"seed{seed}"


def collect(out: Path) -> dict[str, dict[str, float | None]]:
    """Accuracy by variant and seed of all runs so far; None where the loss diverged."""
    found: dict[str, dict[str, float | None]] = {}
    for variant in VARIANTS:
        for folder in sorted(folder_of(out, variant, 0).parent.glob("seed*")):
            metrics = read_metrics(folder)
            if metrics is not None or (folder / DIVERGED).exists():
                accuracy = None if metrics is None else metrics.student["top1"]
                found.setdefault(variant, {})[folder.name.removeprefix("seed")] = accuracy
    return found


def markdown(found: dict[str, dict[str, float | None]]) -> str:
    """A table of all variants, the best difference to the base first."""
    runs = [
        RunMetrics("classification", variant, int(seed), 0, {"top1": accuracy}, {}, {}, [], 0.0)
        for variant, by_seed in found.items()
        for seed, accuracy in by_seed.items()
        if accuracy is not None
    ]
    differences = {
        entry.method: entry.difference for entry in summarise(runs, sorted({run.method for run in runs}), base=BASE)
    }
    lines = [f"| variant | to {BASE!r} | by seed |", "|---|---|---|"]

    def rank(variant: str) -> float:
        difference = differences.get(variant)
        return -float(variant != BASE) if difference is None else difference.mean

    for variant in sorted(found, key=rank, reverse=True):
        by_seed = [f"{s}: {'diverged' if v is None else f'{100 * v:.2f}'}" for s, v in found[variant].items()]
        difference = differences.get(variant)
        shown = "" if difference is None else difference.shown(ACCURACIES[0], "+")
        lines.append(f"| {variant} | {shown} | {', '.join(by_seed)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
