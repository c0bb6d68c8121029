"""Alignment beside the assignment, for students of the transfer benchmark.

Runs that `transfer.py` has are taken from its results. What is missing is trained: alignment for its seeds, by the same
teacher in its folder (``--out``), and every method for further seeds. Their teacher may be another one, as differences are
paired by seed. Results that are there stay, so that an interrupted command goes on with what is missing.
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
OTHERS = ["none", "mgd-amp", "ofd", "fitnets"]
ALIGNED = [student for student in STUDENTS if student != "narrow_pretrained"]  # which needs another training before
Found = dict[str, dict[str, float]]  # top-1 by method and seed


def markdown(results: dict[str, Any]) -> str:
    """The tables of `results`."""
    lines = [
        "# Alignment, for students of the transfer benchmark",
        "",
        "`python -m benchmarks alignment`. Other methods' runs that [the transfer benchmark](transfer.md) has are its.",
        "Top-1 accuracy in percent on the 4,000 test images that no setting was chosen by, ± half of the 95% interval over",
        f"seeds; differences are paired by seed. {METHOD} has the weight 5, as mgd-amp has; no other was tried here.",
    ]
    for student, found in results["students"].items():
        teachers = results["teachers"][student]
        named = ", ".join(f"{100 * top1:.2f} (seeds {', '.join(_of(teachers, top1))})" for top1 in _values(teachers))
        lines += ["", f"## {STUDENTS[student]}", "", f"The teacher: {named}.", ""]
        lines += [f"| method | seeds | top-1 | to none | {METHOD} to it |", "|---|---|---|---|---|"]
        for method in (METHOD, *OTHERS):
            if own := found.get(method):
                cells = str(len(own)), Mean.of(list(own.values())).shown(TOP1)
                gains = [gain(found, *pair) for pair in ((method, "none"), (METHOD, method))]
                lines.append(f"| {' | '.join((method, *cells, *gains))} |")
    return "\n".join(lines) + "\n"


def _values(teachers: dict[str, float]) -> list[float]:
    return list(dict.fromkeys(teachers.values()))


def _of(teachers: dict[str, float], top1: float) -> list[str]:
    return [seed for seed, each in teachers.items() if each == top1]


def gain(found: Found, method: str, base: str) -> str:
    """What a method has above another one, over the seeds of both; empty for itself."""
    seeds = [seed for seed in found.get(method, {}) if seed in found.get(base, {}) and method != base]
    return Mean.of([found[method][seed] - found[base][seed] for seed in seeds]).shown(TOP1, "+") if seeds else ""


def run(
    out: Path = Path("runs/transfer"),
    seeds: int = 5,
    students: Sequence[str] = tuple(ALIGNED),
    methods: Sequence[str] = (METHOD, *OTHERS),
) -> None:
    """Train students of the transfer benchmark by alignment, and compare with its other methods.

    Args:
        out: folder of the runs.
        seeds: runs of each student.
        students: which students.
        methods: which rows.
    """
    torch.set_num_threads(1)
    path = RESULTS / "alignment.json"
    results = read_json(path) if path.exists() else {"students": {}, "teachers": {}}
    before = read_json(RESULTS / "transfer.json", students=dict)["students"]
    for student in students:
        found: Found = results["students"].setdefault(student, {})
        teachers: dict[str, float] = results["teachers"].setdefault(student, {})
        for each in before[student]["runs"]:
            if each["method"] in OTHERS and each["seed"] < seeds:
                found.setdefault(each["method"], {})[str(each["seed"])] = each["student"]["top1"]
                teachers[str(each["seed"])] = before[student]["teacher"]
        for seed in map(str, range(seeds)):
            for method in methods:
                if seed in found.setdefault(method, {}):
                    continue
                top1, teacher = train(out, student, method, seed)
                # Without a method the teacher is not measured.
                if teacher is not None and abs(teachers.setdefault(seed, teacher) - teacher) > 1e-6:
                    raise ValueError(
                        f"seed {seed}: the teacher in {out} is another one than the other methods': delete its folder, or "
                        "run transfer.py"
                    )
                found[method][seed] = top1
                print(f"{student}, {method}, seed {seed}: {top1:.2%}", flush=True)
                write_json(path, results)
                atomic_write(path.with_suffix(".md"), lambda to: to.write_text(markdown(results), encoding="utf-8"))


def train(out: Path, student: str, method: str, seed: str) -> tuple[float, float | None]:
    """The top-1 accuracies of a student and, if it has one, of its teacher, which is trained where it is not there."""
    fit(load_recipe("transfer_fashion_mnist").for_teacher(), out / "teacher", resume=True)
    name = "transfer_fashion_mnist" + "_narrow" * student.startswith("narrow")
    recipe = load_recipe(name, f"--distillation.method={method}", f"--seed={seed}")
    recipe = recipe.with_trained_teacher(out / "teacher" / WEIGHTS)
    metrics = fit(recipe, out / method / student / f"seed{seed}", resume=True, quiet=True)
    return metrics.student["top1"], metrics.teacher.get("top1")
