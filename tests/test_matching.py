"""Costs over many batches, and the matching that one looks at.

Axes: N images, Cs student channels, Ct teacher channels, G group.
"""

import gc
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from matchdistill.functional import empirical_margin, matching_cost, solve_assignment
from matchdistill.matching import CostAccumulator, Matching, churn, objective, regret

pytestmark = pytest.mark.usefixtures("one_thread")


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("split", [(6,), (1, 2, 3), (4, 0, 2)])
def test_batches_add_up_to_the_cost_and_margin_of_all_images(split: tuple[int, ...]) -> None:
    student, teacher = features(6, 3, 4, 5), features(6, 7, 4, 5, seed=1)
    teacher[:, 2] = teacher[:, 2].abs()
    student[:, 1] = 0
    sums = CostAccumulator()
    for batch in zip(student.split(split), teacher.split(split), strict=True):
        sums.update(*batch)
    assert sums.images == 6
    expected = oracles.matching_cost(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(sums.compute().numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(sums.margin().numpy(), oracles.empirical_margin(teacher.double().numpy()), rtol=1e-6)
    assert sums.compute().dtype == sums.margin().dtype == torch.float64


@pytest.mark.parametrize("split", [(6,), (1, 2, 3)])
def test_only_the_positions_that_count_are_summed(split: tuple[int, ...]) -> None:
    """An image of which no position counts is one of the images, and resembles nothing."""
    student, teacher = features(6, 3, 4, 5), features(6, 7, 4, 5, seed=1)
    mask = features(6, 4, 5, seed=2) > 0
    mask[4] = False
    for values in (student, teacher):
        values.masked_fill_(~mask[:, None], torch.nan)
    sums = CostAccumulator()
    for batch in zip(student.split(split), teacher.split(split), mask.split(split), strict=True):
        sums.update(*batch)
    assert sums.images == 6
    own, others, counts = student.double().numpy(), teacher.double().numpy(), mask.numpy()
    np.testing.assert_allclose(sums.compute().numpy(), oracles.matching_cost(own, others, counts), atol=1e-6)
    np.testing.assert_allclose(sums.margin().numpy(), oracles.empirical_margin(others, counts), rtol=1e-6)


def test_a_map_of_few_images_counts_as_little_as_they_do() -> None:
    """Pooled values are one map of all images of a batch, and a last batch may have one image."""
    sums = CostAccumulator()
    for own, others in zip(
        features(1, 3, 7).split((4, 2, 1), 2), features(1, 5, 7, seed=1).split((4, 2, 1), 2), strict=True
    ):
        sums.update(own, others, images=own.shape[2])
    assert sums.images == 7
    batches = zip(features(1, 3, 7).split((4, 2, 1), 2), features(1, 5, 7, seed=1).split((4, 2, 1), 2), strict=True)
    expected = sum(own.shape[2] / 7 * matching_cost(own, others) for own, others in batches)
    torch.testing.assert_close(sums.compute().float(), expected)
    torch.testing.assert_close(sums.margin().float(), empirical_margin(features(1, 5, 7, seed=1)))


def test_sums_add_up() -> None:
    student, teacher = features(6, 3, 4), features(6, 7, 4, seed=1)
    whole, parts = CostAccumulator(), [CostAccumulator() for _ in range(3)]
    whole.update(student, teacher)
    for part, own, others in zip(parts[:2], student.split(4), teacher.split(4), strict=True):
        part.update(own, others)
    both = parts[0] + parts[1]
    assert (both + parts[2]).images == (parts[2] + both).images == both.images == 6
    for total in (both, both + parts[2], parts[2] + both):
        torch.testing.assert_close(total.compute(), whole.compute())
        torch.testing.assert_close(total.margin(), whole.margin())
    assert [part.images for part in parts] == [4, 2, 0]
    torch.testing.assert_close(parts[0].compute(), matching_cost(student[:4], teacher[:4]).double())


def test_margins_are_measured_where_they_are_asked_for() -> None:
    sums = CostAccumulator(margins=False)
    sums.update(features(2, 3, 4), features(2, 5, 4))
    assert (sums + sums).compute().shape == (3, 5)
    with pytest.raises(ValueError, match="margins were not measured"):
        sums.margin()


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_regret_is_what_the_halves_matchings_cost_on_each_other_beyond_the_best(
    seed: int, width: int, group: int
) -> None:
    costs = [features(width, width * group, seed=seed + half).abs() + 0.1 for half in (0, 1)]
    indices = [oracles.balanced_assignment(cost.double().numpy(), group) for cost in costs]
    own, other = (
        sum(oracles.assignment_cost(cost.double().numpy(), index) for cost, index in zip(costs, order, strict=True))
        for order in (indices, indices[::-1])
    )
    found = regret(costs, lambda cost: solve_assignment(cost, group))
    assert found >= 0
    assert found == pytest.approx((other - own) / own / 2, rel=1e-4, abs=1e-6)


def test_regret_where_a_half_costs_nothing() -> None:
    costs = [torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])]
    assert regret(costs, lambda cost: solve_assignment(cost, 1)) == math.inf
    assert regret(costs[:1] * 2, lambda cost: solve_assignment(cost, 1)) == 0


def test_the_objective_is_of_the_pairs() -> None:
    cost = torch.tensor([[1.0, 9, 9], [9, 9, 9], [9, 9, 2]])
    assert objective(cost, torch.tensor([[0], [-1], [2]])) == 1.5


