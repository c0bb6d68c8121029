"""The page docs/speed.md, made from the committed results: targets and what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gpu_page, projection, scale
from benchmarks.assign import PROBLEM
from benchmarks.harness import RESULTS, ratio
from benchmarks.tables import TABLES, table
from benchmarks.tried_teachers import INT8, THREAD
from matchdistill.files import atomic_write

Results = dict[str, dict[str, Any]]

DOCS = Path(__file__).parents[1] / "docs"
DEVICES = ("cpu", "cuda")
PRODUCT = "aten::mm"  # of unit maps, at a refresh
FASTER = 0.85  # what a step with a faster teacher may take of the limit
ENGINE = ("alone", "matchdistill", "prepared", "onnxruntime")  # works with and without a faster teacher
SOLVES = ("refresh_cpu", "profile_cpu")  # results with assignments in them
SOLVER = "2026-11-30"  # the day from which results have the present solver


class Target(NamedTuple):
    """A bound of something measured.

    ``measurement`` is the file's name without the device; ``value`` finds what is measured for a pair (or a kind of cost),
    ``None`` where it was not. ``at_least`` turns the bound round.
    """

    text: str
    bound: float
    measurement: str
    value: Callable[[dict[str, Any]], float | None]
    at_least: bool = False
    only: str = ""

    def met(self, value: float) -> bool:
        """Whether a value is within the bound."""
        return value >= self.bound if self.at_least else value <= self.bound


def _ratio(own: str, other: str = "limit") -> Callable[[dict[str, Any]], float | None]:
    """The median ratio by round of two works."""

    def value(found: dict[str, Any]) -> float | None:
        works = found["works"]
        if own not in works or other not in works:
            return None
        return ratio(works[own]["rounds"], works[other]["rounds"])["median"]

    return value


def _memory(own: str) -> Callable[[dict[str, Any]], float | None]:
    def value(found: dict[str, Any]) -> float | None:
        works = found["step"]
        return works[own]["tensors"] / works["limit"]["tensors"] if own in works else None

    return value


def _growth(found: dict[str, Any]) -> float | None:
    """The memory of the longer refresh over that of the shorter."""
    peaks = [each["tensors"] for each in found["refresh"] if each["work"] == "matchdistill"]
    return peaks[-1] / peaks[0] if len(peaks) > 1 else None


def _processes(found: dict[str, Any]) -> float | None:
    return found["processes"]["ratio"]["median"] if "processes" in found else None


def _images(found: dict[str, Any]) -> float:
    """The most images of an adaptive refresh, of those of the full one."""
    return max(each["images"] for each in found["adaptive"]) / found["full"]["images"]


def _excess(found: dict[str, Any]) -> float:
    """The most that any position's matching lacks."""
    return max(value for each in found["adaptive"] for value in each["excess"])


def _loss(work: str) -> Callable[[dict[str, Any]], float | None]:
    """The relative difference of the loss with a faster teacher."""
    return lambda found: found["loss differences"].get(work)


_PREPARED = {
    "a prepared teacher": "prepared",
    "a prepared and compiled teacher": "prepared + compile",
    "a prepared teacher in bfloat16": "prepared + bf16",
}
TARGETS = [
    Target("step, of the limit", 1.03, "step", _ratio("matchdistill")),
    Target("step, of FitNets' step", 1.0, "step", _ratio("matchdistill", "fitnets")),
    *(
        target
        for name, work in _PREPARED.items()
        for target in (
            Target(f"step with {name}, of the limit", FASTER, "step", _ratio(work)),
            Target(f"loss with {name}, relative difference", 1e-3, "step", _loss(work)),
        )
    ),
    Target("step with a teacher on ONNX Runtime, of the limit", FASTER, "engine", _ratio("onnxruntime")),
    Target("loss with a teacher on ONNX Runtime, relative difference", 1e-3, "engine", _loss("onnxruntime")),
    Target("the original's step, of ours", 2.0, "step", _ratio("original", "matchdistill"), True, "mobilenet_v2"),
    Target(
        "a step that sums for an online refresh, of one that does not", 1.01, "online", _ratio("online", "matchdistill")
    ),
    Target(
        "a step with the teacher's features from disk, of the student alone", 1.05, "cached", _ratio("cached", "alone")
    ),
    Target("peak memory of a step, of the limit's", 1.05, "memory", _memory("matchdistill")),
    Target("memory of a refresh of more images, of one of fewer", 1.01, "memory", _growth),
    Target(
        "refresh, of the forward passes",
        1.05,
        "refresh",
        lambda found: found["per image"]["matchdistill"]["ratio"]["median"],
    ),
    Target("images of an adaptive refresh, of those of a full one", 0.2, "adaptive", _images),
    Target("the objective of an adaptive refresh above the full one's", 1e-3, "adaptive", _excess),
    Target("refresh by two processes, of one", 0.6, "refresh", _processes),
    Target(
        "maps of mgd-align, of the forward passes of 1,024 images", 0.03, "maps", _ratio("matchdistill", "forwards")
    ),
    Target("SciPy's assignment of groups as equal rows, of ours", 4.0, "assign", _ratio("scipy", "matchdistill"), True),
    Target("the original's assignment, of ours", 20.0, "assign", _ratio("original", "matchdistill"), True),
]


