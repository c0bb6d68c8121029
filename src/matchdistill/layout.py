"""Where the axes of a value come from, followed through reshapes and permutations: which one holds the channels, which the
positions of the image, and whether these still lie as they lay in the image.

Axes: N batch, C channels, T tokens, 0 1 2 position axes of the image (H and W; D, H and W; or L).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

BATCH, CHANNELS, OTHER = "N", "C", "?"


class Part(NamedTuple):
    """A part of an axis: its index counts steps of `stride` along what `of` names, `size` of them.

    `of` is `BATCH`, `CHANNELS`, the number of a position axis, `OTHER` for what is no place of the image (the queries of a
    decoder), or an `Extra`.
    """

    of: str | int | Extra
    stride: int
    size: int


class Extra(NamedTuple):
    """An axis of tokens with others than the image's (class, registers) before and after the image's."""

    before: int
    after: int
    image: tuple[Part, ...]


Axis = tuple[Part, ...]


@dataclass(frozen=True)
class Layout:
    """The axes of a value, each a product of parts, the outermost first; an axis of one element has none."""

    axes: tuple[Axis, ...]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(_size(axis) for axis in self.axes)

    @functools.cached_property
    def channel_dim(self) -> int | None:
        """The one axis of channels alone; None where there is none, or several."""
        found = [number for number, axis in enumerate(self.axes) if axis and all(part.of == CHANNELS for part in axis)]
        return found[0] if len(found) == 1 else None

    @property
    def tokens_before(self) -> int:
        """The tokens, of class or registers, that lie before the image's."""
        extras = [part.of.before for axis in self.axes for part in axis if isinstance(part.of, Extra)]
        return sum(extras)

    @functools.cached_property
    def grid(self) -> tuple[int, ...] | None:
        """The sizes of the image's position axes, of a value that has every position in one place.

        None: its first axis mixes images and positions, as windows in the batch do, or its positions are not the image's.
        """
        if self.channel_dim is None or not self.axes or [part.of for part in self.axes[0]] not in ([BATCH], []):
            return None
        steps: dict[int, int] = {}  # of the next part of an axis
        sizes: dict[int, int] = {}
        for part in sorted(self._places(), key=lambda part: part.stride):
            # The finest may be gone, by a pooling.
            if not isinstance(part.of, int) or part.stride != steps.get(part.of, part.stride):
                return None
            steps[part.of] = part.stride * part.size
            sizes[part.of] = part.size * sizes.get(part.of, 1)
        return tuple(sizes[number] for number in sorted(sizes)) or None

    @property
    def in_order(self) -> bool:
        """Whether the positions lie as they lay in the image; else `to_map` puts them back."""
        places = self._places()
        return self.grid is not None and places == sorted(places, key=lambda part: (part.of, -part.stride))

    @property
    def is_map(self) -> bool:
        """Whether each axis of positions is one of the image's."""
        positions = [axis for number, axis in enumerate(self.axes) if number not in (0, self.channel_dim)]
        return self.in_order and all(len(axis) == 1 and isinstance(axis[0].of, int) for axis in positions)

    def _places(self) -> list[Part]:
        """The parts of the image's positions, in the order of the axes."""
        axes = [axis for number, axis in enumerate(self.axes) if number not in (0, self.channel_dim)]
        parts = [part for axis in axes for part in axis]
        return [own for part in parts for own in (part.of.image if isinstance(part.of, Extra) else (part,))]

    def to_map(self, features: Tensor) -> Tensor:
        """A value of this layout, for any number of images, as a map (N, C, *grid).

        Tokens beside the image's are left out.

        Examples:
            >>> import torch
            >>> rows = reshaped(image_layout((2, 5, 4, 6), 1), (2, 5, 4, 2, 3))
            >>> columns = Layout((*rows.axes[:2], (*rows.axes[3], *rows.axes[2], *rows.axes[4])))
            >>> columns.in_order, columns.to_map(torch.zeros(7, 5, 24)).shape
            (False, torch.Size([7, 5, 4, 6]))
        """
        assert self.channel_dim is not None
        assert self.grid is not None
        features = features.movedim(self.channel_dim, 1)
        for number, axis in enumerate(
            [a for place, a in enumerate(self.axes) if place not in (0, self.channel_dim)], 2
        ):
            for part in axis:
                if isinstance(part.of, Extra):
                    features = features.narrow(number, part.of.before, _size(part.of.image))
        places = self._places()
        order = sorted(range(len(places)), key=lambda place: (places[place].of, -places[place].stride))
        features = features.reshape(*features.shape[:2], *(part.size for part in places))
        return features.permute(0, 1, *(2 + place for place in order)).reshape(*features.shape[:2], *self.grid)


