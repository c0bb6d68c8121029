"""The page docs/speed.md, made from the committed results: targets and what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import projection, scale
from benchmarks.harness import RESULTS, ratio
from matchdistill.files import atomic_write

Results = dict[str, dict[str, Any]]

DOCS = Path(__file__).parents[1] / "docs"
DEVICES = ("cpu", "cuda")
DEFAULT_IMAGES = 20_000  # of a refresh
OPERATORS = 12  # that a profile names


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
    """The relative difference of the loss with a prepared teacher."""
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
            Target(f"step with {name}, of the limit", 0.85, "step", _ratio(work)),
            Target(f"loss with {name}, relative difference", 1e-3, "step", _loss(work)),
        )
    ),
    Target("the original's step, of ours", 2.0, "step", _ratio("original", "matchdistill"), True, "mobilenet_v2"),
    Target(
        "a step that sums for an online refresh, of one that does not", 1.01, "online", _ratio("online", "matchdistill")
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
    Target("the original's assignment, of ours", 20.0, "assign", _ratio("original", "matchdistill"), True),
]


def read() -> Results:
    """The committed results by name of the file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def page(results: Results) -> str:
    """The page."""
    parts = [
        _INTRODUCTION,
        _targets(results),
        *_tables(results),
        _scale(results),
        _projection(results),
        _commands(results),
    ]
    return "\n".join(part for part in parts if part)


_INTRODUCTION = """\
# Speed and memory

A step of distillation cannot cost less than the student's own step and one forward pass of the teacher: that is the
**limit**, both networks in eager float32, the teacher in inference mode. A refresh cannot cost less than running both
networks once over its images. What is above is the library's; a prepared teacher makes the forward pass itself cheaper.

**The original** is the method as its authors ran it, rebuilt from its description in `benchmarks/original.py`: a graph for
the teacher, MobileNet-V2 run from its input for each position, stacked groups and argmax, costs of (N, Cs, Ct) moved to
the CPU with each batch, an assignment built by one Python call per pair of channels. Its loss, costs and objectives are
tested to be ours. The others are FitNets with its 1x1 adapters at the same positions, Hinton's distillation of the output,
and the student alone.

The networks are torchvision's, untrained, with batch norms as after training; images are random. Works take turns in one
process, in reverse order every second round; ratios are taken by round, and "low" and "high" are their quartiles. This
page is made from the files in `benchmarks/results/speed` by `python -m benchmarks page`.
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


def _bounded(target: Target) -> str:
    return f"{target.text}: {'at least' if target.at_least else 'at most'} {target.bound:g}"


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _tables(results: Results) -> Iterator[str]:
    for device in DEVICES:
        for measurement, show in _SHOWN.items():
            found = results.get(f"{measurement}_{device}")
            if found:
                title, text = show(found["results"])
                yield f"## {title}, {found['machine']['device']}\n\n{text}"


def _works(works: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, f"{1000 * own['seconds']:.1f}", *(f"{own['ratio'][key]:.3f}" for key in ("median", "low", "high")))
        for name, own in works.items()
    ]


def _step(found: dict[str, Any]) -> tuple[str, str]:
    head = ("", "ms", "of the limit", "low", "high")
    return f"A step, {found['size']} px, batch {found['batch']}", _by_group(
        {
            name: table(head, _works(each["works"]))
            + "".join(
                f"\nThe loss, {work}: {value:.1e} from that of the teacher as it is, relatively.\n"
                for work, value in each["loss differences"].items()
            )
            for name, each in found["pairs"].items()
        }
    )


def _online(found: dict[str, Any]) -> tuple[str, str]:
    head = (f"{found['every']} steps", "ms", "of those without sums", "low", "high")
    return f"An online refresh, {found['size']} px, batch {found['batch']}", _by_group(
        {name: table(head, _works(each["works"])) for name, each in found["pairs"].items()}
    )


def _refresh(found: dict[str, Any]) -> tuple[str, str]:
    texts = {}
    for name, each in found["pairs"].items():
        rows = [(work, str(each["images"][work]), *own) for work, *own in _works(each["per image"])]
        text = table(("", "images", "ms per image", "of the forward passes", "low", "high"), rows)
        text += f"\nThe assignments of a refresh take {each['assignments']:.2f} s"
        if each["original assignments"] is not None:
            text += f", the original's, which are not in the table, {each['original assignments']:.1f} s"
        works = each["per image"]
        images = works["matchdistill without assignments"]["seconds"] + each["assignments"] / DEFAULT_IMAGES
        share = images / works["forwards"]["seconds"]
        text += f". By calculation, a refresh of {DEFAULT_IMAGES:,} images, the default, takes {share:.3f} of the "
        text += "forward passes.\n"
        if "processes" in each:
            found_ = each["processes"]
            same = "the same matching" if found_["same matching"] else "**another matching**"
            text += f"\n{found_['processes']} processes with a thread each take {found_['ratio']['median']:.3f} "
            text += f"({found_['ratio']['low']:.3f} to {found_['ratio']['high']:.3f}) of the time of one, and find {same}.\n"
        texts[name] = text
    return f"A refresh, {found['size']} px, batch {found['batch']}", _by_group(texts)


def _adaptive(found: dict[str, Any]) -> tuple[str, str]:
    rows = [
        (kind, str(each["images"]), f"{each['seconds']:.0f}", *(f"{100 * value:.3f}" for value in each["excess"]))
        for kind in ("adaptive", "fixed")
        for each in found[kind]
    ]
    columns = tuple(f"position {number}, %" for number in range(len(found["positions"])))
    text = _ADAPTIVE.format(**found["full"], trained=found["trained on"], tolerance=found["tolerance"])
    return "An adaptive refresh", text + table(("", "images", "s", *columns), rows)


def _online_matching(found: dict[str, Any]) -> tuple[str, str]:
    names = {"online": f"summed by every {found['every']}th step", "kept": "that from before the steps"}
    rows = [(names[kind], *(f"{100 * value:.3f}" for value in values)) for kind, values in found["excess"].items()]
    columns = tuple(f"position {number}, %" for number in range(len(rows[0]) - 1))
    text = _ONLINE.format(trained=found["trained on"], steps=found["steps"], **found["images"])
    return "The matching of an online refresh", text + table(("matching", *columns), rows)


_ONLINE = """\
ResNet-50 and ResNet-18, each trained on {trained:,} images of Fashion-MNIST, then {steps} steps of distillation, whose
features of {online:,} images are summed while the student changes. In percent, how much more the matching costs than that of
{full:,} images with the student as it is after the steps, on all of these. What it does to the student's accuracy is in
[the study](../benchmarks/results/transfer_online_study.md).

