"""A teacher that ONNX Runtime runs: the same values, in less time than PyTorch takes on many CPUs.

Axes: N batch.
"""

from __future__ import annotations

import inspect
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from matchdistill.capture import Capture, capture_of
from matchdistill.prepare import Folds
from matchdistill.programs import check_onnx, exported_program, open_onnx
from matchdistill.teacher import in_type

MOST = 8  # programs of one teacher, each of which takes as much memory as its weights
CLOSE = 1e-3  # how far a program's values may be from PyTorch's, as a share of the largest one


def on_onnxruntime(model: nn.Module, folds: Folds = ()) -> nn.Module:
    """Let ONNX Runtime run a network in evaluation mode, in place: for a copy of a teacher.

    The network is exported when it first sees images of a size; how many come at a time may vary. The program's values are
    compared with PyTorch's before they are used. In a distiller that is compiled as a whole, PyTorch runs the network. It
    needs ``pip install 'matchdistill[onnx]'``.

    Args:
        model: the network, on the CPU.
        folds: not needed, as ONNX Runtime folds batch norms by itself.

    Returns:
        `model`.

    Raises:
        ValueError: a package that is missing, a network that is not on the CPU, or weights of 16 bits. When the network is
            called: one that cannot be exported, a program whose values differ, or images of more than 8 sizes.
    """
    check_onnx()
    if halves := {value.dtype for value in model.parameters()} & {torch.float16, torch.bfloat16}:
        raise ValueError(
            f"the teacher's weights are {', '.join(map(str, halves))}, which ONNX Runtime is slow with or cannot run: give "
            "them as float32, or let PyTorch run the teacher"
        )
    if places := {value.device.type for value in model.parameters()} - {"cpu"}:
        raise ValueError(
            f"ONNX Runtime runs a teacher on the CPU, but this one is on {', '.join(sorted(places))}: train on the CPU, or "
            "let PyTorch run the teacher"
        )
    model.forward = _Programs(model)
    return model


