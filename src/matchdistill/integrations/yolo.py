"""Networks of Ultralytics by their layers: without their heads, and the positions on backbone and neck.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from matchdistill.choice import choose, trace_pair
from matchdistill.encoder import ACTIVATIONS
from matchdistill.probing import copy_of_model
from matchdistill.taps import Tap, tapped_operation
from matchdistill.trace import Trace

PLACES = ("auto", "backbone", "neck")


class _Inputs(nn.Module):
    """In the place of a head: gives the features that the head would have been given.

    Args:
        head: the last layer of a model of Ultralytics.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.i, self.f = head.i, head.f

    def forward(self, features: Any, *_: Any) -> Any:
        """The features, as they are."""
        return features


def head_of(network: nn.Module) -> Any:
    """The last layer of a model of Ultralytics; None for other networks."""
    layers = getattr(network, "model", None)
    return layers[-1] if isinstance(layers, nn.Sequential) and hasattr(layers[-1], "f") else None


def without_head(network: nn.Module) -> nn.Module:
    """A network that gives what its head would have been given, if it is one of Ultralytics: the head is replaced."""
    if (head := head_of(network)) is not None:
        layers: Any = network.model
        layers[-1] = _Inputs(head)
    return network


def found_taps(teacher: nn.Module, student: nn.Module, example: Tensor, place: str) -> list[tuple[Tap, Tap]]:
    """Pairs of taps (teacher tap, student tap) on the backbone, the neck or both, each from shallow to deep.

    Args:
        teacher: any network.
        student: a model of Ultralytics.
        example: images (N, C, H, W) as both take them.
        place: "backbone", "neck", or "auto", which is both.

    Raises:
        ValueError: there are none.
    """
    networks = without_head(copy_of_model(teacher)), without_head(copy_of_model(student))
    traces = trace_pair(*networks, example)
    of_teacher, of_student = (_neck(trace, network) for trace, network in zip(traces, networks, strict=True))
    neck = [(of_teacher[grid], tap) for grid, tap in of_student.items() if grid in of_teacher]
    if place == "neck":
        if not neck:
            raise ValueError(
                "taps='neck': expected two networks of Ultralytics whose heads take several maps, of which some have equal "
                f"sizes; the teacher's are {list(of_teacher)}, the student's {list(of_student)}. Give taps='backbone'"
            )
        return neck
    backbone = [(first.tap, second.tap) for first, second in choose(*traces)]
    if place == "backbone":
        return backbone
    known = {str(tap) for _, tap in backbone}
    return [*backbone, *(pair for pair in neck if str(pair[1]) not in known)]


def _neck(trace: Trace, network: nn.Module) -> dict[tuple[int, ...], Tap]:
    """The taps of what goes into a head that takes several maps, by their sizes: before the last activation, if there is."""
    layers = getattr(head_of(network), "f", -1)
    found = {}
    for number in layers if isinstance(layers, list) else ():
        path = f"model.{number}"
        value = tapped_operation(trace, network, Tap(path))
        before = trace.made_by(value.inputs[0]) if value.name in ACTIVATIONS else None
        found[value.grid] = Tap(before.outputs_of[0] if before is not None and before.outputs_of else path)
    return found
