"""Layouts and map sizes of two features, and of masks, against plain loops.

Axes: N images, C channels, H and W positions, T tokens.
"""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matchdistill.alignment import align_maps, align_mask, align_masked, channels_second


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


@settings(deadline=None, max_examples=50, derandomize=True, database=None)
@given(st.data())
def test_a_position_counts_where_its_centre_lies_in_the_image(data: st.DataObject) -> None:
    pixels, cells = ([data.draw(st.integers(1, most)) for _ in range(2)] for most in (40, 12))
    sizes = [[data.draw(st.integers(0, most)) for most in pixels] for _ in range(3)]
    mask = torch.zeros(3, *pixels, dtype=torch.bool)
    for image, (height, width) in zip(mask, sizes, strict=True):
        image[:height, :width] = True
    found = align_mask(mask, cells)
    assert found.shape == (3, *cells)
    for number, row, column in np.ndindex(*found.shape):
        centre = [Fraction(2 * place + 1, 2) * pixels[axis] / cells[axis] for axis, place in enumerate((row, column))]
        inside = all(place < size for place, size in zip(centre, sizes[number], strict=True))
        assert bool(found[number, row, column]) == inside


def test_a_mask_may_have_any_form() -> None:
    mask = maps(2, 6, 9) > 0
    assert torch.equal(align_mask(mask, (2, 3)), mask[:, 1::3, 1::3])
    assert torch.equal(align_mask(mask, (6, 9)), mask)


def inside_alone(teacher: Tensor, mask: Tensor, height: int, width: int) -> Tensor:
    """The mean of the positions that count, with the weights that each has without a mask."""
    out = torch.zeros(*teacher.shape[:2], height, width, dtype=teacher.dtype)
    smaller = height <= teacher.shape[2] and width <= teacher.shape[3]
    shares = torch.zeros(len(teacher), height, width, dtype=teacher.dtype)
    for row, column in np.ndindex(*teacher.shape[2:]):
        alone = torch.zeros(1, 1, *teacher.shape[2:], dtype=teacher.dtype)
        alone[0, 0, row, column] = 1
        weight = (pooled if smaller else interpolated)(alone, height, width)[0, 0]
        for number in range(len(teacher)):
            if mask[number, row, column]:
                shares[number] += weight
                out[number] += weight * teacher[number, :, row, column, None, None]
    return out / shares[:, None]  # NaN where none counts


@pytest.mark.parametrize("garbage", [math.nan, 1e30])
@pytest.mark.parametrize("size", [(3, 4), (2, 3), (12, 16), (3, 16), (7, 5)])
def test_teacher_maps_of_another_size_are_made_of_what_counts(size: tuple[int, int], garbage: float) -> None:
    student, teacher = maps(3, 3, *size), maps(3, 4, 6, 8)
    mask = torch.zeros(3, 24, 32, dtype=torch.bool)
    mask[0], mask[1, :13, :21], mask[2, :3, :3] = True, True, True
    inside = align_mask(mask, (6, 8))
    expected = inside_alone(teacher, inside, *size)
    teacher.masked_fill_(~inside[:, None], garbage)
    kept, found, counts = align_masked(student, teacher, mask)
    assert kept is student
    assert torch.equal(counts, align_mask(mask, size) & ~expected[:, 0].isnan())
    assert counts[:2].flatten(1).any(1).all()
    pair = (values.movedim(1, -1)[counts] for values in (found, expected))
    torch.testing.assert_close(*pair)


def test_a_position_without_a_teacher_value_that_counts_is_left_out() -> None:
    """The image ends before the centre of the teacher's only position."""
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :3, :3] = True
    assert align_mask(mask, (4, 4)).any()
    assert not align_masked(maps(1, 3, 4, 4), maps(1, 4, 1, 1), mask)[2].any()


def test_equal_sizes_are_left_alone_with_a_mask_too() -> None:
    student, teacher, mask = maps(2, 3, 4, 5), maps(2, 5, 4, 5), maps(2, 8, 10) > 0
    kept, other, counts = align_masked(student, teacher, mask)
    assert kept is student
    assert other is teacher
    assert torch.equal(counts, align_mask(mask, (4, 5)))


def test_a_mask_of_tokens_that_become_a_map() -> None:
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    mask[1, :, 4:] = False
    student, teacher, counts = align_masked(maps(2, 3, 4, 4), maps(2, 5, 17), mask)
    assert torch.equal(counts, align_mask(mask, (4, 4)))
    torch.testing.assert_close(teacher[0], as_map(maps(2, 5, 17), 1, 4, 4)[0])
    assert student.shape == (2, 3, 4, 4)


@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 3, 17), (2, 5, 17)), ((2, 3), (2, 5)), ((2, 3, 2, 4, 4), (2, 5, 2, 4, 4))]
)
def test_features_that_a_mask_of_pixels_says_nothing_of(
    student: tuple[int, ...], teacher: tuple[int, ...], sequences: bool
) -> None:
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=re.escape(f"says nothing of features with position axes {student[2:]}")):
        align_masked(maps(*student), maps(*teacher), mask, sequences)
    if sequences and len(student) == 3:
        with pytest.raises(ValueError, match=re.escape("says nothing of features with position axes (17,)")):
            align_masked(maps(*student), maps(2, 5, 9), mask, sequences)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 8, 8), torch.ones(8, 8, dtype=torch.bool), torch.ones(2, 1, 8, 8, dtype=torch.bool)]
)
def test_masks_that_are_none_of_pixels(mask: Tensor) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"mask of {mask.dtype} {tuple(mask.shape)}: expected torch.bool (N, H, W)")
    ):
        align_mask(mask, (4, 4))


@pytest.mark.parametrize("images", [1, 3])
def test_a_mask_of_another_number_of_images(images: int) -> None:
    mask = torch.ones(images, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=re.escape(f"mask of torch.bool ({images}, 2, 2) for features (2, 4, 2, 2)")):
        align_masked(maps(2, 3, 4, 4), maps(2, 4, 2, 2), mask)
