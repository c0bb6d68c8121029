"""The section of docs/speed.md on what a large GPU has told (`python -m benchmarks gpu`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.harness import ratio
from benchmarks.tables import table

KERNELS = 12  # that a profile names
COMMAND = "`python -m benchmarks gpu --out benchmarks/results/speed`"


def section(found: dict[str, Any] | None) -> str:
    """What was measured, and what was not; without results, how to get them."""
    if found is None:
        return _NOT_YET
    results = found["results"]
    parts = {name: part["found"] for name, part in results["parts"].items()}
    head = (
        f"## {found['machine']['device']}\n\n{results['size']} px, batch {results['batch']}, {COMMAND}; seconds are "
        f"medians, ratios are taken by round.\n"
    )
    texts = [
        head,
        _left_out(results["parts"]),
        _steps("A step", parts["step"]),
        _steps("A compiled step", parts["compile"]),
        _refreshes(parts["refresh"], results["refresh images"]),
        _waits(parts["synchronisations"]),
        _peaks(parts["memory"]),
        *_kernels(parts["profile"]),
        _tests(parts["tests"]),
        _projection(results["projection"]),
    ]
    return "\n".join(text for text in texts if text)


_NOT_YET = f"""\
## A large GPU

Not measured yet. {COMMAND} measures it in eight minutes, with random weights and images.
It measures steps against the limit at 224 px and batch 256 (float32, bfloat16, channels last, compiled), refreshes, how
often a step waits for the GPU, memory, and the kernels of the loss. It runs the tests that need a GPU, and projects the
times to ImageNet-1K. `python -m benchmarks page` then puts the results here.
"""


def _left_out(parts: dict[str, Any]) -> str:
    lines = [
        f"- {name}: {', '.join(part['missing']) or 'nothing was measured'} ({part['why']})\n"
        for name, part in parts.items()
        if part["missing"] or part["why"]
    ]
    lines += [
        f"- {name}: {item} failed, {why}\n" for name, part in parts.items() for item, why in part["failed"].items()
    ]
    return f"Not measured:\n\n{''.join(lines)}" if lines else ""


def _steps(title: str, pairs: dict[str, Any]) -> str:
    rows = [
        (
            pair,
            form,
            work,
            f"{1000 * own['seconds']:.1f}",
            *(f"{own['ratio'][key]:.3f}" for key in ("median", "low", "high")),
        )
        for pair, forms in pairs.items()
        for form, works in forms.items()
        for work, own in works.items()
    ]
    text = table(("pair", "form", "", "ms", "of the limit", "low", "high"), rows)
    for pair, forms in pairs.items():
        for form, works in forms.items():
            if "limit compiled" in works:
                share = ratio(works["compiled"]["rounds"], works["limit compiled"]["rounds"])["median"]
                text += f"\n{pair}, {form}: {share:.3f} of the compiled limit.\n"
    return f"### {title}\n\n{text}" if rows else ""


def _refreshes(pairs: dict[str, Any], images: int) -> str:
    names = ("matchdistill", "matchdistill without assignments")
    rows = []
    for pair, forms in pairs.items():
        for form, own in forms.items():
            works = own["per image"]
            ratios = [f"{works[name]['ratio']['median']:.3f}" for name in names]
            rows.append(
                (pair, form, f"{1000 * works['forwards']['seconds']:.3f}", *ratios, f"{own['assignments']:.2f}")
            )
    head = ("pair", "form", "forwards, ms per image", "refresh, of the forwards", "without assignments", "s to assign")
    return f"### A refresh of {images:,} images\n\n{table(head, rows)}" if rows else ""


def _waits(pairs: dict[str, Any]) -> str:
    rows = [
        (pair, work, str(own["count"]), ", ".join(f"`{line}` {times}" for line, times in own["lines"].items()))
        for pair, found in pairs.items()
        for work, own in found["synchronisations"].items()
    ]
    return f"### How often the CPU waits\n\n{table(('pair', '', 'times', 'lines'), rows)}" if rows else ""


def _peaks(pairs: dict[str, Any]) -> str:
    rows = []
    for pair, peaks in pairs.items():
        for work, peak in peaks.items():
            base = peaks.get("step, limit" if work.startswith("step") else "refresh, forwards")
            rows.append((pair, work, f"{peak / 2**20:.0f}", f"{peak / base:.3f}" if base else ""))
    return f"### Peak memory\n\n{table(('pair', '', 'MiB', 'of the limit or the forwards'), rows)}" if rows else ""


def _kernels(pairs: dict[str, Any]) -> Iterator[str]:
    for pair, found in pairs.items():
        if kernels := found.get("kernels of the loss"):
            ordered = sorted(kernels, key=lambda name: -kernels[name])
            rows = [(f"`{name.replace('|', ' ')[:90]}`", f"{1000 * kernels[name]:.3f}") for name in ordered[:KERNELS]]
            rows.append(("others", f"{1000 * sum(kernels[name] for name in ordered[KERNELS:]):.3f}"))
            rows.append(("all", f"{1000 * sum(kernels.values()):.3f}"))
            yield f"### The loss alone, {pair}\n\n{table(('kernel', 'ms'), rows)}"


def _tests(found: dict[str, Any]) -> str:
    if not found:
        return ""
    tests = found["the suite"]["tests for a GPU"]
    counts = ", ".join(f"{len(tests[end])} {end}" for end in ("passed", "failed", "skipped"))
    named = "".join(f"- **failed**: {name}\n" for name in tests["failed"])
    return f"### Tests that need a GPU\n\n{counts}.\n" + (f"\n{named}" if named else "")


def _projection(pairs: dict[str, Any]) -> str:
    rows = [
        (
            pair,
            own["form"],
            f"{own['epoch']:.0f}",
            *("" if own[key] is None else f"{own[key]:.2f}" for key in ("refresh", "assignments")),
            "" if own["share"] is None else f"{own['share']:.1%}",
        )
        for pair, own in pairs.items()
    ]
    head = ("", "form", "s per epoch", "s per refresh", "s to assign", "refresh share")
    text = "Projected from the numbers above, for eight such GPUs. Loading keeps up, and no GPU waits for another.\n\n"
    return f"### ImageNet-1K\n\n{text}{table(head, rows)}" if rows else ""
