"""How right the automatically chosen taps are, on networks that nobody here wrote.

`stages`: for one model of each family, has each of its four deepest stages, as its own library names them, a tap of the
stage's map size that all of the stage's weights lead to? `pairs`: for pairs that people distil, which taps are chosen, which
share of the student's body leads to one, and what is doubtful about them?

What leads to a value is read from autograd's graph of a real pass (see `reach`), not from the library's trace.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import importlib.metadata
import math
import multiprocessing as mp
import re
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks import reach, zoo
from benchmarks.reach import Value
from benchmarks.taps_rows import PAIRS, REVIEWED, STAGES
from matchdistill import MatchingDistiller
from matchdistill.files import atomic_write, read_json, write_json

RESULTS = Path(__file__).parent / "results" / "taps.json"
MOST = 4  # stages, and positions
LIBRARIES = (
    "timm torch torchvision transformers segmentation-models-pytorch ultralytics monai open-clip-torch peft".split()
)


def run(
    kind: Literal["all", "stages", "pairs"] = "all",
    only: str = "",
    jobs: int = 1,
    timeout: float = 180.0,
    resume: bool = False,
    path: Path | None = None,
) -> None:
    """Measure the rows, each written as soon as it is there, and make the table.

    Args:
        kind: which rows.
        only: an expression; rows whose name it is found in.
        jobs: processes at once.
        timeout: seconds that a row may take.
        resume: leave out what the file has already.
        path: of the results, JSON; the table lies beside it. None: the repository's.
    """
    path = path or RESULTS
    known = read_json(path)["rows"] if path.exists() else {}
    names = [f"stages {model}" for model in STAGES] * (kind != "pairs") + [f"pair {pair}" for pair in PAIRS] * (
        kind != "stages"
    )
    wanted = [name for name in names if re.search(only, name) and not (resume and name in known)]
    lock, start = threading.Lock(), time.monotonic()

    def keep(name: str, row: dict[str, Any]) -> None:
        with lock:
            known[name] = row
            write_json(path, {"versions": versions(), "rows": known})
            print(f"{time.monotonic() - start:5.0f} s  {name}: {verdict(row)}", flush=True)

    each_in_a_process(measure, wanted, keep, jobs, timeout)
    atomic_write(path.with_suffix(".md"), lambda temporary: temporary.write_text(table(known)))
    for line in summary(known):
        print(line)


def versions() -> dict[str, str]:
    """Of the libraries that are installed."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# The runner


def each_in_a_process(
    work: Callable[[str], dict[str, Any]],
    names: Sequence[str],
    keep: Callable[[str, dict[str, Any]], None],
    jobs: int,
    timeout: float,
) -> None:
    """Have other processes work on each name; one that fails or takes too long does not stop the others."""
    waiting = collections.deque(names)

    def serve() -> None:
        process = None
        while True:
            try:
                name = waiting.popleft()
            except IndexError:
                break
            if process is None:
                process, pipe = _worker(work)
            pipe.send(name)
            try:
                row = pipe.recv() if pipe.poll(timeout) else {"error": f"took more than {timeout:.0f} s"}
            except EOFError:
                row = {"error": "its process died"}
            if row.get("error", "").startswith(("took", "its process")):
                process.kill()
                process = None
            keep(name, row)
        if process is not None:
            pipe.send(None)
            process.join()

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _worker(work: Callable[[str], dict[str, Any]]) -> tuple[Any, Any]:
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(work, there), daemon=True)
    process.start()
    there.close()
    return process, here


def _serve(work: Callable[[str], dict[str, Any]], pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    while (name := pipe.recv()) is not None:
        try:
            row = work(name)
        except zoo.MissingLibraryError as error:
            row = {"skipped": str(error)}
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc(limit=-3)}
        pipe.send(row)
        gc.collect()


# What is measured


def measure(name: str) -> dict[str, Any]:
    """The row of that name, "stages MODEL" or "pair TEACHER -> STUDENT"."""
    torch.manual_seed(0)
    kind, _, rest = name.partition(" ")
    return stages_row(rest) if kind == "stages" else pair_row(*rest.split(" -> "))


def stages_row(model: str) -> dict[str, Any]:
    """Which of a model's deepest stages are tapped, when it is the student of its like."""
    teacher, student = zoo.build(model), zoo.build(model)
    stages = deepest_stages(features_of(student))
    row, taps = constructed(teacher, student)
    sizes = {id(weight): weight.numel() for weight in student.model.parameters()}
    return {**row, "stages": [judged(stage, taps, sizes) for stage in stages]}


def pair_row(teacher: str, student: str) -> dict[str, Any]:
    """The taps of a pair, and what is doubtful about them."""
    raise NotImplementedError


@torch.enable_grad()
def features_of(network: zoo.Network) -> list[Value]:
    """The values that the network's library names, from shallow to deep."""
    with reach.returned(network.model, [path for path, _ in network.features]) as returned:
        network.model(*network.example)
    found = []
    for path, channels in network.features:
        if path not in returned:
            continue
        tensors = returned[path]
        tensor = next((one for one in tensors if channels in one.shape[1:]), tensors[0])
        sizes = reach.position_sizes(tensor.shape, channels, network.sequence)
        found.append(Value(path, tuple(tensor.shape), sizes, frozenset(reach.leading_to([tensor]))))
    return found


