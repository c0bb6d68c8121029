"""What `gpu` measures, as parts made of items: each item is one result that is saved as soon as it is there.

An item is named by what it is of, mostly a pair of networks, and by what is measured.

Axes: N batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor

from benchmarks import memory, profiled, refresh, step
from benchmarks.harness import interleaved, summary, synchronize
from benchmarks.pairs import Pair, chosen, random_batch

ROOT = Path(__file__).parents[1]
SYNCHRONISING = "called a synchronizing"  # in PyTorch's warning
TESTS = "mark.gpu"  # in the files of tests that have some for a GPU


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        device: where.
        size: pixels of a side of the images.
        batch: images of a step.
        rounds: how often each step is timed.
        batches: of a refresh.
        refresh_rounds: how often each refresh is timed.
        whole: whether whole steps are compiled, too, and not the loss alone.
    """

    device: str
    size: int
    batch: int
    rounds: int
    batches: int
    refresh_rounds: int
    whole: bool


LARGE = Scale("cuda", size=224, batch=256, rounds=15, batches=20, refresh_rounds=3, whole=True)
TOY = Scale("cpu", size=64, batch=2, rounds=2, batches=2, refresh_rounds=1, whole=False)


class Item(NamedTuple):
    """One result: what it is of, what is measured, and the work that measures it."""

    of: str
    what: str
    work: Callable[[], Any]

    @property
    def name(self) -> str:
        """What is said of it where it is missing."""
        return f"{self.of}, {self.what}"


