"""The tables of what was measured, in Markdown."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

DEFAULT_IMAGES = 20_000  # of a refresh
OPERATORS = 12  # that a profile names


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _works(works: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, f"{1000 * own['seconds']:.1f}", *(f"{own['ratio'][key]:.3f}" for key in ("median", "low", "high")))
        for name, own in works.items()
    ]


def _step(found: dict[str, Any], what: str = "A step") -> tuple[str, str]:
    head = ("", "ms", "of the limit", "low", "high")
    return f"{what}, {found['size']} px, batch {found['batch']}", _by_group(
        {
            name: table(head, _works(each["works"]))
            + "".join(
                f"\n{work}: the loss differs by {value:.1e}, relative to the loss with the teacher as it is.\n"
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


def _cached(found: dict[str, Any]) -> tuple[str, str]:
    def text(each: dict[str, Any]) -> str:
        megabytes = each["bytes of an image"] / 1e6
        rows = table(("", "ms", "of the student alone", "low", "high"), _works(each["works"]))
        return f"An image takes {megabytes:.2f} MB in {found['dtype']}. On a CPU, times are CPU seconds.\n\n{rows}"

    return f"The teacher's features from disk, {found['size']} px, batch {found['batch']}", _by_group(
        {name: text(each) for name, each in found["pairs"].items()}
    )


PEERS = {
    "torchdistill": "The outputs of all four stages are distilled. `torchdistill` runs its own code, with 1x1 adapters like "
    "`fitnets`.",
    "lightly-train": "The last maps are distilled, without labels. `lightly-train` runs its default method, with a linear "
    "projection of each place and one of the pooled features.",
}


def _peers(found: dict[str, Any], peer: str) -> tuple[str, str]:
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    head = ("", "ms", "of the limit", "low", "high", "memory of tensors, of the limit's")

    def rows(works: dict[str, Any]) -> list[tuple[str, ...]]:
        memory = [f"{own['tensors'] / works['limit']['tensors']:.3f}" for own in works.values()]
        return [(*row, own) for row, own in zip(_works(works), memory, strict=True)]

    text = f"{PEERS[peer]} `matchdistill` and `fitnets` are this library's. {packages}; times are CPU seconds.\n\n"
    return f"Beside {peer}, {found['size']} px, batch {found['batch']}", text + _by_group(
        {name: table(head, rows(works)) for name, works in found["pairs"].items()}
    )


def _refresh(found: dict[str, Any]) -> tuple[str, str]:
    texts = {}
    for name, each in found["pairs"].items():
        rows = [(work, str(each["images"][work]), *own) for work, *own in _works(each["per image"])]
        text = table(("", "images", "ms per image", "of the forward passes", "low", "high"), rows)
        text += f"\nThe assignments of a refresh take {each['assignments']:.2f} s"
        if each["original assignments"] is not None:
            text += f"; the original's take {each['original assignments']:.1f} s, and are not in the table"
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
ResNet-50 and ResNet-18 were each trained on {trained:,} images of Fashion-MNIST. Then {steps} steps of distillation
followed, and the features of {online:,} of their images were summed while the student changed. The table says how
much more, in percent, a matching costs than the matching of {full:,} images with the student as it is after the
steps. Both costs are measured on these images. [The study](../benchmarks/results/transfer_online_study.md) says what
it does to the student's accuracy.

"""


_ADAPTIVE = """\
ResNet-50 and ResNet-18 were each trained on {trained:,} images of Fashion-MNIST, and matched on others. The table
says how much more, in percent, a matching costs than the matching of {images:,} images, which took {seconds:.0f} s.
Both costs are measured on all of these images.

A refresh with a tolerance of {tolerance:g} stops once a matching of half of its images would lack no more than that
share. It estimates the lack as follows. The batches so far form two halves, and each half has a matching. Each
matching is tried on the other half, and compared there with that half's own. The difference has two parts, which are
equal on average: what a matching lacks on images that it has not seen, and what the other gains on images that it has
seen. So half of the difference is what a matching of half of the images lacks. The matching of all images, which is
the one taken, lacks about half of that again. The refresh checks this after 240 images and at each doubling.

"""


def _assign(found: dict[str, Any]) -> tuple[str, str]:
    rows = [
        (cost, work, f"{own['seconds']:.3f}", f"{own['ratio']['median']:.1f}", _mean_cost(each, work))
        for cost, each in found["costs"].items()
        for work, own in each["works"].items()
    ]
    title = f"The assignment to {found['teachers']} teacher channels"
    return title, table(("costs, student channels", "", "s", "of ours", "mean cost of the pairs"), rows)


def _mean_cost(found: dict[str, Any], work: str) -> str:
    mean = found["mean cost"].get(work)
    return "" if mean is None else f"{mean:.6f}"


def _maps(found: dict[str, Any]) -> tuple[str, str]:
    texts = {
        name: table(
            ("", "s", "of the forward passes"),
            [(work, f"{own['seconds']:.2f}", f"{own['ratio']['median']:.4f}") for work, own in each["works"].items()],
        )
        + f"\nThe maps differ from the decomposition's by at most {each['difference']:.1e}.\n"
        for name, each in found["pairs"].items()
    }
    return f"The maps of `mgd-align`, beside the forward passes of {found['images']} images", _by_group(texts)


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
By PyTorch's profiler. The time of an operator leaves out the operators that it calls; values are medians over the
runs. The profiler slows small operators down, and it does not show what the library's use of the caches costs the
networks. The times of whole steps are in the tables above.

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


TABLES: dict[str, Callable[[dict[str, Any]], tuple[str, str]]] = {
    "step": _step,
    "engine": functools.partial(_step, what="A step with a teacher on ONNX Runtime"),
    "tried-teachers": functools.partial(_step, what="Faster teachers that were tried"),
    "online": _online,
    "cached": _cached,
    "peers": functools.partial(_peers, peer="torchdistill"),
    "peers_lightly_train": functools.partial(_peers, peer="lightly-train"),
    "refresh": _refresh,
    "adaptive": _adaptive,
    "online-matching": _online_matching,
    "assign": _assign,
    "maps": _maps,
    "profile": _profile,
    "memory": _memory_table,
}
