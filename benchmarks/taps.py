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
from torch.utils._pytree import tree_map_only

from benchmarks import reach, zoo
from benchmarks.reach import Value
from benchmarks.taps_doubts import MOST, Side, doubts
from benchmarks.taps_rows import PAIRS, STAGES
from benchmarks.taps_table import summary, table, verdict
from matchdistill import MatchingDistiller
from matchdistill.capture import Capture
from matchdistill.files import atomic_write, read_json, write_json

RESULTS = Path(__file__).parent / "results" / "taps.json"
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
    here.recv()  # its imports are no row's time
    return process, here


def _serve(work: Callable[[str], dict[str, Any]], pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    pipe.send("ready")
    while (name := pipe.recv()) is not None:
        start = time.perf_counter()
        try:
            row = work(name)
        except ImportError as error:
            row = {"skipped": str(error)}
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc(limit=-3)}
        pipe.send({**row, "in all": round(time.perf_counter() - start, 1)})
        gc.collect()


# What is measured


def measure(name: str) -> dict[str, Any]:
    """The row of that name, "stages MODEL" or "pair TEACHER -> STUDENT"."""
    torch.manual_seed(0)
    kind, _, rest = name.partition(" ")
    return stages_row(rest) if kind == "stages" else pair_row(rest)


def stages_row(model: str) -> dict[str, Any]:
    """Which of a model's deepest stages are tapped, when it is the student of its like."""
    teacher, student = zoo.build(model), zoo.build(model)
    stages = deepest_stages(features_of(student))
    if not stages:
        raise ValueError("none of its features was found: mend its entry in the zoo")
    row, distiller = constructed(teacher, student)
    taps = tapped(student, distiller, "student")
    sizes = {id(weight): weight.numel() for weight in student.model.parameters()}
    return {**row, "stages": [judged(stage, taps, sizes) for stage in stages]}


def pair_row(text: str) -> dict[str, Any]:
    """The taps of a pair, "TEACHER -> STUDENT" with " @ SIZE" for both, and what is doubtful about them."""
    text, _, size = text.partition(" @ ")
    teacher, student = (zoo.build(f"{spec} size={size}" if size else spec) for spec in text.split(" -> "))
    like = next(teacher.model.parameters())
    teacher.example = tree_map_only(
        Tensor, lambda value: value.to(like) if value.is_floating_point() else value, student.example
    )
    features = {"teacher": features_of(teacher), "student": features_of(student)}
    row, distiller = constructed(teacher, student)
    sides = {
        role: Side(features[role], tapped(network, distiller, role), weights_of(network), network.heads)
        for role, network in (("teacher", teacher), ("student", student))
    }
    flags = ["state changed"] * row.pop("changed") + doubts(sides["teacher"], sides["student"])
    if changes_in_training(student, distiller, sides["student"].taps):
        flags.append("student: other shapes in training")
    return {
        **row,
        "guided": sides["student"].guided,
        "stages": [len(sides[role].ends) for role in ("teacher", "student")],
        "flags": flags,
    }


def weights_of(network: zoo.Network) -> dict[int, int]:
    """The number of values of each parameter, by its identity."""
    return {id(weight): weight.numel() for weight in network.model.parameters()}


@torch.enable_grad()
def features_of(network: zoo.Network) -> list[Value]:
    """The values that the network's library names, from shallow to deep."""
    if network.intermediates is not None:
        named = [(f"feature {number}", None, [value]) for number, value in enumerate(network.intermediates())]
    else:
        with reach.returned(network.model, [path for path, _ in network.features]) as returned:
            network.model(*network.example)
        named = [(path, channels, returned[path]) for path, channels in network.features if returned.get(path)]
    found = []
    for path, channels, tensors in named:
        tensor = next((one for one in tensors if channels in one.shape[1:]), tensors[0])
        if tensor.ndim > 2 and tensor.shape[0] == zoo.BATCH:
            sizes = reach.position_sizes(tensor.shape, channels, network.sequence)
            found.append(Value(path, tuple(tensor.shape), sizes, frozenset(reach.leading_to([tensor]))))
    return found


def deepest_stages(features: Sequence[Value]) -> list[tuple[Value, frozenset[int]]]:
    """The last value of each of the four deepest stages, and the parameters that lead to it and not to the stage before."""
    found: list[tuple[Value, frozenset[int]]] = []
    for end in reach.last_of_each_size(features):
        own = end.parameters - (found[-1][0].parameters if found else frozenset())
        if own and end.positions > 1:  # a pooling alone is no stage
            found.append((end, own))
    return found[-MOST:]


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


def constructed(teacher: zoo.Network, student: zoo.Network) -> tuple[dict[str, Any], MatchingDistiller]:
    """The distiller, and its taps with the costs of its construction."""
    before = [state_of(network.model) for network in (teacher, student)]
    start = time.perf_counter()
    with peak_memory() as peak:
        distiller = MatchingDistiller(teacher.model, student.model, example=student.example)
    seconds = time.perf_counter() - start
    changed = [state_of(network.model) for network in (teacher, student)] != before
    taps = [
        {
            "teacher": str(position.teacher),
            "student": str(position.student),
            "channels": [position.teacher_channels, position.student_channels],
            "sizes": [list(sizes) for sizes in position.spatial],
        }
        for position in distiller.positions
    ]
    return {"taps": taps, "seconds": round(seconds, 2), "MiB": round(peak[0], 1), "changed": changed}, distiller


@torch.enable_grad()
def tapped(network: zoo.Network, distiller: MatchingDistiller, role: str) -> list[Value]:
    """The values that the distiller takes of the network in a real pass."""
    network.model.eval().requires_grad_(True)
    number = ("teacher", "student").index(role)
    taps = [getattr(position, role) for position in distiller.positions]
    with Capture(network.model, taps)() as captured:
        network.model(*network.example)
    values = [captured.values[place] for place in range(len(taps))]
    return [
        Value(str(tap), tuple(value.shape), tuple(position.spatial[number]), frozenset(reach.leading_to([value])))
        for tap, value, position in zip(taps, values, distiller.positions, strict=True)
    ]


def changes_in_training(network: zoo.Network, distiller: MatchingDistiller, taps: Sequence[Value]) -> bool:
    """Whether a value that is compared has other axes or channels in training mode; False where it wants targets there."""
    network.model.train()
    try:
        with (
            torch.no_grad(),
            Capture(network.model, [position.student for position in distiller.positions])() as captured,
        ):
            network.model(*network.example)
    except Exception:
        return False
    finally:
        network.model.eval()
    return any(tuple(captured.values[place].shape) != tap.shape for place, tap in enumerate(taps))


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