"""


_ADAPTIVE = """\
ResNet-50 and ResNet-18, each trained on {trained:,} images of Fashion-MNIST, matched on others. In percent, how much more
the matching costs than that of {images:,} images (which took {seconds:.0f} s), both on all of these.

With a tolerance of {tolerance:g} a refresh stops once a matching of half of its images lacks no more than that share. The
matchings of two halves of the batches are each tried on the other half, where that one's own is the best. What lies between
has two parts, on average and to first order equal: what the one lacks on images that it was not made for, and what the other
gains on those that it was; so half of it is what a matching of half of the images lacks. That of both halves together, which
is the one taken, lacks about half as much. It is looked at after 240 images and at each doubling.

"""


def _assign(found: dict[str, Any]) -> tuple[str, str]:
    rows = [
        (cost, work, f"{own['seconds']:.3f}", f"{own['ratio']['median']:.1f}", f"{each['mean cost'][work]:.6f}")
        for cost, each in found["costs"].items()
        for work, own in each["works"].items()
    ]
    title = f"The assignment of {found['students']} student to {found['teachers']} teacher channels"
    return title, table(("costs", "", "s", "of ours", "mean cost of the pairs"), rows)


def _profile(found: dict[str, Any]) -> tuple[str, str]:
    texts = {}
    for name, each in found["pairs"].items():
        texts[name] = "\n".join(
            (
                _operators("a step", "limit", each["step"]),
                _operators(f"a refresh of {found['batch'] * found['batches']} images", "forwards", each["refresh"]),
            )
        )
    return f"Where the time goes, {found['size']} px, batch {found['batch']}", _PROFILE + _by_group(texts)


def _operators(what: str, base: str, found: dict[str, dict[str, float]]) -> str:
    """What is above the base, by operator, the largest first; the rest as one row."""
    above = {operator: own - found[base][operator] for operator, own in found["matchdistill"].items()}
    shown = sorted(above, key=lambda operator: -abs(above[operator]))[:OPERATORS]
    rest = [operator for operator in above if operator not in shown]
    rows = [
        (f"`{operator}`", *(f"{1000 * value:.1f}" for value in (found[base][operator], above[operator])))
        for operator in shown
    ]
    for label, summed in (("others", rest), ("all", list(above))):
        values = sum(found[base][operator] for operator in summed), sum(above[operator] for operator in summed)
        rows.append((label, *(f"{1000 * value:.1f}" for value in values)))
    return table((what, f"{base}, ms", "matchdistill above it, ms"), rows)


_PROFILE = """\
By PyTorch's profiler, each operator without those that it calls; medians over the runs. It slows small operators down, and
does not see what a change of the caches costs those of the networks: times of whole steps are above.

