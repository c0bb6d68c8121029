"""Alignment beside the assignment, for students of the transfer benchmark: the same teacher, seeds and images.

It trains with method mgd-align and compares with what `transfer.py` has found for the other methods. Interrupted, the same
command goes on with what is missing; ``--out`` may be the folder of `transfer.py`, whose teacher is then taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.transfer import RESULTS, STUDENTS, TOP1
from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.summary import Mean
from matchdistill.runs.train import fit

METHOD = "mgd-align"
OTHERS = ["none", "mgd-amp", "fitnets", "ofd"]
ALIGNED = [student for student in STUDENTS if student != "narrow_pretrained"]  # which needs another training before


def markdown(results: dict[str, Any]) -> str:
    """The tables of `results`."""
    lines = [
        "# Alignment, for students of the transfer benchmark",
        "",
        "`python -m benchmarks alignment`; the other methods' runs are those of [the transfer benchmark](transfer.md).",
        "Top-1 accuracy in percent on the 4,000 test images that no setting was chosen by, ± half of the 95% interval over",
        f"seeds; differences are paired by seed. {METHOD} has the weight 5, as mgd-amp has; no other was tried here.",
    ]
    for student, found in results["students"].items():
        seeds = sorted(found[METHOD])
        lines += [
            "",
            f"## {STUDENTS[student]}",
            "",
            f"{len(seeds)} seeds; teacher: {100 * results['teacher']:.2f}.",
            "",
        ]
        lines += [f"| method | top-1 | {METHOD} to it |", "|---|---|---|"]
        for method in (METHOD, *OTHERS):
            own = Mean.of([found[method][seed] for seed in seeds]).shown(TOP1)
            gains = Mean.of([found[METHOD][seed] - found[method][seed] for seed in seeds]).shown(TOP1, "+")
            lines.append(f"| {method} | {own} | {'' if method == METHOD else gains} |")
    return "\n".join(lines) + "\n"


def run(out: Path = Path("runs/transfer"), seeds: int = 3, students: Sequence[str] = tuple(ALIGNED)) -> None:
    """Train students of the transfer benchmark by alignment, and compare with its other methods.

    Args:
        out: folder of the runs.
        seeds: runs of each student.
        students: which students.
    """
    torch.set_num_threads(1)
    fit(load_recipe("transfer_fashion_mnist").for_teacher(), out / "teacher", resume=True)
    before = read_json(RESULTS / "transfer.json", students=dict)["students"]
    results: dict[str, Any] = {"students": {}}
    for student in students:
        name = "transfer_fashion_mnist" + "_narrow" * student.startswith("narrow")
        found: dict[str, dict[str, float]] = {
            method: {
                str(each["seed"]): each["student"]["top1"]
                for each in before[student]["runs"]
                if each["method"] == method
            }
            for method in OTHERS
        }
        found[METHOD] = {}
        for seed in range(seeds):
            recipe = load_recipe(name, f"--distillation.method={METHOD}", f"--seed={seed}")
            recipe = recipe.with_trained_teacher(out / "teacher" / WEIGHTS)
            metrics = fit(recipe, out / METHOD / student / f"seed{seed}", resume=True, quiet=True)
            found[METHOD][str(seed)] = metrics.student["top1"]
            results["teacher"] = metrics.teacher["top1"]
            print(f"{student}, seed {seed}: {metrics.student['top1']:.2%}", flush=True)
        if abs(results["teacher"] - before[student]["teacher"]) > 1e-6:
            print(
                "the teacher is another one than the other methods': delete its folder, or run transfer.py", flush=True
            )
        results["students"][student] = found
    write_json(RESULTS / "alignment.json", results)
    atomic_write(RESULTS / "alignment.md", lambda path: path.write_text(markdown(results), encoding="utf-8"))
