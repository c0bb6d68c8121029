"""A teacher that ONNX Runtime runs: the same values, in less time than PyTorch takes on many CPUs.

Axes: N batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from matchdistill.capture import Capture, capture_of
from matchdistill.prepare import Folds
from matchdistill.programs import check_onnx, exported_program, open_onnx

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
        ValueError: a package that is missing, a network elsewhere, or weights of 16 bits. When the network is called: one
            that cannot be exported, a program whose values are others, or images of more than 8 sizes.
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

    def __init__(self, model: nn.Module) -> None:
        self._model, self._forward = model, model.forward
        self._programs: dict[tuple[Any, ...], tuple[Any, _Form]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What copies have: they make the programs again."""
        return {**self.__dict__, "_programs": {}}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        tensors, form = _taken_apart((args, kwargs))
        key = (repr(form), *((value.dtype, value.shape[1:]) for value in tensors))
        if key not in self._programs:
            if len(self._programs) == MOST:
                raise ValueError(
                    f"the teacher sees images of more than {MOST} sizes, and ONNX Runtime needs a program for each: give "
                    "images of one size, or let PyTorch run the teacher"
                )
            self._programs[key] = self._program(tensors, form)
        session, output = self._programs[key]
        found, capture = _run(session, tensors), capture_of(self._model)
        values = len(found) - capture.values
        capture.give(found[values:])
        return output.filled(found[:values])

    def _program(self, tensors: Sequence[Tensor], form: _Form) -> tuple[Any, _Form]:
        """A session that gives the output's tensors and the taps' values, and the form of the output."""
        # A capture of its own: what one learns of PyTorch's passes does not hold for a program's.
        capture = Capture(self._model, capture_of(self._model).taps)
        tapped = _Tapped(self._model, self._forward, capture, form)
        # Of one image alone, the exporter would fix how many there are.
        example = tuple(torch.cat([value, value]) if value.shape[:1] == (1,) else value for value in tensors)
        batch = torch.export.Dim("batch", min=1)
        dynamic = (tuple({0: batch} if value.ndim else None for value in example),)
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
                session, expected = open_onnx(path, threads=torch.get_num_threads()), tapped(*tensors)
        finally:
            capture.remove()
        for one, other in zip(_run(session, tensors), expected, strict=True):
            difference = (one - other).abs().max() / other.abs().max().clamp_min(1)
            if not difference <= CLOSE:
                raise ValueError(
                    f"the teacher's values differ by {difference:.2g} (relative, where values are above 1) if ONNX Runtime "
                    "runs it: let PyTorch run it"
                )
        return session, tapped.output


class _Form:
    """Nested values without the tensors in them."""

    def __init__(self, leaves: Sequence[Any], spec: Any) -> None:
        self._leaves, self._spec = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec

    def __repr__(self) -> str:
        return f"{self._spec} {self._leaves}"

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The values with tensors in their places."""
        left = iter(tensors)
        return tree_unflatten([next(left) if leaf is Tensor else leaf for leaf in self._leaves], self._spec)


def _taken_apart(values: Any) -> tuple[list[Tensor], _Form]:
    leaves, spec = tree_flatten(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], _Form(leaves, spec)


class _Tapped(nn.Module):
    """Gives an exporter the tensors of a network's output and the values at its taps; `output` is the output's form."""

    output: _Form

    def __init__(self, model: nn.Module, forward: Callable[..., Any], capture: Capture, arguments: _Form) -> None:
        super().__init__()
        self.model, self._forward, self._capture, self._arguments = model, forward, capture, arguments

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self._arguments.filled(tensors)
        with self._capture(alone=True) as captured:
            found, self.output = _taken_apart(self._forward(*args, **kwargs))
            found += [captured.values[number] for number in range(self._capture.values)]
        return tuple(found)


def _run(session: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    named = zip(session.get_inputs(), tensors, strict=True)
    given = {one.name: value.detach().contiguous().numpy() for one, value in named}
    return [torch.from_numpy(value) for value in session.run(None, given)]