"""


def _memory_table(found: dict[str, Any]) -> tuple[str, str]:
    texts = {}
    for name, each in found["pairs"].items():
        limit = each["step"]["limit"]["tensors"]
        rows = [
            (work, _mebibytes(own["tensors"]), f"{own['tensors'] / limit:.3f}", _mebibytes(own.get("resident")))
            for work, own in each["step"].items()
        ]
        texts[name] = table(("step", "MiB in tensors", "of the limit", "MiB resident"), rows) + "\n"
        rows = [
            (own["work"], str(own["images"]), _mebibytes(own["tensors"]), _mebibytes(own.get("resident")))
            for own in each["refresh"]
        ]
        texts[name] += table(("refresh", "images", "MiB in tensors", "MiB resident"), rows)
    return f"Peak memory, {found['size']} px, batch {found['batch']}", _by_group(texts)


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"


def _by_group(texts: dict[str, str]) -> str:
    return "\n".join(f"### {name}\n\n{text}" for name, text in texts.items())


_SHOWN: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "step": _step,
    "online": _online,
    "refresh": _refresh,
    "adaptive": _adaptive,
    "online-matching": _online_matching,
    "assign": _assign,
    "profile": _profile,
    "memory": _memory_table,
}


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
Exponents are slopes of the logarithms over the larger half of the values. "loss" is one position's, forward and backward, of
given features; "update" the sums of one batch at a refresh; the channels are the teacher's, of which the student has half. A
step's is what the distilled step of ResNet-50 -> ResNet-18 takes above the limit.
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

Not measured, and to be checked on such a machine.

*Counted* per image of {size} px: the operations of the forward passes (a multiplication and its addition are two) and the
bytes in float32 that wait for the backward pass.

*Assumed*: a GPU sustains {rate} TFLOP/s, from the 2,470 images a second at which NVIDIA trains ResNet-50 in mixed
precision on an A100 ([DeepLearningExamples](https://github.com/NVIDIA/DeepLearningExamples), ResNet50 v1.5 for PyTorch),
times 1.64 for the bandwidth of an H100; {depthwise} TFLOP/s for students of depth-wise convolutions, which is a guess;
loading keeps up; no GPU waits for another; the loss costs nothing, whose target is 3% of the step.

- s per epoch: {images} images / {gpus} x (teacher / rate + 3 x student / rate), as backward is twice forward
- s per refresh, before every epoch at most: {refresh} images / {gpus} x (teacher / rate + student / rate)
- s to assign: as measured on this page's CPU; every rank waits for it
- GB per GPU: {batch} images x (student's graph + distillation's graph + teacher's features), the weights of both networks,
  the student's gradients and momentum, and the sums of a refresh; beside it the teacher's other maps, which are freed
  one by one, and the libraries' scratch

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
