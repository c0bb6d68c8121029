"""What is made of the rows of the taps' measurement: lines, counts, and the table."""

from __future__ import annotations

from typing import Any

from benchmarks.taps_rows import REVIEWED

NORM = 0.01  # so much of a stage's weights at most are a norm or scale after its last activation or sum


def verdict(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if "skipped" in row:
        return f"skipped, {row['skipped']}"
    if "error" in row:
        return f"FAILS {row['error'].splitlines()[0][:160]}"
    costs = f"{row['seconds']:.2f} s, {row['MiB']:.0f} MiB" + (", STATE CHANGED" if row.get("changed") else "")
    if "flags" not in row:
        wrong = [stage for stage in row["stages"] if stage["lacks"] > NORM]
        text = f"{len(row['stages']) - len(wrong)} of {len(row['stages'])} stages"
        return "; ".join([text, *(described(stage) for stage in wrong), costs])
    return "; ".join([*row["flags"], costs]) if row["flags"] else f"good; {costs}"


def described(stage: dict[str, Any]) -> str:
    """A stage that is not tapped."""
    size = " x ".join(map(str, stage["sizes"]))
    if stage["tap"] is None:
        return f"{stage['stage']} ({size}) has no tap"
    return f"{stage['tap']} leaves out {stage['lacks']:.2%} of {stage['stage']} ({size})"


def summary(rows: dict[str, Any]) -> list[str]:
    """The counts over all rows."""
    lines = []
    measured = {name: row for name, row in rows.items() if "skipped" not in row}
    models = {name.removeprefix("stages "): row for name, row in measured.items() if name.startswith("stages ")}
    for library in [*dict.fromkeys(name.partition(":")[0] for name in models), ""]:
        own = [row for name, row in models.items() if name.startswith(f"{library}:") or not library]
        stages = [stage for row in own for stage in row.get("stages", [])]
        right = sum(stage["lacks"] <= NORM for stage in stages)
        but = sum(0 < stage["lacks"] <= NORM for stage in stages)
        failing = sum("error" in row for row in own)
        lines.append(
            f"{library or 'all'}: {right} of {len(stages)} stages of {len(own)} models are tapped ({but} of them but for a "
            f"norm or scale); {failing} models fail"
        )
    pairs = [(name, row) for name, row in measured.items() if name.startswith("pair ")]
    failing = sum("error" in row for _, row in pairs)
    flagged = sum(bool(row.get("flags")) for _, row in pairs)
    reviewed = sum(bool(row.get("flags")) and name in REVIEWED for name, row in pairs)
    lines.append(
        f"{len(pairs)} pairs: {len(pairs) - failing - flagged} good, {flagged} flagged ({reviewed} of them reviewed and "
        f"right), {failing} fail"
    )
    return lines + [f"{len(rows) - len(measured)} rows skipped"] * (len(rows) > len(measured))


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["# Where the taps lie", "", "`python -m benchmarks taps`", "", *(f"- {line}" for line in summary(rows))]
    lines += ["", "## Stages", "", "| model | tapped | not tapped | s | MiB |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if not name.startswith("stages "):
            continue
        if "stages" not in row:
            lines.append(f"| {name[7:]} | | {escaped(verdict(row))} | | |")
            continue
        wrong = [described(stage) for stage in row["stages"] if stage["lacks"] > NORM]
        count = f"{len(row['stages']) - len(wrong)} of {len(row['stages'])}"
        lines.append(f"| {name[7:]} | {count} | {'; '.join(wrong)} | {row['seconds']:.2f} | {row['MiB']:.0f} |")
    lines += ["", "## Pairs", "", "| pair | taps | guided | flags | s | MiB |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        if not name.startswith("pair "):
            continue
        pair = name[5:].replace(" -> ", " → ")
        if "taps" not in row:
            lines.append(f"| {pair} | | | {escaped(verdict(row))} | | |")
            continue
        taps = "<br>".join(abbreviated(tap) for tap in row["taps"])
        doubtful = "; ".join(row["flags"])
        if name in REVIEWED and row["flags"]:
            doubtful += f" (right: {REVIEWED[name]})"
        costs = f"{row['seconds']:.2f} | {row['MiB']:.0f}"
        lines.append(f"| {pair} | {taps} | {row['guided']:.1%} | {doubtful} | {costs} |")
    return "\n".join(lines) + "\n"


def abbreviated(tap: dict[str, Any]) -> str:
    """A position in short, "teacher (C, sizes) → student (C, sizes)"."""
    names = [tap[role].replace(":output", "").replace(":input", " in") for role in ("teacher", "student")]
    described = [
        f"{name} ({channels}, {' x '.join(map(str, sizes))})"
        for name, channels, sizes in zip(names, tap["channels"], tap["sizes"], strict=True)
    ]
    return " → ".join(described)


def escaped(text: str) -> str:
    """Without what would end a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