def deepest_stages(features: Sequence[Value]) -> list[tuple[Value, frozenset[int]]]:
    """The last value of each of the four deepest stages, and the parameters that lead to it and not to the stage before."""
    ends = reach.last_of_each_size(features)
    own = [
        end.parameters - (before.parameters if before else frozenset())
        for before, end in zip([None, *ends], ends, strict=False)
    ]
    return list(zip(ends, own, strict=True))[-MOST:]


def judged(stage: tuple[Value, frozenset[int]], taps: Sequence[Value], sizes: dict[int, int]) -> dict[str, Any]:
    """Whether a tap on the stage's map has all of the stage's parameters before it; else how much the best one lacks."""
    end, own = stage
    lacking = {
        tap.name: sum(sizes[weight] for weight in own - tap.parameters) / max(1, sum(sizes[weight] for weight in own))
        for tap in taps
        if reach.same_size(tap, end)
    }
    best = min(lacking, key=lambda name: lacking[name], default=None)
    return {"stage": end.name, "sizes": end.sizes, "tap": best, "lacks": lacking[best] if best is not None else 1.0}


def constructed(teacher: zoo.Network, student: zoo.Network) -> tuple[dict[str, Any], list[Value]]:
    """The distiller's taps with the costs of its construction, and the student's values there."""
    before = [state_of(network.model) for network in (teacher, student)]
    start = time.perf_counter()
    with peak_memory() as peak:
        distiller = MatchingDistiller(teacher.model, student.model, example=student.example)
    seconds = time.perf_counter() - start
    changed = [state_of(network.model) for network in (teacher, student)] != before
    with torch.enable_grad(), distiller.capture() as captured:
        student.model.eval()(*student.example)
    values = [
        Value(
            str(position.student),
            tuple(captured.values[number].shape),
            tuple(position.spatial[1]),
            frozenset(reach.leading_to([captured.values[number]])),
        )
        for number, position in enumerate(distiller.positions)
    ]
    taps = [
        {
            "teacher": str(position.teacher),
            "student": str(position.student),
            "channels": (position.teacher_channels, position.student_channels),
            "sizes": position.spatial,
        }
        for position in distiller.positions
    ]
    return {"taps": taps, "seconds": round(seconds, 2), "MiB": round(peak[0], 1), "changed": changed}, values


def state_of(model: nn.Module) -> list[Any]:
    """What a construction must not change: the tensors by place and version, the modes, and the random state."""
    tensors = [(name, id(value), value._version) for name, value in model.state_dict(keep_vars=True).items()]
    return [tensors, [module.training for module in model.modules()], torch.get_rng_state().tolist()]


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The most memory in MiB that the process took within the block beyond what it had before; 0 where that is not told."""
    found = [0.0]
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        before = math.inf
    yield found
    if before < math.inf:
        found[0] = max(0.0, _status("VmHWM") - before)


def _status(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(match[1]) / 1024 if match else 0.0


# What is made of the rows


def verdict(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if "skipped" in row:
        return f"skipped, {row['skipped']}"
    if "error" in row:
        return f"FAILS {row['error'].splitlines()[0][:160]}"
    costs = f"{row['seconds']:.2f} s, {row['MiB']:.0f} MiB" + (", STATE CHANGED" if row["changed"] else "")
    if "stages" in row:
        wrong = [stage for stage in row["stages"] if stage["lacks"] > 0]
        text = f"{len(row['stages']) - len(wrong)} of {len(row['stages'])} stages"
        return "; ".join([text, *(described(stage) for stage in wrong), costs])
    return "; ".join([", ".join(row["flags"]) or "good", costs])


def described(stage: dict[str, Any]) -> str:
    """A stage that is not tapped."""
    size = " x ".join(map(str, stage["sizes"]))
    if stage["tap"] is None:
        return f"{stage['stage']} ({size}) has no tap"
    return f"{stage['tap']} leaves out {stage['lacks']:.2%} of {stage['stage']} ({size})"


def summary(rows: dict[str, Any]) -> list[str]:
    """The counts over all rows."""
    lines = []
    models = {name: row for name, row in rows.items() if name.startswith("stages ") and "skipped" not in row}
    for library in dict.fromkeys(name.split()[1].partition(":")[0] for name in models):
        own = [row for name, row in models.items() if name.startswith(f"stages {library}:")]
        stages = [stage for row in own for stage in row.get("stages", [])]
        right = sum(stage["lacks"] == 0 for stage in stages)
        failing = sum("error" in row for row in own)
        lines.append(
            f"{library}: {right} of {len(stages)} stages of {len(own)} models are tapped, {failing} models fail"
        )
    return lines


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["# Where the taps lie", "", *(f"- {line}" for line in summary(rows)), ""]
    lines += ["| model | stages tapped | not tapped | s | MiB |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if not name.startswith("stages "):
            continue
        if "stages" not in row:
            lines.append(f"| {name[7:]} | {verdict(row)} | | | |")
            continue
        wrong = [described(stage) for stage in row["stages"] if stage["lacks"] > 0]
        count = f"{len(row['stages']) - len(wrong)} of {len(row['stages'])}"
        lines.append(f"| {name[7:]} | {count} | {'; '.join(wrong)} | {row['seconds']:.2f} | {row['MiB']:.0f} |")
    return "\n".join(lines) + "\n"
