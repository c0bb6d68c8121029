"""Checks that a student's taps serve to train it: their values lead to weights, and are in training what was matched.

Axes: N batch, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from matchdistill.taps import Tap, resolve, tapped_operation, unwrapped
from matchdistill.trace import Operation, Trace, traced


def changed_by_mode(
    student: nn.Module,
    taps: Sequence[Tap],
    shapes: Sequence[tuple[int, ...]],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    training: bool = True,
) -> dict[int, str] | None:
    """The taps, by number, whose values have other shapes in a mode, or none; each with what it gives there.

    Args:
        student: the network, which stays as it is.
        taps: where to look.
        shapes: of the values in the other mode, for the same arguments.
        arguments: positional and keyword arguments of the network.
        training: the mode.

    Returns:
        None where the network does not run on these arguments in that mode.
    """
    args, kwargs = arguments
    try:
        trace = traced(unwrapped(student), args, kwargs, training)
    except Exception:  # it needs more than in the other mode, such as labels
        return None
    changed = {}
    for number, (tap, shape) in enumerate(zip(taps, shapes, strict=True)):
        try:
            given = tapped_operation(trace, student, tap).shape
        except ValueError:
            changed[number] = "nothing"
            continue
        if given != tuple(shape):
            changed[number] = f"values {given}"
    return changed


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