def test_margins_are_of_all_values_not_of_batches() -> None:
    sums = CostAccumulator()
    for values in ([-1.0, 5.0, 5.0], [-4.0, -4.0, -4.0]):
        sums.update(torch.ones(1, 1, 3), torch.tensor([[values]]))
    assert sums.margin().tolist() == [-13 / 4]


def test_many_batches_keep_their_precision() -> None:
    """Float32 totals would lose the last digits."""
    student, teacher = features(2, 3, 16), features(2, 4, 16, seed=1)
    once, often = CostAccumulator(), CostAccumulator()
    once.update(student, teacher)
    for _ in range(3000):
        often.update(student, teacher)
    torch.testing.assert_close(often.compute(), once.compute(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_point_types(dtype: torch.dtype) -> None:
    student, teacher = features(3, 3, 10, dtype=dtype), features(3, 5, 10, seed=1, dtype=dtype)
    sums = CostAccumulator()
    sums.update(student, teacher)
    expected = oracles.matching_cost(student.double().numpy(), teacher.double().numpy())
    np.testing.assert_allclose(sums.compute().numpy(), expected, atol=1e-6)


def test_nothing_seen() -> None:
    sums = CostAccumulator()
    for method in (sums.compute, sums.margin):
        with pytest.raises(ValueError, match="no image was seen"):
            method()


def test_channels_that_change_between_batches() -> None:
    sums = CostAccumulator()
    sums.update(features(2, 3, 4), features(2, 5, 4))
    with pytest.raises(ValueError, match=re.escape("channels (Cs, Ct) changed from (3, 5) to (1, 5)")):
        sums.update(features(2, 1, 4), features(2, 5, 4))


def test_costs_have_no_graph() -> None:
    sums = CostAccumulator()
    sums.update(features(2, 3, 4).requires_grad_(), features(2, 5, 4).requires_grad_())
    assert not sums.compute().requires_grad
    assert not sums.margin().requires_grad


def test_memory_is_flat_over_many_batches() -> None:
    """1024 x 2048 channels: the sums and one batch's product, whatever the number of batches."""
    student, teacher = features(8, 1024, 2, 2), features(8, 2048, 2, 2, seed=1)
    sums = CostAccumulator()

    def alive() -> int:
        gc.collect()
        tensors = (value for value in gc.get_objects() if type(value) is Tensor)
        return sum(value.numel() * value.element_size() for value in tensors)

    sums.update(student, teacher)
    before = alive()
    for _ in range(20):
        sums.update(student, teacher)
    assert alive() == before
    assert sums.images == 168
    assert sum(total.numel() * total.element_size() for total in sums._sums) < 1.01 * 1024 * 2048 * 8


def matching(index: list[list[int]], cost: list[list[float]], changed: float | None = None) -> Matching:
    return Matching("a:input -> b:input", torch.tensor(index), torch.tensor(cost, dtype=torch.float64), 12, changed)


def test_what_a_matching_says() -> None:
    found = matching([[0, 3], [1, 2]], [[0.0, 9, 9, 1], [9, 2, 3, 9]], 0.25)
    assert found.group_size == 2
    assert found.mean_cost == 1.5
    assert found.similarity.tolist() == [0.75, -0.25]
    assert str(found) == (
        "a:input -> b:input: 4 -> 2 channels, groups of 2, 12 images, mean cost 1.500, "
        "cosine -0.25 / 0.25 / 0.75 (min / median / max), churn 25%"
    )


def test_what_a_matching_says_of_a_narrow_teacher() -> None:
    found = matching([[1], [-1], [0]], [[9.0, 1], [9, 9], [2, 9]])
    assert found.mean_cost == 1.5
    assert found.similarity[[0, 2]].tolist() == [0.5, 0]
    assert math.isnan(found.similarity[1])
    assert "2 -> 3 channels, groups of 1" in str(found)
    assert "cosine 0.00 / 0.25 / 0.50" in str(found)
    assert "churn" not in str(found)


def test_mean_cost_is_what_the_assignment_minimises() -> None:
    cost = features(3, 8).double().abs()
    index = solve_assignment(cost)
    found = Matching("x", index, cost, 1)
    assert found.mean_cost * 6 == pytest.approx(oracles.assignment_cost(cost.numpy(), index.numpy()))


@pytest.mark.parametrize(
    ("before", "after", "teachers", "expected"),
    [
        ([[0, 1], [2, 3]], [[0, 1], [2, 3]], 4, 0),
        ([[0, 1], [2, 3]], [[1, 0], [3, 2]], 4, 0),
        ([[0, 1], [2, 3]], [[2, 3], [0, 1]], 4, 1),
        ([[0, 1], [2, 3]], [[0, 2], [1, 3]], 4, 0.5),
        ([[0], [1]], [[0], [2]], 4, 0.5),
        ([[0], [-1], [1]], [[-1], [0], [1]], 2, 0.5),
        ([[0], [-1]], [[0], [-1]], 1, 0),
    ],
)
def test_churn(before: list[list[int]], after: list[list[int]], teachers: int, expected: float) -> None:
    assert churn(torch.tensor(before), torch.tensor(after), teachers) == expected


@settings(deadline=None, max_examples=50, derandomize=True, database=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_churn_counts_teacher_channels_with_another_student_channel(students: int, teachers: int, seed: int) -> None:
    indices = [solve_assignment(features(students, teachers, seed=seed + step)) for step in range(2)]
    owners = [
        [next((s for s, group in enumerate(index.tolist()) if t in group), None) for t in range(teachers)]
        for index in indices
    ]
    changed = sum(first != second for first, second in zip(*owners, strict=True))
    assert churn(*indices, teachers) == pytest.approx(changed / teachers)