def read() -> Results:
    """The committed results by name of the file; one at toy size measures nothing."""
    files = sorted(path for path in RESULTS.glob("*.json") if not path.stem.endswith("_toy"))
    return {path.stem: json.loads(path.read_text()) for path in files}


def page(results: Results) -> str:
    """The page."""
    parts = [
        _INTRODUCTION,
        _targets(results),
        _reasons(results),
        *_tables(results),
        gpu_page.section(results.get("gpu")),
        _scale(results),
        _projection(results),
        _commands(results),
    ]
    return "\n".join(part for part in parts if part)


_INTRODUCTION = """\
# Speed and memory

A step of distillation needs at least the student's own step and one forward pass of the teacher. That is the
**limit**: both networks run in eager float32, the teacher in inference mode. A refresh needs at least one forward
pass of both networks over its images. What a measurement has above these is the cost of the library. A prepared
teacher makes the forward pass itself cheaper, so it can be below the limit.

**The original** is the method as its authors ran it, rebuilt from its description in `benchmarks/original.py`. It
keeps a graph for the teacher, and runs MobileNet-V2 from its input again for each position. It stacks the groups and
takes their argmax, moves costs (N, Cs, Ct) to the CPU with each batch, and assigns channels with one Python call per
pair. Tests show that its loss, costs and objectives equal the library's. The other works are FitNets with its 1x1
adapters at the same positions, Hinton's distillation of the output, and the student alone.

With `prepared`, a copy of the teacher runs whose batch norms are folded into its convolutions. With `onnxruntime`, ONNX
Runtime runs the teacher (`teacher.engine`).

The networks are torchvision's. They are untrained, with batch norms as after training, and the images are random. The
works take turns in one process, in reverse order in every second round. A ratio is taken in each round; the tables
show the median, and the quartiles as "low" and "high". `python -m benchmarks page` makes this page from the files in
`benchmarks/results/speed`.
"""


def _groups(found: dict[str, Any]) -> dict[str, Any]:
    """What a measurement found by pair, or by kind of cost."""
    results = found["results"]
    return results.get("pairs") or results.get("costs") or {"resnet50 -> resnet18": results}


def _targets(results: Results) -> str:
    rows = []
    for target in TARGETS:
        for device in DEVICES:
            found = results.get(f"{target.measurement}_{device}")
            values = {
                name: value
                for name, each in (_groups(found) if found else {}).items()
                if target.only in name and (value := target.value(each)) is not None
            }
            rows += [
                (_bounded(target), device, name, _number(value), "met" if target.met(value) else "**missed**")
                for name, value in values.items()
            ]
            if not values and device == "cpu":
                rows.append((_bounded(target), device, "", "", "not measured"))
    return "## Targets\n\n" + table(("target", "device", "of", "measured", ""), rows)