def _size(axis: Axis) -> int:
    return math.prod(part.size for part in axis)


def image_layout(shape: Sequence[int], channel_dim: int, batch: bool = True) -> Layout:
    """Of a map with the batch (unless it is a single image) in axis 0.

    Examples:
        >>> image_layout((2, 3, 8, 6), 1).grid
        (8, 6)
    """
    axes: list[Axis] = []
    positions = 0
    for number, size in enumerate(shape):
        if number == 0 and batch:
            axes.append((Part(BATCH, 1, size),))
        elif number == channel_dim:
            axes.append((Part(CHANNELS, 1, size),))
        else:
            axes.append((Part(positions, 1, size),))
            positions += 1
    return Layout(tuple(axes))


def permuted(layout: Layout, order: Sequence[int]) -> Layout:
    """With axis `order[i]` in place i."""
    return Layout(tuple(layout.axes[axis] for axis in order))


def reshaped(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """Of the same values in another shape; None where a new axis would cut through a part.

    Examples:
        >>> windows = reshaped(image_layout((2, 8, 6, 5), 3), (2, 2, 4, 2, 3, 5))
        >>> windows.in_order, permuted(windows, (0, 1, 3, 2, 4, 5)).in_order
        (True, False)
    """
    if math.prod(layout.shape) != math.prod(shape):
        return None
    left = [part for axis in layout.axes for part in axis if part.size != 1]
    left.reverse()
    axes: list[Axis] = []
    for size in shape:
        axis: list[Part] = []
        while size > 1:
            part = left.pop()
            if size % part.size == 0:
                axis.append(part)
                size //= part.size
            elif part.size % size == 0 and not isinstance(part.of, Extra):
                inner = part.size // size
                axis.append(Part(part.of, part.stride * inner, size))
                left.append(Part(part.of, part.stride, inner))
                size = 1
            else:
                return None
        axes.append(_merged(axis))
    return Layout(tuple(axes))


def _merged(axis: Sequence[Part]) -> Axis:
    """Neighbours that are one run of the same steps as one part."""
    merged: list[Part] = []
    for part in axis:
        if merged and merged[-1].of == part.of and merged[-1].stride == part.stride * part.size:
            part = Part(part.of, part.stride, merged.pop().size * part.size)
        merged.append(part)
    return tuple(merged)


def resized(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """Of what an operation made that keeps the axes' order and meaning: convolution, pooling, slice, concatenation.

    An axis whole before is whole after; None where an axis was not and has another size. Of tokens beside the image's, those
    that go are taken off first, those that come are added.
    """
    if len(layout.axes) != len(shape):
        return None
    axes: list[Axis] = []
    for axis, size in zip(layout.axes, shape, strict=True):
        given = _size(axis)
        kinds = {part.of for part in axis}
        extra = axis[0].of if len(axis) == 1 and isinstance(axis[0].of, Extra) else None
        if size == given:
            axes.append(axis)
        elif kinds == {CHANNELS} or not axis:
            axes.append((Part(CHANNELS if axis else OTHER, 1, size),))
        elif extra is not None:
            axes.append(extra.image if size == _size(extra.image) else (Part(OTHER, 1, size),))
        elif kinds == {BATCH}:
            return None
        elif len(kinds) == 1 and axis[-1].stride == 1:
            axes.append((Part(axis[0].of, 1, size),))
        else:
            return None
    return Layout(tuple(axes))


def scaled(axis: Axis, size: int, number: int) -> Axis:
    """What a convolution makes of an axis of positions; `number` is its own if it was of a single element."""
    kinds = {part.of for part in axis} or {number}
    kind = next(iter(kinds))
    if len(kinds) == 1 and isinstance(kind, int):
        return (Part(kind, 1, size),)
    return axis if size == _size(axis) and BATCH not in kinds and CHANNELS not in kinds else (Part(OTHER, 1, size),)


def contracted(layout: Layout, channels: int) -> Layout:
    """Of a linear layer: what its last axis held, channels and the places that were put among them, becomes channels.

    Examples:
        >>> merged = permuted(reshaped(image_layout((2, 8, 6, 5), 3), (2, 4, 2, 3, 2, 5)), (0, 1, 3, 2, 4, 5))
        >>> contracted(reshaped(merged, (2, 4, 3, 20)), 10).grid
        (4, 3)
    """
    steps: dict[int, int] = {}
    for axis in layout.axes[:-1]:
        for part in axis:
            if isinstance(part.of, int):
                steps[part.of] = min(part.stride, steps.get(part.of, part.stride))
    axes = [
        tuple(
            part._replace(stride=part.stride // steps[part.of]) if isinstance(part.of, int) else part for part in axis
        )
        for axis in layout.axes[:-1]
    ]
    return Layout((*axes, (Part(CHANNELS, 1, channels),)))


def joined(layouts: Sequence[Layout | None], sizes: Sequence[int], dim: int, shape: Sequence[int]) -> Layout | None:
    """Of a concatenation along an axis of these sizes: channels, or tokens to which others than the image's are added."""
    first = next((layout for layout in layouts if layout is not None), None)
    places = [
        number
        for number, layout in enumerate(layouts)
        if layout is not None
        and layout.axes[dim]
        and not {part.of for part in layout.axes[dim]} & {BATCH, CHANNELS, OTHER}
    ]
    if first is None or not places:
        return first and resized(first, shape)
    first = layouts[places[0]]
    assert first is not None
    axis: Axis = (Part(OTHER, 1, shape[dim]),)
    if len(places) == 1:
        own = first.axes[dim]
        extra = own[0].of if len(own) == 1 and isinstance(own[0].of, Extra) else Extra(0, 0, own)
        before, after = sum(sizes[: places[0]]), sum(sizes[places[0] + 1 :])
        axis = (Part(Extra(extra.before + before, extra.after + after, extra.image), 1, shape[dim]),)
    return Layout((*first.axes[:dim], axis, *first.axes[dim + 1 :]))


def stacked(layouts: Sequence[Layout | None]) -> Layout | None:
    """Of single images that are put together to a batch."""
    first = layouts[0]
    if first is None or any(part.of == BATCH for axis in first.axes for part in axis):
        return None
    return Layout(((Part(BATCH, 1, len(layouts)),), *first.axes))


def without(layout: Layout, dim: int) -> Layout:
    """Of one element of an axis."""
    return Layout((*layout.axes[:dim], *layout.axes[dim + 1 :]))


def product(rows: Layout | None, columns: Layout | None, shape: Sequence[int], row_dim: int = -2) -> Layout | None:
    """Of a matrix product, or attention: the rows of the first, the columns of the second; None: a factor without the image.

    Rows without the image, the queries of a decoder, are no positions of it; columns without it are channels.
    """
    row_dim %= len(shape)
    if rows is None:
        if columns is None or len(columns.axes) != len(shape):
            return None
        axes = list(columns.axes)
        axes[row_dim] = (Part(OTHER, 1, shape[row_dim]),)
        return Layout(tuple(axes))
    if len(rows.axes) != len(shape):
        return None
    last: Axis = (Part(CHANNELS, 1, shape[-1]),)
    if columns is not None and columns.axes:
        # Of places by places, as attention's weights, the second are no positions of a feature.
        kinds = [{part.of for part in axis} for axis in (rows.axes[row_dim], columns.axes[-1])]
        last = columns.axes[-1] if {CHANNELS} in kinds else (Part(OTHER, 1, shape[-1]),)
    found = Layout((*rows.axes[:-1], last))
    return found if found.shape == tuple(shape) else None