class Form(NamedTuple):
    """How the networks run: under autocast to bfloat16, and with channels in the last place of memory."""

    bf16: bool = False
    channels_last: bool = False

    def pair(self, pair: Pair) -> Pair:
        """The networks in this layout."""
        if not self.channels_last:
            return pair
        makers = {name: functools.partial(_in_channels_last, getattr(pair, name)) for name in ("teacher", "student")}
        return dataclasses.replace(pair, **makers)

    def images(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in this layout."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def autocast(self, device: str) -> AbstractContextManager[Any]:
        """What a step or a refresh is called in."""
        return torch.autocast(device, torch.bfloat16) if self.bf16 else contextlib.nullcontext()


FORMS = {
    "float32": Form(),
    "bf16": Form(bf16=True),
    "channels_last": Form(channels_last=True),
    "bf16 + channels_last": Form(bf16=True, channels_last=True),
}
STEPS = ("limit", "matchdistill", "prepared", "alone")
LOSS_COMPILED = ("limit", "matchdistill", "prepared + compiled loss")
WHOLE_COMPILED = ("limit", "matchdistill", "limit compiled", "compiled")


def _in_channels_last(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    return make().to(memory_format=torch.channels_last)


def _in_form(form: Form, device: str, work: Callable[..., object]) -> Callable[..., None]:
    def run(*args: Any) -> None:
        with form.autocast(device):
            work(*args)

    return run


def timed_steps(scale: Scale, pair: Pair, form: Form, names: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of steps, in turn, and their ratios to the limit in the same form."""
    images, labels = random_batch(scale.size, scale.batch, scale.device)
    images = form.images(images)
    works = {name: _in_form(form, scale.device, step.MAKERS[name](form.pair(pair), images, labels)) for name in names}
    return summary(interleaved(works, scale.rounds, scale.device), "limit")


def steps(scale: Scale) -> Iterator[Item]:
    """Steps beside the limit, in every form."""
    for form, own in FORMS.items():
        for name, pair in chosen("all").items():
            yield Item(name, form, functools.partial(timed_steps, scale, pair, own, STEPS))


def compiled(scale: Scale) -> Iterator[Item]:
    """Steps with a compiled loss, then whole steps and the limit as `torch.compile` makes them."""
    kinds = [("compiled loss, float32", LOSS_COMPILED, FORMS["float32"])]
    if scale.whole:
        kinds += [
            ("compiled step, float32", WHOLE_COMPILED, FORMS["float32"]),
            ("compiled step, bf16 + channels_last", WHOLE_COMPILED, FORMS["bf16 + channels_last"]),
        ]
    for kind, names, form in kinds:
        for name, pair in chosen("all").items():
            yield Item(name, kind, functools.partial(timed_steps, scale, pair, form, names))


def waits(work: Callable[[], object], device: str) -> dict[str, Any]:
    """How often some work waits for the GPU, and the lines that do; the count is None on a device that cannot tell."""
    if device != "cuda":
        work()
        return {"count": None, "lines": {}}
    mode = torch.cuda.get_sync_debug_mode()
    synchronize(device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    found = [each for each in seen if SYNCHRONISING in str(each.message)]
    lines = Counter(f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}" for each in found)
    return {"count": len(found), "lines": dict(lines)}


def counted_waits(scale: Scale, pair: Pair) -> dict[str, Any]:
    """The synchronisations of a step and of a refresh, beside what they are compared with."""
    images, labels = random_batch(scale.size, scale.batch, scale.device)
    works: dict[str, Callable[[], object]] = {
        f"step, {name}": step.MAKERS[name](pair, images, labels) for name in ("limit", "matchdistill")
    }
    batches = [images] * scale.batches
    for name in ("forwards", "matchdistill"):
        works[f"refresh, {name}"] = functools.partial(refresh.MAKERS[name](pair, images), batches)
    for work in works.values():
        work()  # what is looked at once is looked at here
    return {name: waits(work, scale.device) for name, work in works.items()}


def synchronisations(scale: Scale) -> Iterator[Item]:
    """How often the CPU waits for the GPU."""
    for name, pair in chosen("all").items():
        yield Item(name, "synchronisations", functools.partial(counted_waits, scale, pair))


def timed_refresh(scale: Scale, pair: Pair, form: Form) -> dict[str, Any]:
    """Seconds of a refresh beside the forward passes."""
    images = form.images(random_batch(scale.size, scale.batch, scale.device)[0])
    batches = [images] * scale.batches
    with form.autocast(scale.device):
        return refresh.measure(form.pair(pair), batches, 0, scale.refresh_rounds, False, scale.device)


def refreshes(scale: Scale) -> Iterator[Item]:
    """Refreshes beside the forward passes, in float32 and as they are fastest."""
    for form in ("float32", "bf16 + channels_last"):
        for name, pair in chosen("all").items():
            yield Item(name, form, functools.partial(timed_refresh, scale, pair, FORMS[form]))


def peaks(scale: Scale) -> Iterator[Item]:
    """The most memory that steps and refreshes hold."""
    for name, pair in chosen("all").items():
        own = functools.partial(memory.measure, scale.device, pair)
        given = scale.device, scale.size, scale.batch
        for work in ("limit", "matchdistill", "prepared"):
            yield Item(name, f"step, {work}", functools.partial(own, work, *given, 0))
        for work in ("forwards", "matchdistill"):
            yield Item(name, f"refresh, {work}", functools.partial(own, work, *given, 2))


def loss_work(pair: Pair, images: Tensor) -> Callable[[], None]:
    """The losses of all positions, forward and backward, of features that are there."""
    distiller = pair.distiller(images)
    distiller.refresh([images])
    with torch.no_grad():
        captured, _ = distiller.run(images)
    features = [
        (position, captured.values[number].detach().requires_grad_(), captured.teacher_values[number])
        for number, position in enumerate(distiller.positions)
    ]

    def work() -> None:
        sum(position(student, teacher, "sum") for position, student, teacher in features).backward()
        for _, student, _ in features:
            student.grad = None

    return work


def profiled_loss(scale: Scale, pair: Pair) -> dict[str, float]:
    """Seconds by kernel (on a CPU by operator) of the losses."""
    work = loss_work(pair, random_batch(scale.size, scale.batch, scale.device)[0])
    work()
    work()
    return profiled.seconds_by_operator(work, scale.device, kernels=True)


def profiled_steps(scale: Scale, pair: Pair) -> dict[str, dict[str, float]]:
    """Seconds by operator of a step, beside the limit's."""
    images, labels = random_batch(scale.size, scale.batch, scale.device)
    works = {name: step.MAKERS[name](pair, images, labels) for name in ("limit", "matchdistill")}
    return profiled.profiles(works, 3, scale.device)


def profiles(scale: Scale) -> Iterator[Item]:
    """Where the time goes."""
    for what, measure in (("kernels of the loss", profiled_loss), ("operators of a step", profiled_steps)):
        for name, pair in chosen("all").items():
            yield Item(name, what, functools.partial(measure, scale, pair))


def suite() -> dict[str, Any]:
    """What the tests that need a GPU came to."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if TESTS in path.read_text("utf-8")]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junit-xml={report}", *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report: {(done.stdout + done.stderr).strip()[-500:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    by_end: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in cases:
        ends = {child.tag for child in case}
        end = "failed" if ends & {"failure", "error"} else "skipped" if "skipped" in ends else "passed"
        by_end[end].append(f"{case.get('classname')}: {case.get('name')}")
    return by_end


def tests(scale: Scale) -> Iterator[Item]:
    """The tests of the suite that need a GPU; without one they are skipped, and the result says so."""
    yield Item("the suite", "tests for a GPU", suite)


class Part(NamedTuple):
    """Some items, and the share of the time that they may take together."""

    items: Callable[[Scale], Iterator[Item]]
    share: float


# What matters most comes first; what is left of a share goes to the next parts.
PARTS = {
    "step": Part(steps, 0.27),
    "synchronisations": Part(synchronisations, 0.06),
    "refresh": Part(refreshes, 0.18),
    "memory": Part(peaks, 0.08),
    "profile": Part(profiles, 0.08),
    "tests": Part(tests, 0.09),
    "compile": Part(compiled, 0.24),
}