def _reasons(results: Results) -> str:
    """What the profile and the compiled loss say of missed targets, and which results are older than the solver."""
    lines = []
    profile = results.get("profile_cpu")
    for name, each in _groups(profile).items() if profile else ():
        own, base = each["refresh"]["matchdistill"], each["refresh"]["forwards"]
        if forwards := sum(base.values()):
            share = (own.get(PRODUCT, 0) - base.get(PRODUCT, 0)) / forwards
            lines.append(
                f"- {name}: the products of the channels' maps (`{PRODUCT}`) alone take {share:.1%} of the forward "
                "passes, by the profile of a refresh. No solver lowers that.\n"
            )
    steps = results.get("step_cpu")
    for name, each in _groups(steps).items() if steps else ():
        if {"prepared", "prepared + compiled loss"} <= each["works"].keys():
            fused = ratio(each["works"]["prepared + compiled loss"]["rounds"], each["works"]["prepared"]["rounds"])
            lines.append(
                f"- {name}: if norm, reduction and partial loss of each position are compiled to one (`position.compile`), "
                f"a step takes {fused['median']:.3f} of the time ({fused['low']:.3f} to {fused['high']:.3f}).\n"
            )
    engine = results.get("engine_cpu")
    for name, each in _groups(engine).items() if engine else ():
        shares = {work: share for work in ENGINE if (share := _ratio(work)(each)) is not None}
        if len(shares) == len(ENGINE) and shares[ENGINE[-1]] > FASTER:
            lines.append(_of_the_teacher(name, shares))
    tried = results.get("tried-teachers_cpu")
    for name, each in _groups(tried).items() if tried else ():
        int8, thread = (_ratio(work)(each) for work in (INT8, THREAD))
        if int8 is not None and thread is not None:
            lines.append(
                f"- {name}: with a teacher of 8 bits on ONNX Runtime, a step takes {int8:.3f} of the limit, but the loss "
                f"differs by {each['loss differences'][INT8]:.2g}. If the teacher runs in a thread beside the student's "
                f"step, both take {thread:.3f} of the limit. The library has neither.\n"
            )
    from_disk = results.get("cached_cpu")
    for name, each in _groups(from_disk).items() if from_disk else ():
        if "reading" in each:
            share = each["reading"] / each["works"]["alone"]["seconds"]
            lines.append(
                f"- {name}: to read and check the teacher's features from disk takes {share:.1%} of the student's own step. "
                "The rest of what a step with them takes above that is the loss.\n"
            )
    assigned = results.get("assign_cpu")
    lines += _of_the_assignments(_groups(assigned)) if assigned else []
    older = [name for name in SOLVES if name in results and results[name].get("measured", "") < SOLVER]
    if older:
        named = " and ".join(f"[{name}.json](../benchmarks/results/speed/{name}.json)" for name in older)
        lines.append(
            f"- {named} were measured with an older solver, which solved G equal rows for each student channel. The table "
            "of assignments has the present solver. With it, a refresh of few images is faster than this page says.\n"
        )
    return "## Why targets are missed\n\n" + "".join(lines) if lines else ""


def _of_the_assignments(costs: dict[str, Any]) -> list[str]:
    """What the original's assignment takes its time for, and what ours does."""
    works = [each["works"] for each in costs.values()]
    if not all(PROBLEM in own for own in works) or not works:
        return []
    shares = [_ratio(PROBLEM, "original")(each) or 0 for each in costs.values()]
    times = [own["original"]["seconds"] for own in works]
    parts = [f"{each['parts']} ({name})" for name, each in costs.items()]
    return [
        f"- Assignments: the original takes {min(times):.1f} to {max(times):.1f} s, whatever the costs are, and "
        f"{min(shares):.0%} to {max(shares):.0%} of that to build its problem, with a call for each pair. Ours solves a "
        f"part of the problem as often as the costs need: {', '.join(parts)}. So costs of trained networks, which need it "
        "most often, have the lowest ratio.\n"
    ]


def _of_the_teacher(name: str, shares: dict[str, float]) -> str:
    """How fast the teacher would have to run for the bound of a step, and how fast it does within one."""
    rest = shares["alone"] + shares["matchdistill"] - 1
    within = [f"{(shares[work] - rest) / (1 - shares['alone']):.2f} with `{work}`" for work in ENGINE[2:]]
    return (
        f"- {name}: of the limit, the student's own step takes {shares['alone']:.2f}, and ours with PyTorch's teacher "
        f"{shares['matchdistill']:.2f}. So for a step of {FASTER} of the limit, the teacher's forward pass may take "
        f"{(FASTER - rest) / (1 - shares['alone']):.2f} of PyTorch's time for it. In the steps that were timed it takes "
        f"{' and '.join(within)}.\n"
    )


def _bounded(target: Target) -> str:
    return f"{target.text}: {'at least' if target.at_least else 'at most'} {target.bound:g}"


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"


def _tables(results: Results) -> Iterator[str]:
    for device in DEVICES:
        for measurement, show in TABLES.items():
            found = results.get(f"{measurement}_{device}")
            if found:
                title, text = show(found["results"])
                yield f"## {title}, {found['machine']['device']}\n\n{text}"