class _Programs:
    """In place of a network's forward method: gives its output, and the values of its taps to the capture under way."""

    elsewhere = True  # what runs is none of PyTorch's code

    def __init__(self, model: nn.Module) -> None:
        self._model, self._forward = model, model.forward
        self._dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
        self._programs: dict[tuple[Any, ...], tuple[Any, _Form]] = {}
        self._exporting = threading.Lock()
        self.__signature__ = inspect.signature(model.forward)

    def __getstate__(self) -> dict[str, Any]:
        """What copies have: they make the programs again."""
        return {**self.__dict__, "_programs": {}, "_exporting": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_exporting": threading.Lock()})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        self.__signature__.bind(*args, **kwargs)
        tensors, form = _taken_apart(in_type((args, kwargs), self._dtype), "is given")
        key = (form.leaves, form.spec, *((value.dtype, value.shape[1:]) for value in tensors))
        capture = capture_of(self._model)
        with self._exporting, torch.inference_mode(False):
            if key not in self._programs:
                if len(self._programs) == MOST:
                    raise ValueError(
                        f"the teacher sees images of more than {MOST} sizes, or other arguments each time, and ONNX Runtime "
                        "needs a program for each: give images of one size, or let PyTorch run the teacher"
                    )
                self._programs[key] = self._program(capture, tensors, form)
        session, output = self._programs[key]
        found = _run(session, tensors)
        inside = _inside(capture)
        capture.give(dict(zip(inside, found[len(found) - len(inside) :], strict=True)))
        return output.filled(found[: len(found) - len(inside)])

    def _program(self, used: Capture, tensors: Sequence[Tensor], form: _Form) -> tuple[Any, _Form]:
        """A session that gives the output's tensors and the taps' values, and the form of the output."""
        # A capture of its own: what one learns of PyTorch's passes does not hold for a program's.
        capture = Capture(self._model, used.taps)
        tapped = _Tapped(self._model, self._forward, capture, form)
        count = len(tensors[0])
        # Of one image alone, the exporter would fix how many there are.
        batches = [value.shape[:1] == (count,) for value in tensors]
        example = tuple(
            torch.cat([value, value]) if of_batch and count == 1 else value.clone()
            for value, of_batch in zip(tensors, batches, strict=True)
        )
        batch = torch.export.Dim("batch", min=1)
        dynamic = (tuple({0: batch} if of_batch else None for of_batch in batches),)
        try:
            # The program is of the weights' own type, whatever autocast makes of PyTorch's passes.
            with tempfile.TemporaryDirectory() as folder, torch.no_grad(), torch.autocast("cpu", enabled=False):
                program = exported_program(
                    "torch.onnx",
                    lambda: torch.onnx.export(tapped, example, dynamo=True, verbose=False, dynamic_shapes=dynamic),
                )
                assert program is not None
                path = Path(folder, "teacher.onnx")
                program.save(str(path))
                session = open_onnx(path, threads=torch.get_num_threads())
                found = _run(session, tensors)
                expected = tapped(*(value.clone() for value in tensors))  # which it may change
        finally:
            capture.remove()
        given = zip(session.get_inputs(), batches, strict=True)
        if any(isinstance(one.shape[0], int) for one, of_batch in given if of_batch):
            raise ValueError(
                f"torch.onnx makes a program of the teacher for {len(example[0])} images alone: let PyTorch run the teacher"
            )
        for one, other in zip(found, expected, strict=True):
            _compare(one, other)
        return session, tapped.output


def _inside(capture: Capture) -> list[int]:
    """The numbers of the values that come from inside of the network; the others its own hooks take."""
    return [number for number, tap in enumerate(capture.hooked) if tap.module]


def _compare(found: Tensor, expected: Tensor) -> None:
    """Raise a ValueError if a program's values are far from PyTorch's."""
    if torch.equal(found, expected):  # also of what has no difference: flags, and no value at all
        return
    one, other = found.double(), expected.double()
    difference = ((one - other).abs().max() / other.abs().max()).item()
    if not difference <= CLOSE:
        raise ValueError(
            f"the teacher's values differ by {difference:.2g} of the largest one if ONNX Runtime runs it: let PyTorch run it"
        )


class _Form:
    """Nested values without the tensors in them."""

    def __init__(self, leaves: Sequence[Any], spec: Any) -> None:
        self.leaves, self.spec = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves), spec

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The values with tensors in their places."""
        left = iter(tensors)
        return tree_unflatten([next(left) if leaf is Tensor else leaf for leaf in self.leaves], self.spec)


def _taken_apart(values: Any, how: str) -> tuple[list[Tensor], _Form]:
    leaves, spec = tree_flatten(values)
    for leaf in leaves:
        if not isinstance(leaf, Tensor | str | int | float | None):
            raise ValueError(
                f"the teacher {how} a {type(leaf).__name__}, which ONNX Runtime does not know: expected tensors, in "
                "lists or dictionaries; or let PyTorch run the teacher"
            )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], _Form(leaves, spec)


class _Tapped(nn.Module):
    """Gives an exporter the tensors of a network's output and the values at its taps; `output` is the output's form."""

    output: _Form

    def __init__(self, model: nn.Module, forward: Callable[..., Any], capture: Capture, arguments: _Form) -> None:
        super().__init__()
        self.model, self._forward, self._capture, self._arguments = model, forward, capture, arguments

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self._arguments.filled(tensors)
        inside = _inside(self._capture)
        with self._capture(alone=True) as captured:
            found, self.output = _taken_apart(self._forward(*args, **kwargs), "gives")
            values = [captured.values[number] for number in inside]
            # The network's own hooks, which do not run here, have taken nothing of it.
            captured.finished = True
        return (*found, *values)


def _run(session: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    named = zip(session.get_inputs(), tensors, strict=True)
    given = {one.name: value.detach().contiguous().numpy() for one, value in named}
    return [torch.from_numpy(value) for value in session.run(None, given)]
