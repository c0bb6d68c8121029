"""Layouts and map sizes of two features, against plain loops.

Axes: N images, C channels, H and W positions, T tokens.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from matchdistill.alignment import align_maps, channels_second


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooled(teacher: Tensor, height: int, width: int) -> Tensor:
    """Every cell is the mean of the positions that it covers, at least in part."""
    images, channels, tall, wide = teacher.shape
    out = torch.zeros(images, channels, height, width, dtype=teacher.dtype)
    for row in range(height):
        for column in range(width):
            rows = range(row * tall // height, -(-(row + 1) * tall // height))
            columns = range(column * wide // width, -(-(column + 1) * wide // width))
            cells = [teacher[:, :, r, c] for r in rows for c in columns]
            out[:, :, row, column] = sum(cells) / len(cells)
    return out


def interpolated(teacher: Tensor, height: int, width: int) -> Tensor:
    """Bilinear between the centres of the positions, the border's value beyond."""
    images, channels, tall, wide = teacher.shape
    out = torch.zeros(images, channels, height, width, dtype=teacher.dtype)

    def neighbours(place: int, size: int, given: int) -> list[tuple[int, float]]:
        centre = min(max((place + 0.5) * given / size - 0.5, 0), given - 1)
        low = math.floor(centre)
        return [(low, 1 - (centre - low)), (min(low + 1, given - 1), centre - low)]

    for row in range(height):
        for column in range(width):
            for r, weight in neighbours(row, height, tall):
                for c, other in neighbours(column, width, wide):
                    out[:, :, row, column] += weight * other * teacher[:, :, r, c]
    return out


def as_map(tokens: Tensor, left_out: int, height: int, width: int) -> Tensor:
    """(N, C, T) -> (N, C, height, width), row by row."""
    out = torch.zeros(*tokens.shape[:2], height, width, dtype=tokens.dtype)
    for row in range(height):
        for column in range(width):
            out[:, :, row, column] = tokens[:, :, left_out + row * width + column]
    return out


@pytest.mark.parametrize(
    ("shape", "channel_dim", "place", "moved"),
    [
        ((2, 3, 4, 5), 1, (1, 2, 3, 4), (1, 2, 3, 4)),
        ((2, 4, 5, 3), 3, (1, 3, 4, 2), (1, 2, 3, 4)),
        ((2, 7, 3), 2, (1, 6, 2), (1, 2, 6)),
        ((2, 3), 1, (1, 2), (1, 2)),
        ((2, 4, 5, 6, 3), 4, (1, 3, 4, 5, 2), (1, 2, 3, 4, 5)),
    ],
)
def test_channels_come_second(
    shape: tuple[int, ...], channel_dim: int, place: tuple[int, ...], moved: tuple[int, ...]
) -> None:
    features = maps(*shape)
    view = channels_second(features, channel_dim)
    assert view[moved] == features[place]
    assert view.data_ptr() == features.data_ptr()


@pytest.mark.parametrize("positions", [(), (5,), (4, 4), (3, 5), (2, 3, 4)])
def test_equal_sizes_are_left_alone(positions: tuple[int, ...]) -> None:
    student, teacher = maps(2, 3, *positions), maps(2, 5, *positions)
    aligned = align_maps(student, teacher)
    assert aligned[0] is student
    assert aligned[1] is teacher


@pytest.mark.parametrize("size", [(2, 2), (3, 2), (4, 6), (1, 1), (5, 7)])
def test_larger_teacher_maps_are_averaged(size: tuple[int, int]) -> None:
    student, teacher = maps(2, 3, *size), maps(2, 4, 5, 8)
    aligned = align_maps(student, teacher)
    assert aligned[0] is student
    torch.testing.assert_close(aligned[1], pooled(teacher, *size))


@pytest.mark.parametrize("size", [(6, 8), (7, 13), (10, 4), (3, 9), (5, 9)])
def test_smaller_teacher_maps_are_interpolated(size: tuple[int, int]) -> None:
    """Also where only one side is smaller."""
    student, teacher = maps(2, 3, *size), maps(2, 4, 5, 8)
    aligned = align_maps(student, teacher)
    assert aligned[0] is student
    torch.testing.assert_close(aligned[1], interpolated(teacher, *size))


