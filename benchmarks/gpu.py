"""Everything that a large GPU has to tell, by one command with a budget of time.

Each part runs in a process of its own, which is ended when its time is over. What it had measured by then is kept, and
what it had not is named.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks import projection
from benchmarks.gpu_parts import LARGE, PARTS, TOY, Scale
from benchmarks.harness import RESULTS, save
from benchmarks.pairs import chosen
from matchdistill.files import read_json, write_json

SECONDS = 450.0  # of 480: the rest starts Python and ends processes

Work = Callable[..., None]


def measure(name: str, scale: Scale, file: Path, seconds: float) -> None:
    """Measure the items of a part one by one, as long as the next one is likely to be done in time.

    The file has the names of all items, what was measured of each, and the error of each that failed.
    """
    began = time.monotonic()
    items = list(PARTS[name].items(scale))
    state: dict[str, Any] = {"items": [item.name for item in items], "found": {}, "failed": {}}
    write_json(file, state)
    longest = 0.0
    for item in items:
        started = time.monotonic()
        if started - began + longest > seconds:
            break
        if scale.device == "cuda":
            gc.collect()  # networks lie in cycles, and would be counted as held
            torch.cuda.empty_cache()
        try:
            state["found"].setdefault(item.of, {})[item.what] = item.work()
        except Exception as error:  # one result less, and the others stand
            traceback.print_exc()
            state["failed"][item.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        longest = max(longest, time.monotonic() - started)
        write_json(file, state)


def alone(work: Work, args: tuple[Any, ...], seconds: float) -> str | None:
    """Run some work in a process of its own for so long at most; what went wrong, if something did."""
    process = mp.get_context("spawn").Process(target=_leading, args=(work, args))
    process.start()
    over = True
    try:
        process.join(seconds)
        over = process.exitcode is None
    finally:  # by Ctrl-C too, which does not reach it
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # the compilers that it started end with it
        process.kill()
        process.join()
    if over:
        return f"the time was over after {seconds:.0f} s"
    return None if process.exitcode == 0 else f"its process ended with {process.exitcode}"


def _leading(work: Work, args: tuple[Any, ...]) -> None:
    os.setsid()  # at the head of a group, which is ended as one
    work(*args)


def part(name: str, scale: Scale, folder: Path, seconds: float, run: Callable[..., str | None]) -> dict[str, Any]:
    """What a part found, the names of the items that it did not come to, and why."""
    file = folder / f"{name}.json"
    started = time.monotonic()
    ended = run(measure, (name, scale, file, seconds), seconds)
    read = read_json(file) if file.exists() else {"items": [], "found": {}, "failed": {}}
    done = {f"{of}, {what}" for of, own in read["found"].items() for what in own}
    missing = [item for item in read["items"] if item not in done and item not in read["failed"]]
    if missing and ended is None:
        ended = f"its {seconds:.0f} s were too few"
    return {
        "seconds": time.monotonic() - started,
        "share": seconds,
        "found": read["found"],
        "missing": missing,
        "failed": read["failed"],
        "why": ended if missing or not read["items"] else None,
    }


def projected(parts: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """Training on ImageNet-1K by pair, from the steps and refreshes of the form that trains fastest."""
    found = {}
    for name in chosen("all"):
        forms = parts.get("step", {}).get("found", {}).get(name, {})
        refreshes = parts.get("refresh", {}).get("found", {}).get(name, {})
        if forms:
            form = min(forms, key=lambda each: forms[each]["matchdistill"]["seconds"])
            own = refreshes.get(form) or next(iter(refreshes.values()), None)
            seconds = forms[form]["matchdistill"]["seconds"] / scale.batch
            found[name] = {"form": form, **projection.from_measured(seconds, own)}
    return found


def run(out: Path = RESULTS, toy: bool = False, seconds: float = SECONDS) -> None:
    """Measure steps, refreshes, waits, memory, kernels, compiled networks and tests on a GPU, in eight minutes at most.

    Nothing is needed but the repository: weights and images are random. The results go to OUT/gpu.json after every part.
    From the default folder `python -m benchmarks page` brings them into docs/speed.md.

    Args:
        out: folder of the results.
        toy: run on the CPU at a size that shows that all of it works, and no speed; the file is OUT/gpu_toy.json. It is so
            without a GPU, too.
        seconds: of all parts together. Each part has its share, and what one leaves goes to the next. What does not fit is
            named in the results.

    Raises:
        ValueError: too few seconds.
        SystemExit: something failed; everything else was measured and saved.
    """
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: expected a positive number")
    if not toy and not torch.cuda.is_available():
        print("no GPU: everything runs on the CPU at toy size, and shows no speed", flush=True)
        toy = True
    failed = measure_all(TOY if toy else LARGE, out / ("gpu_toy.json" if toy else "gpu.json"), seconds, alone)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def measure_all(scale: Scale, file: Path, seconds: float, run: Callable[..., str | None]) -> list[str]:
    """Run all parts, save after each, and return what failed."""
    began = time.monotonic()
    shares = 0.0
    parts: dict[str, Any] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, own in PARTS.items():
            shares += own.share
            left = shares * seconds - (time.monotonic() - began)
            parts[name] = found = part(name, scale, Path(folder), max(left, 1.0), run)
            failed += [f"{name}: {item} ({why})" for item, why in found["failed"].items()]
            if not found["found"] and not found["failed"]:
                failed.append(f"{name}: nothing was measured ({found['why']})")
            said = "".join(f"; not measured: {item}" for item in (*found["missing"], *found["failed"]))
            print(f"{name}: {found['seconds']:.0f} of {found['share']:.0f} s{said}", flush=True)
            results = {"size": scale.size, "batch": scale.batch, "refresh images": scale.batch * scale.batches}
            results |= {"seconds": seconds, "parts": parts, "projection": projected(parts, scale)}
            save(file, "gpu", scale.device, results)
    return failed
