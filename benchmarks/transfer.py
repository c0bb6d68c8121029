"""The transfer benchmark: every method of the recipes transfer_fashion_mnist, for three students of one teacher.

The students are (a) a pre-trained EfficientNet-Lite0, (b) one of a third of its width, pre-trained on other images, and
(c) the same from scratch. Interrupted, the same command goes on with what is missing.

    python benchmarks/transfer.py --out runs/transfer --seeds 3 --jobs 2
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import torch

from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.messages import console
from matchdistill.runs.compare import compare
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.summary import Mean, summarise
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.module import ACCURACIES

STUDENTS = {
    "pretrained": "(a) EfficientNet-Lite0, pre-trained on ImageNet",
    "narrow_pretrained": "(b) a third of its width, pre-trained on 10,000 other images",
    "narrow_scratch": "(c) a third of its width, from scratch",
}
TOP1 = ACCURACIES[0]
RESULTS = Path(__file__).parent / "results"


def markdown(results: dict[str, Any]) -> str:
    """The tables of `results`."""
    lines = [
        "# The transfer benchmark",
        "",
        f"`python benchmarks/transfer.py`; {results['machine']}.",
        "Top-1 accuracy in percent on the 4,000 test images that no setting was chosen by, ± half of the 95% interval over",
        "seeds (each with its own 1,000 training images); differences are paired by seed.",
    ]
    for student, title in STUDENTS.items():
        found = results["students"].get(student)
        if found is None:
            continue
        seeds = len(found["summary"][0]["seeds"])
        lines += ["", f"## {title}", "", f"{seeds} seeds; teacher: {100 * found['teacher']:.2f}.", ""]
        lines += ["| method | top-1 | to none | to mgd-amp |", "|---|---|---|---|"]
        for entry in found["summary"]:
            cells = shown(entry["top1"]), shown(entry["difference"], "+"), shown(entry["to_mgd"], "+")
            lines.append(f"| {entry['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(mean: dict[str, Any] | None, sign: str = "") -> str:
    """A `Mean` of `results` for a table, empty where there is none."""
    return "" if mean is None else Mean(**mean).shown(TOP1, sign)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    options = parser.parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads() // options.jobs))
    recipes = {name: "transfer_fashion_mnist" + "_narrow" * name.startswith("narrow") for name in STUDENTS}
    fit(load_recipe(recipes["pretrained"]).for_teacher(), options.out / "teacher", resume=True)
    fit(load_recipe("pretrain_fashion_mnist"), options.out / "pretrain", resume=True)
    before = (
        read_json(RESULTS / "transfer.json", students=dict)["students"] if (RESULTS / "transfer.json").exists() else {}
    )
    results: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, one thread per run",
        "students": before,  # also the ones that are not run now
    }
    for student in options.students:
        arguments = [f"--student.weights={options.out / 'pretrain' / WEIGHTS}"] * (student == "narrow_pretrained")
        recipe = load_recipe(recipes[student], *arguments)
        recipe = recipe.with_trained_teacher(options.out / "teacher" / WEIGHTS)
        methods = recipe.compare.methods
        torch.set_num_threads(options.jobs)  # which compare divides
        compared = compare(recipe, options.out / student, methods, options.seeds, options.jobs, console())
        to_mgd = [entry.plain(TOP1)["difference"] for entry in summarise(compared.runs, methods, base="mgd-amp")]
        recipe.config["teacher"]["weights"] = "the recipe's own"  # not this machine's path
        if arguments:
            recipe.config["student"]["weights"] = "of pretrain_fashion_mnist"
        results["students"][student] = {
            "teacher": next(run.teacher["top1"] for run in compared.runs if run.teacher),
            "summary": [
                {key: entry.plain(TOP1)[key] for key in ("method", "seeds", "top1", "difference", "gap_recovered")}
                | {"to_mgd": own}
                for entry, own in zip(compared.summary, to_mgd, strict=True)
            ],
            "runs": [{key: run.plain()[key] for key in ("method", "seed", "student")} for run in compared.runs],
            "recipe": recipe.config,
        }
    write_json(RESULTS / "transfer.json", results)
    atomic_write(RESULTS / "transfer.md", lambda path: path.write_text(markdown(results)))


if __name__ == "__main__":
    main()
