"""What is left of runs that are killed at random moments, and of those that are killed as they write."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import save
from matchdistill.files import PARTIAL
from matchdistill.runs import evidence
from matchdistill.runs.averaging import TRAINED
from matchdistill.runs.history import HISTORY

RESULTS = Path(__file__).parent / "results" / "kills.json"
TINY = (
    "quickstart --data.train_limit 60 --data.val_limit 50 --data.batch_size 20 --training.epochs 10 --training.lr 0.05 "
    "--student.options.width 2 --teacher.options.width 4 --distillation.refresh_images 60 --trainer.accelerator cpu"
).split()
TRAINED_TEACHER = ["--teacher.training.epochs", "3", "--teacher.train_limit", "60"]
UNTRAINED_TEACHER = ["--teacher.training.epochs", "0"]
KINDS = {
    "teacher first": ["fit", *TINY, *TRAINED_TEACHER, "--distillation.method", "mgd-rd+kd"],
    "moving average": ["fit", *TINY, *UNTRAINED_TEACHER, "--training.ema", "0.8", "--training.accumulate", "2"],
    "online matching": ["fit", *TINY, *UNTRAINED_TEACHER, "--distillation.refresh_online", "2"],
    "refresh with a tolerance": ["fit", *TINY, *UNTRAINED_TEACHER, "--distillation.refresh_tolerance", "0.01"],
    "compare --jobs 2": [
        "compare",
        *TINY,
        *TRAINED_TEACHER,
        "--methods",
        "none,mgd-amp",
        "--seeds",
        "2",
        "--jobs",
        "2",
    ],
}
# What a checkpoint must have in common with that of the uncut run, bit for bit.
LASTING = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "results", TRAINED)
ALIKE = ("student.safetensors", "model.json", "recipe.yaml")
SEEN = (evidence.FIRST, evidence.LAST, evidence.FINAL, evidence.PICTURES)
LONGEST = 600.0  # seconds of a command
FORKS = multiprocessing.get_context("forkserver")


@dataclass
class Tally:
    """What became of the runs of a kind.

    Attributes:
        runs: how many were begun and, after their kills, finished.
        kills: by SIGKILL.
        writing: of these, how many left a half-written file.
        lost: runs whose checkpoint fell back or could not be gone on from.
        unequal: runs that did not end bit for bit as the uncut one.
        stray: runs that left other files than the uncut one.
        told: what was wrong.
    """

    runs: int = 0
    kills: int = 0
    writing: int = 0
    lost: int = 0
    unequal: int = 0
    stray: int = 0
    told: list[str] = field(default_factory=list)


def run(kills: int = 100, kinds: list[str] | None = None, cuts: int = 4, seed: int = 0, out: Path = RESULTS) -> None:
    """Kill runs, resume them, kill them again, and compare their ends with uncut ones.

    Half of the kills come at random moments, half as soon as a random file is being written.

    Args:
        kills: how many in all, shared among the kinds.
        kinds: which; None: all.
        cuts: the most kills of one run.
        seed: of the moments.
        out: the file of results, which is written as they come.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    chance = random.Random(seed)
    chosen = list(KINDS) if kinds is None else kinds
    tallies: dict[str, Tally] = {}
    begun = time.monotonic()
    Process.warm_up()
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(chosen):
            share = kills * (number + 1) // len(chosen) - kills * number // len(chosen)
            tallies[kind] = tally = Tally()
            whole = Path(folder, "whole", *Path(kind).parts)
            seconds = _uncut(kind, whole)
            while tally.kills < share:
                victim = Path(folder, "run")
                _victim(kind, victim, whole, seconds, min(cuts, share - tally.kills), chance, tally)
                shutil.rmtree(victim)
                found = {name: asdict(each) for name, each in tallies.items()}
                results = {"kinds": found, "seconds": round(time.monotonic() - begun)}
                save(out, "kills", "cpu", results)
                print(f"{kind}: {json.dumps(asdict(tally))}", flush=True)


def _uncut(kind: str, out: Path) -> float:
    process = Process(kind, out)
    assert process.wait() == 0, f"{kind} fails without a kill"
    return process.seconds