def test_a_mean_is_kept_by_whole_steps() -> None:
    teacher = maps(2, 4, 8, 8)
    torch.testing.assert_close(align_maps(maps(2, 3, 4, 4), teacher)[1].mean((2, 3)), teacher.mean((2, 3)))


def test_volumes() -> None:
    teacher = maps(2, 4, 4, 6, 8)
    smaller = align_maps(maps(2, 3, 2, 3, 4), teacher)[1]
    torch.testing.assert_close(smaller[:, :, 1, 2, 3], teacher[:, :, 2:, 4:, 6:].mean((2, 3, 4)))
    assert align_maps(maps(2, 3, 8, 6, 8), teacher)[1].shape == (2, 4, 8, 6, 8)


@pytest.mark.parametrize(
    ("tokens", "left_out", "grid", "others"),
    [
        (17, 1, (4, 4), (4, 4)),
        (18, 2, (4, 4), (4, 4)),
        (16, 0, (4, 4), (2, 2)),
        (20, 4, (4, 4), (8, 8)),
        (33, 1, (8, 4), (8, 4)),
        (33, 1, (8, 4), (4, 2)),
        (33, 1, (4, 8), (8, 16)),
        (16, 1, (3, 5), (7, 11)),
        (2, 1, (1, 1), (3, 3)),
        (2, 0, (2, 1), (9, 1)),
    ],
)
def test_tokens_become_a_map_without_the_leading_ones(
    tokens: int, left_out: int, grid: tuple[int, int], others: tuple[int, int]
) -> None:
    rows, image = maps(2, 4, tokens), maps(2, 3, *others)
    expected = as_map(rows, left_out, *grid)
    student, teacher = align_maps(image, rows)
    assert student is image
    smaller = all(wanted <= given for wanted, given in zip(others, grid, strict=True))
    torch.testing.assert_close(teacher, (pooled if smaller else interpolated)(expected, *others))
    student, teacher = align_maps(rows, image)
    torch.testing.assert_close(student, expected)
    assert teacher.shape[2:] == grid


def test_tokens_of_two_numbers_become_square_maps() -> None:
    student, teacher = align_maps(maps(2, 3, 17), maps(2, 4, 38))
    torch.testing.assert_close(student, as_map(maps(2, 3, 17), 1, 4, 4))
    torch.testing.assert_close(teacher, pooled(as_map(maps(2, 4, 38), 2, 6, 6), 4, 4))


def test_a_class_token_gets_no_gradient() -> None:
    tokens = maps(2, 3, 17).requires_grad_()
    align_maps(tokens, maps(2, 4, 4, 4))[0].square().sum().backward()
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad[:, :, 1:], 2 * tokens.detach()[:, :, 1:])
    assert not tokens.grad[:, :, 0].any()


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 3), (2, 4, 5, 5)), ((2, 3, 4, 4), (2, 4)), ((2, 3, 2, 2, 2), (2, 4, 9))]
)
def test_features_that_have_no_map_in_common(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cannot bring teacher maps .* to the student's"):
        align_maps(maps(*student), maps(*teacher))


@pytest.mark.parametrize(("length", "expected"), [(2, [0.5, 2.5]), (4, [0.0, 1.0, 2.0, 3.0]), (8, None)])
def test_sequences_keep_their_axis(length: int, expected: list[float] | None) -> None:
    teacher = torch.arange(4.0).reshape(1, 1, 4)
    _, aligned = align_maps(torch.zeros(1, 2, length), teacher, sequences=True)
    assert aligned.shape == (1, 1, length)
    if expected is None:
        expected = np.interp((np.arange(8) + 0.5) / 2 - 0.5, np.arange(4), np.arange(4.0)).tolist()
    assert aligned.flatten().tolist() == pytest.approx(expected)
