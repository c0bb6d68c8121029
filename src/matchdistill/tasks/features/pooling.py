"""The pooled output of a network or a part of it: one vector for each image.

Axes: N batch, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from matchdistill.messages import cause
from matchdistill.probing import copy_of_model, scratch
from matchdistill.taps import Tap, resolve
from matchdistill.trace import Operation, Trace, tensors_in, traced

PART = "distilled_part"  # the attribute of a network that has the path of what is distilled
BEHIND = frozenset("flatten view reshape squeeze dropout identity contiguous".split())  # what may follow a head


@dataclass(frozen=True)
class Pooling:
    """Where the pooled output of a network is.

    Attributes:
        head: path of the linear layer at the end whose input it is; None: it is the network's own output.
        channel_dim: the axis of the channels in it; the mean is taken over all others but the batch.
        tap: where it is taken, of an output that is a vector already; None: nowhere.
    """

    head: str | None
    channel_dim: int
    tap: Tap | None

    def __call__(self, network: nn.Module, images: Tensor) -> Tensor:
        """The pooled output (N, C) of images (N, 3, H, W)."""
        with self._headless(network):
            value = tensors_in(network(images))[-1]
        return value.movedim(self.channel_dim, 1).flatten(2).mean(2) if value.ndim > 2 else value

    @contextlib.contextmanager
    def _headless(self, network: nn.Module) -> Iterator[None]:
        if self.head is None:
            yield
            return
        path, _, name = self.head.rpartition(".")
        around = network.get_submodule(path)
        head = getattr(around, name)
        setattr(around, name, nn.Identity())
        try:
            yield
        finally:
            setattr(around, name, head)

    def backbone(self, network: nn.Module) -> nn.Module:
        """A copy of a network that gives the pooled output."""
        return Backbone(copy_of_model(network), self)


class Backbone(nn.Module):
    """A network that gives its pooled output (N, C) for images (N, 3, H, W).

    Args:
        network: the network, which loses its head.
        pooling: where its pooled output is.
    """

    def __init__(self, network: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        if pooling.head is not None:
            path, _, name = pooling.head.rpartition(".")
            setattr(network.get_submodule(path), name, nn.Identity())
        self.network, self.pooling = network, Pooling(None, pooling.channel_dim, None)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> (N, C)."""
        return self.pooling(self.network, images)


def name_part(network: nn.Module, part: str | None) -> nn.Module:
    """Note the part of a network that is distilled.

    Raises:
        ValueError: it has no such part.
    """
    resolve(network, part or "")
    setattr(network, PART, part or "")
    return network


def part_of(network: nn.Module) -> nn.Module:
    """The part of a network that is distilled: all of it, unless `name_part` has noted another."""
    return network.get_submodule(getattr(network, PART, ""))


def find_pooling(part: nn.Module, images: Tensor, role: str) -> Pooling:
    """Where the pooled output of a network or a part is.

    It is the input of a linear layer that makes the output, a classifier's head; else the output, of several the last.

    Args:
        part: the network.
        images: an example (N, 3, H, W).
        role: what the network is called in errors.

    Raises:
        ValueError: it does not take the images, or gives no features.
    """
    try:
        with torch.no_grad(), scratch(part) as probe:
            outputs = tensors_in(probe.eval()(images))
    except Exception as error:  # user code can fail in every way
        raise ValueError(
            f"the {role}, or the part of it that is named, does not take images of shape {tuple(images.shape[1:])}: "
            f"{cause(error)}"
        ) from error
    value = outputs[-1] if outputs else None
    if value is None or value.ndim < 2 or len(value) != len(images) or not value.is_floating_point():
        given = "no tensor" if value is None else f"{tuple(value.shape)} of {value.dtype}"
        raise ValueError(
            f"the {role} gives {given} for {len(images)} images: expected features (N, C, *); name the part of it "
            f"that gives them as {role}.part"
        )
    trace = traced(part, (images,))
    made = [o for o in trace.operations if o.number in trace.outputs and o.shape == tuple(value.shape)]
    if not made:
        return Pooling(None, 1, None)
    if value.ndim > 2:
        return Pooling(None, made[-1].channels_axis, None)
    if (head := _head(trace, made[-1], part)) is not None:
        return Pooling(head, 1, Tap(head, "input"))
    path = next((path for path in made[-1].outputs_of if path), None)
    return Pooling(None, 1, None if path is None else Tap(path))


def _head(trace: Trace, output: Operation, part: nn.Module) -> str | None:
    """The path of the linear layer that makes an output (N, C); None: another operation does."""
    current: Operation | None = output
    while current is not None and current.name in BEHIND and len(current.inputs) == 1:
        current = trace.made_by(current.inputs[0])
    made_by = [] if current is None else current.outputs_of
    return next((path for path in made_by if path and isinstance(part.get_submodule(path), nn.Linear)), None)