def _victim(kind: str, out: Path, whole: Path, seconds: float, cuts: int, chance: random.Random, tally: Tally) -> None:
    """Begin a run, cut it, let it end, and see what has become of it."""
    tally.runs += 1
    reached: dict[Path, int] = {}
    for cut in range(cuts):
        process = Process(kind, out)
        # The later ones sooner: there is less left to do.
        moment, sighting = chance.uniform(0, seconds / (1 + cut)), chance.randint(1, 24 // (1 + cut))
        due = _moment(process, moment) if chance.random() < 0.5 else _sighting(out, sighting)
        while not due() and process.runs():
            pass
        if not process.kill():
            break  # it had ended
        tally.kills += 1
        tally.writing += any(out.rglob(f".*{PARTIAL}*"))
        for path, epoch in _epochs(out).items():
            if epoch < reached.get(path, 0):
                tally.lost += 1
                tally.told.append(f"{path} fell back from epoch {reached[path]} to {epoch}")
            reached[path] = epoch
    if (code := Process(kind, out).wait()) != 0:
        tally.lost += 1
        tally.told.append(f"{out}: the last resume ended with {code}")
        return
    if differing := differences(out, whole):
        tally.unequal += 1
        tally.told.append(f"differs in {', '.join(differing)}")
    if stray := files(out) ^ files(whole):
        tally.stray += 1
        tally.told.append(f"has or lacks {', '.join(sorted(stray))}")


def _moment(process: Process, moment: float) -> Callable[[], bool]:
    def due() -> bool:
        time.sleep(0.001)
        return process.seconds >= moment

    return due


def _sighting(out: Path, number: int) -> Callable[[], bool]:
    """When so many files have been seen half-written."""
    seen: set[Path] = set()

    def due() -> bool:
        time.sleep(0.0005)
        seen.update(out.rglob(f".*{PARTIAL}*"))
        return len(seen) >= number

    return due


class Process:
    """A command in a process of its own, as `matchdistill` would run it, with `--resume` where it has that."""

    def __init__(self, kind: str, out: Path) -> None:
        arguments = [*KINDS[kind], "--out", str(out)]
        self._began = time.monotonic()
        self._fork: multiprocessing.process.BaseProcess | None = None
        self._command: subprocess.Popen[bytes] | None = None
        if arguments[0] == "fit":
            # Forked from a server that has imported everything: a kill meets the run, not Python's start.
            self._fork = FORKS.Process(target=_command, args=([*arguments, "--resume"],))
            self._fork.start()
        else:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self._command = subprocess.Popen([sys.executable, "-m", "matchdistill", *arguments], **quiet)

    @staticmethod
    def warm_up() -> None:
        """Start the server, so that no run waits for it."""
        FORKS.set_forkserver_preload(["matchdistill.runs.train", "matchdistill.cli"])
        first = FORKS.Process(target=_command, args=(["--version"],))
        first.start()
        first.join()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def runs(self) -> bool:
        """Whether it has not ended."""
        if self._fork is not None:
            return self._fork.is_alive()
        assert self._command is not None
        return self._command.poll() is None

    def kill(self) -> bool:
        """Kill it; returns whether it lived."""
        process: Any = self._fork or self._command
        process.kill()
        return self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        if self._fork is not None:
            self._fork.join(LONGEST)
            return -1 if self._fork.exitcode is None else self._fork.exitcode
        assert self._command is not None
        return self._command.wait(LONGEST)


def _command(arguments: list[str]) -> None:
    from matchdistill.cli import main

    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.exit(main(arguments))


def _epochs(out: Path) -> dict[Path, int]:
    """How many epochs each checkpoint has behind it."""
    return {path: torch.load(path, weights_only=True)["epoch"] + 1 for path in out.rglob("last.ckpt")}


def files(out: Path) -> set[str]:
    """What lies in a folder, but for the logs, of which every resume has its own."""
    found = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    return {str(path) for path in found if "logs" not in path.parts}


def differences(out: Path, whole: Path) -> list[str]:
    """What is not the same in two folders of runs or of a comparison, bit for bit and but for times."""
    found = []
    for recipe in sorted(whole.rglob("recipe.yaml")):
        place = recipe.parent.relative_to(whole)
        first, second = out / place, whole / place
        found += [str(place / name) for name in ALIKE if _bytes(first / name, out) != _bytes(second / name, whole)]
        for name in ("metrics.json", evidence.REFRESHES, evidence.EPOCHS):
            if (second / name).is_file():
                values = [_timeless(json.loads((each / name).read_text())) for each in (first, second)]
                found += [str(place / name)] * (values[0] != values[1])
        for name in SEEN:
            seen = [evidence.load(each / name) or ({}, {}) for each in (first, second)]
            alike = same(seen[0][0], seen[1][0]) and _timeless(seen[0][1]) == _timeless(seen[1][1])
            found += [str(place / name)] * (not alike)
        if (second / "last.ckpt").is_file():
            checkpoints = [torch.load(each / "last.ckpt", weights_only=True) for each in (first, second)]
            found += [
                str(place / "last.ckpt" / key)
                for key in LASTING
                if not same(checkpoints[0].get(key), checkpoints[1].get(key))
            ]
            histories = [_timeless(each[HISTORY]["epochs"]) for each in checkpoints]
            if histories[0] != histories[1]:
                found.append(str(place / "last.ckpt" / HISTORY))
    return found


def _bytes(path: Path, root: Path) -> bytes | None:
    """The content of a file; paths in its folder are as in any other."""
    return path.read_bytes().replace(str(root.resolve()).encode(), b"") if path.is_file() else None


def _timeless(value: Any) -> Any:
    """Values without times."""
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if "second" not in key}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def same(first: Any, second: Any) -> bool:
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def table(results: dict[str, Any]) -> str:
    """The results as a table of the documentation."""
    heads = ("", "runs", "kills", "left a half-written file", "lost", "not bit-equal", "stray files")
    keys = ("runs", "kills", "writing", "lost", "unequal", "stray")
    rows = [[kind, *(str(each[key]) for key in keys)] for kind, each in results["kinds"].items()]
    rows.append(["all", *(str(sum(each[key] for each in results["kinds"].values())) for key in keys)])
    lines = [heads, ["---"] + ["---:"] * len(keys), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
