"""Checks that a student's taps serve to train it: their values lead to weights, and are in training what was matched.

Axes: N batch, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matchdistill.capture import Capture
from matchdistill.probing import scratch
from matchdistill.taps import Tap, resolve, unwrapped
from matchdistill.trace import Operation, Trace


def changed_by_mode(
    student: nn.Module,
    taps: Sequence[Tap],
    shapes: Sequence[tuple[int, ...]],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    training: bool = True,
) -> dict[int, str] | None:
    """The taps, by number, whose values have other shapes in a mode, or none; each with what it gives there.

    Args:
        student: the network; a copy of it is run.
        taps: where to look.
        shapes: of the values in the other mode, for the same arguments.
        arguments: positional and keyword arguments of the network.
        training: the mode.

    Returns:
        None where the network does not run on these arguments in that mode.
    """
    with torch.no_grad(), scratch(unwrapped(student)) as probe:
        capture = Capture(probe.train(training), taps)
        ran = False
        try:
            with capture() as captured:
                args, kwargs = arguments
                probe(*args, **kwargs)
                ran = True
        except Exception:  # a tap that is not reached; or it needs more than it does in evaluation, such as labels
            if not ran:
                return None
        finally:
            capture.remove()
    found = captured.values
    given = {number: tuple(found[number].shape) if number in found else None for number in range(len(taps))}
    return {
        number: "nothing" if shape is None else f"values {shape}"
        for number, shape in given.items()
        if shape != tuple(shapes[number])
    }


def other_modes_problem(
    taps: Sequence[Tap], shapes: Sequence[tuple[int, ...]], changed: dict[int, str], mode: str
) -> str:
    """What is said of taps with other values in a mode."""
    listed = ", ".join(f"{taps[number]} ({changed[number]}, else {tuple(shapes[number])})" for number in changed)
    return (
        f"the student gives other values in {mode} mode at {listed}: matching takes place in evaluation mode, and training "
        "would compare something else. Choose taps whose values both modes have (taps=), or give example= for taps='auto', "
        "which leaves these out"
    )


def modules_before(trace: Trace, operation: Operation) -> set[str]:
    """Paths of the modules that have a part in the value of an operation."""
    found: set[int] = set()
    queue: list[Operation | None] = [operation]
    while queue:
        current = queue.pop()
        if current is not None and current.number not in found:
            found.add(current.number)
            queue.extend(trace.made_by(number) for number in current.inputs)
    return {trace.operations[number].module for number in found}


def trains_any(model: nn.Module, paths: set[str]) -> bool:
    """Whether a weight of some modules of a model is to be trained."""
    return any(weight.requires_grad for path in paths for weight in _own_weights(resolve(model, path)))


def _own_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """What a module computes with itself; lists of weights and what computes weights are modules that nothing calls."""
    yield from module.parameters(recurse=False)
    for name, child in module.named_children():
        if name == "parametrizations" or isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            yield from child.parameters()


def leads_to(value: Tensor, weights: set[int]) -> bool:
    """Whether the graph of a value has one of some weights, by their identities, or code that it does not show."""
    queue, seen = [value.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # A reentrant checkpoint makes its graph as it goes backward.
        if id(getattr(node, "variable", None)) in weights or "Checkpoint" in node.name():
            return True
        queue.extend(before for before, _ in node.next_functions)
    return False
