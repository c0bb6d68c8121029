"""Layouts against tensors whose values are their own places.

Axes: N images, C channels, H and W positions, T tokens.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matchdistill.layout import (
    Layout,
    contracted,
    image_layout,
    joined,
    permuted,
    product,
    reshaped,
    resized,
    scaled,
    without,
)

N, C, H, W = 2, 3, 4, 6


def places() -> Tensor:
    """A map (N, C, H, W) in which no two values are alike."""
    return torch.arange(N * C * H * W).reshape(N, C, H, W)


Change = tuple[Callable[[Tensor], Tensor], Callable[[Layout], Layout | None]]


def to_windows(values: Tensor) -> Tensor:
    return values.reshape(N, C, 2, 2, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(N, 4, 6, C)


def to_windows_layout(layout: Layout) -> Layout | None:
    split = reshaped(layout, (N, C, 2, 2, 2, 3))
    assert split is not None
    return reshaped(permuted(split, (0, 2, 4, 3, 5, 1)), (N, 4, 6, C))


@pytest.mark.parametrize(
    ("change", "follow", "in_order"),
    [
        (lambda x: x, lambda x: x, True),
        (lambda x: x.permute(0, 2, 3, 1), lambda x: permuted(x, (0, 2, 3, 1)), True),
        (lambda x: x.flatten(2), lambda x: reshaped(x, (N, C, H * W)), True),
        (lambda x: x.flatten(2).mT, lambda x: permuted(reshaped(x, (N, C, H * W)), (0, 2, 1)), True),
        (lambda x: x.mT.flatten(2), lambda x: reshaped(permuted(x, (0, 1, 3, 2)), (N, C, H * W)), False),
        (to_windows, to_windows_layout, False),
        (lambda x: to_windows(x).flatten(1, 2), lambda x: reshaped(to_windows_layout(x), (N, H * W, C)), False),
    ],
)
def test_a_value_is_put_back_as_it_lay_in_the_image(
    change: Callable[[Tensor], Tensor], follow: Callable[[Layout], Layout], in_order: bool
) -> None:
    layout = follow(image_layout((N, C, H, W), 1))
    assert layout.shape == tuple(change(places()).shape)
    assert (layout.grid, layout.in_order) == ((H, W), in_order)
    assert torch.equal(layout.to_map(change(places())), places())


def test_windows_in_the_batch_are_no_map_until_they_are_put_together() -> None:
    windows = reshaped(to_windows_layout(image_layout((N, C, H, W), 1)), (N * 4, 6, C))
    assert windows.grid is None
    back = permuted(reshaped(windows, (N, 2, 2, 2, 3, C)), (0, 1, 3, 2, 4, 5))
    assert reshaped(back, (N, H, W, C)).is_map


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(st.permutations(range(6)), st.integers(0, 4))
def test_any_order_of_split_axes(order: list[int], merged: int) -> None:
    """Wherever the parts of H and W go, they are put back, unless a part lies in the axis of images or channels."""
    split = places().reshape(N, C, 2, 2, 2, 3).permute(*order)
    layout = permuted(reshaped(image_layout((N, C, H, W), 1), (N, C, 2, 2, 2, 3)), order)
    split, layout = split.flatten(merged, merged + 1), reshaped(layout, split.flatten(merged, merged + 1).shape)
    assert layout.shape == tuple(split.shape)
    if layout.grid is None:
        assert order[0] != 0 or layout.channel_dim is None or merged == 0
    else:
        assert torch.equal(layout.to_map(split), places())


def test_tokens_beside_the_image_are_left_out() -> None:
    tokens = permuted(reshaped(image_layout((N, C, H, W), 1), (N, C, H * W)), (0, 2, 1))
    layout = joined([None, tokens, None], [1, H * W, 2], 1, (N, H * W + 3, C))
    assert layout.grid == (H, W)
    assert layout.tokens_before == 1
    values = torch.cat([torch.zeros(N, 1, C), places().flatten(2).mT, torch.zeros(N, 2, C)], dim=1)
    assert torch.equal(layout.to_map(values), places().float())
    assert resized(layout, (N, H * W, C)) == tokens
    assert resized(layout, (N, 1, C)).grid is None


def test_tokens_of_two_maps_are_no_map() -> None:
    tokens = permuted(reshaped(image_layout((N, C, H, W), 1), (N, C, H * W)), (0, 2, 1))
    assert joined([tokens, tokens], [H * W, H * W], 1, (N, 2 * H * W, C)).grid is None


def test_channels_that_are_joined_stay_a_map() -> None:
    maps = image_layout((N, C, H, W), 1)
    assert joined([maps, maps], [C, C], 1, (N, 2 * C, H, W)).grid == (H, W)


def test_attention_has_the_places_of_its_queries() -> None:
    """Of an image by an image; of queries of a decoder it has none, and attention's weights are no feature."""
    tokens = permuted(reshaped(image_layout((N, C, H, W), 1), (N, C, H * W)), (0, 2, 1))
    weights = product(tokens, permuted(tokens, (0, 2, 1)), (N, H * W, H * W))
    assert weights.grid is None
    assert product(weights, tokens, (N, H * W, C)) == tokens
    assert product(None, tokens, (N, 5, C)).grid is None


def test_attention_of_channels_keeps_the_places() -> None:
    """Of XCiT: channels by channels, times channels by places."""
    channels = reshaped(image_layout((N, C, H, W), 1), (N, C, H * W))
    weights = product(channels, permuted(channels, (0, 2, 1)), (N, C, C))
    assert product(weights, channels, (N, C, H * W)).shape == (N, C, H * W)


def test_merged_patches_are_a_map_after_the_linear_layer() -> None:
    """Of Swin: 2 x 2 neighbours become channels."""
    layout = permuted(reshaped(image_layout((N, H, W, C), 3), (N, 2, 2, 3, 2, C)), (0, 1, 3, 4, 2, 5))
    merged = reshaped(layout, (N, 2, 3, 4 * C))
    assert merged.grid is None
    assert contracted(merged, 5) == image_layout((N, 2, 3, 5), 3)


def test_a_convolution_changes_the_number_of_places() -> None:
    maps = image_layout((N, C, H, W), 1)
    assert scaled(maps.axes[2], 7, 0) == image_layout((N, C, 7, W), 1).axes[2]
    tokens = reshaped(maps, (N, C, H * W)).axes[2]
    assert scaled(tokens, H * W, 0) == tokens
    assert {part.of for part in scaled(tokens, 5, 0)} == {"?"}


def test_one_of_the_images_axes_taken() -> None:
    assert without(image_layout((N, C, H, W), 1), 3).grid == (H,)


def test_reshapes_that_cut_through_parts_are_not_followed() -> None:
    assert reshaped(image_layout((N, C, H, W), 1), (N, C, 3, math.prod((H, W)) // 3)) is None