def _scale(results: Results) -> str:
    text = ""
    for device in DEVICES:
        if found := results.get(f"scale_{device}"):
            rows = [
                (variable, name, f"{curve['values'][0]} to {curve['values'][-1]}", scale.shown(curve["exponent"]))
                for variable, by in scale.curves(found["results"]).items()
                for name, curve in by.items()
            ]
            text += f"## How the costs grow, {found['machine']['device']}\n\n"
            text += table(("variable", "cost", "values", "exponent"), rows)
            text += f"\n![Seconds by size](images/scale_{device}.svg)\n"
    if text:
        text += """
An exponent is the slope of the logarithms over the larger half of the values. "loss" is the loss of one position,
forward and backward, for given features. "update" adds one batch to the sums of a refresh. The channels are the
teacher's; the student has half of them. "above the limit" is what a distilled step of ResNet-50 -> ResNet-18 takes
above the limit.
"""
    return text


def _projection(results: Results) -> str:
    if not (found := results.get("projection")):
        return ""
    rows = []
    for name, count in found["results"]["pairs"].items():
        measured = results.get("refresh_cpu")
        of = _groups(measured).get(name) if measured else None
        own = projection.project(count, of and of["assignments"])
        giga = [f"{count[key] / 1e9:.2f}" for key in ("teacher", "student forward")]
        mega = [f"{count[key] / 1e6:.0f}" for key in ("student's graph", "distillation's graph", "teacher's features")]
        seconds = [f"{own['epoch']:.0f}", f"{own['refresh']:.2f}", _seconds(own["assignments"]), f"{own['share']:.1%}"]
        rows.append((name, *giga, *seconds, *mega, f"{own['memory'] / 1e9:.1f}"))
    head = ("", "teacher, GFLOP", "student, GFLOP", "s per epoch", "s per refresh", "s to assign", "refresh share")
    head += ("student's graph, MB", "distillation's graph, MB", "teacher's features, MB", "GB per GPU")
    text = _PROJECTION.format(
        size=found["results"]["size"],
        rate=f"{projection.SUSTAINED / 1e12:.0f}",
        depthwise=f"{projection.SUSTAINED_DEPTHWISE / 1e12:.0f}",
        images=f"{projection.IMAGES:,}",
        refresh=f"{projection.REFRESH_IMAGES:,}",
        gpus=projection.GPUS,
        batch=projection.BATCH,
    )
    return text + table(head, rows)


_PROJECTION = """\
## A projection: ImageNet-1K on eight H100s

This is not measured. Check it on such a machine.

*Counted* for an image of {size} px: the operations of the forward passes (a multiplication and its addition are two),
and the bytes in float32 that are kept for the backward pass.

*Assumed*:

- A GPU sustains {rate} TFLOP/s. NVIDIA trains ResNet-50 on an A100 in mixed precision with 2,470 images a second
  ([DeepLearningExamples](https://github.com/NVIDIA/DeepLearningExamples), ResNet50 v1.5 for PyTorch); an H100 has 1.64
  times the bandwidth.
- Students of depth-wise convolutions sustain {depthwise} TFLOP/s. This is a guess.
- Loading keeps up, and no GPU waits for another.
- The loss costs nothing. Its target is 3% of the step.

The columns:

- s per epoch: {images} images / {gpus} x (teacher / rate + 3 x student / rate), as backward is twice forward
- s per refresh, at most one before each epoch: {refresh} images / {gpus} x (teacher / rate + student / rate)
- s to assign: as measured on this page's CPU; every rank waits for it
- GB per GPU: {batch} images x (student's graph + distillation's graph + teacher's features), the weights of both
  networks, the student's gradients and momentum, and the sums of a refresh. The teacher's other maps, which are freed one
  by one, and the libraries' scratch memory come on top.

"""


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _commands(results: Results) -> str:
    rows = [
        (f"[{name}.json](../benchmarks/results/speed/{name}.json)", f"`{found['command']}`", _machine(found["machine"]))
        for name, found in results.items()
    ]
    return "## Commands and machines\n\n" + table(("results", "command", "machine"), rows) if rows else ""


def _machine(machine: dict[str, Any]) -> str:
    own = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    return f"{own}{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}"


def run() -> None:
    """Write docs/speed.md, and its plots, from the committed results."""
    results = read()
    for device in DEVICES:
        if found := results.get(f"scale_{device}"):
            scale.plot(found["results"], DOCS / "images" / f"scale_{device}.svg")
    text = page(results)
    atomic_write(DOCS / "speed.md", lambda path: path.write_text(text, encoding="utf-8"))
