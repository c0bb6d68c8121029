"""The tensor functions against the slow loops of oracles.py.

Axes: N images, Cs student channels, Ct teacher channels, G teacher channels per student channel.
"""

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm, truncnorm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracles
from matchdistill.functional import (
    batchnorm_margin,
    empirical_margin,
    kd_loss,
    matching_cost,
    partial_loss,
    random_assignment,
    reduce_channels,
    reduce_margin,
    solve_assignment,
)
from matchdistill.matching import CostAccumulator

REDUCTIONS = ("sm", "rd", "amp", "max", "mean")
DETERMINISTIC = ("amp", "max", "mean")
SPATIAL = ((), (5,), (3, 4), (2, 3, 2))
SHAPE_IDS = ("NC", "NCL", "NCHW", "NCDHW")

properties = settings(deadline=None, max_examples=40, derandomize=True, database=None)
coarse_values = st.integers(-6, 6).map(lambda k: k / 4)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def assert_close(actual: Tensor, expected: np.ndarray | float, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    assert tuple(actual.shape) == np.shape(expected)
    assert_allclose(as_numpy(actual), expected, rtol=rtol, atol=atol)


def masks(*shape: int, seed: int = 0) -> Tensor:
    """About two thirds count; where there are several images, none of the last one's positions."""
    mask = torch.rand(shape, generator=seeded(seed)) < 0.7
    if shape[0] > 1:
        mask[-1] = False
    return mask


def spoiled(features: Tensor, mask: Tensor, value: float = float("nan")) -> Tensor:
    """The features (N, C, *) with something else where the mask (N, *) is False."""
    return features.clone().masked_fill_(~mask[:, None], value)


def random_index(student_channels: int, group_size: int, teacher_channels: int, seed: int = 0) -> Tensor:
    order = torch.randperm(teacher_channels, generator=seeded(seed))
    return order[: student_channels * group_size].reshape(student_channels, group_size)


class OperatorLog(TorchDispatchMode):
    """Records the name of every operator and the size of the largest tensor that any of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result

    def count(self, *names: str) -> int:
        return sum(name in names for name in self.names)


GEMMS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear", "matmul", "einsum")
HOST_READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")


# The oracles themselves, on cases that can be worked out by hand


def test_oracle_cost_of_equal_opposite_orthogonal_and_zero_maps():
    student = np.array([[[3.0, 0.0]]])
    teacher = np.array([[[0.5, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    assert_allclose(oracles.matching_cost(student, teacher), [[0.0, 4.0, 2.0, 2.0]])
    assert_allclose(oracles.matching_cost(np.zeros((1, 1, 2)), teacher), [[2.0, 2.0, 2.0, 2.0]])


@pytest.mark.parametrize(
    ("students", "teachers", "group_size"), [(2, 2, 1), (2, 4, 2), (2, 6, 2), (3, 5, 1), (5, 3, 1)]
)
def test_oracle_assignment_agrees_with_brute_force(students, teachers, group_size):
    for seed in range(5):
        cost = np.random.default_rng(seed).uniform(0, 4, (students, teachers))
        index = oracles.balanced_assignment(cost, group_size)
        assert oracles.assignment_cost(cost, index) == pytest.approx(oracles.brute_force_cost(cost, group_size))


def test_oracle_batchnorm_margin_agrees_with_scipy_and_the_half_normal():
    assert_allclose(oracles.batchnorm_margin(np.array([2.0]), np.array([0.0])), [-2.0 * np.sqrt(2.0 / np.pi)])
    for z in (-30.0, -4.0, -0.3, 0.0, 1.7, 3.0):
        expected = 0.7 * truncnorm(-np.inf, -z).mean() + 0.7 * z
        assert_allclose(oracles.batchnorm_margin(np.array([-0.7]), np.array([0.7 * z])), [expected], rtol=1e-9)


def test_oracle_partial_loss_by_hand():
    student = np.array([[[1.0, -3.0, -1.0, 0.5]]])
    target = np.array([[[2.0, -1.0, -5.0, -0.5]]])
    # (1 - 2)^2; skipped, below its negative target; (-1 + 2)^2 against the margin; (0.5 + 0.5)^2
    assert oracles.partial_loss(student, target, np.array([-2.0]), "sum") == pytest.approx(3.0)
    assert oracles.partial_loss(student, target, np.array([-2.0]), "mean") == pytest.approx(0.75)


# matching_cost


@pytest.mark.parametrize("spatial", SPATIAL, ids=SHAPE_IDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_matching_cost_equals_the_loops(spatial, dtype, tolerance):
    student, teacher = randn(4, 3, *spatial, dtype=dtype), randn(4, 7, *spatial, seed=1, dtype=dtype)
    cost = matching_cost(student, teacher)
    assert cost.dtype == dtype
    assert_close(cost, oracles.matching_cost(as_numpy(student), as_numpy(teacher)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matching_cost_of_half_precision_accumulates_in_float32(dtype):
    student, teacher = randn(3, 4, 9, 8, dtype=dtype), randn(3, 6, 9, 8, seed=1, dtype=dtype)
    cost = matching_cost(student, teacher)
    assert cost.dtype == torch.float32
    assert_close(cost, oracles.matching_cost(as_numpy(student), as_numpy(teacher)), rtol=0, atol=1e-5)


def test_matching_cost_of_large_half_precision_values_does_not_overflow():
    student, teacher = (randn(2, 3, 8, 8, seed=k).mul(5000).half() for k in range(2))
    expected = oracles.matching_cost(as_numpy(student), as_numpy(teacher))
    assert_close(matching_cost(student, teacher), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
def test_matching_cost_keeps_float32_inside_autocast_and_for_mixed_inputs(student_dtype):
    student, teacher = randn(3, 4, 5, 5, dtype=student_dtype), randn(3, 8, 5, 5, seed=1, dtype=torch.float32)
    expected = oracles.matching_cost(as_numpy(student), as_numpy(teacher))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = matching_cost(student, teacher)
    for cost in (inside, matching_cost(student, teacher)):
        assert cost.dtype == torch.float32
        assert_close(cost, expected, rtol=0, atol=1e-5)


def test_matching_cost_of_strided_and_channels_last_inputs():
    student = randn(6, 8, 5, 10)[::2, 1::2, :, ::2]
    teacher = randn(3, 5, 5, 9, seed=1).permute(0, 3, 1, 2)
    assert not student.is_contiguous()
    assert not teacher.is_contiguous()
    expected = oracles.matching_cost(as_numpy(student), as_numpy(teacher))
    assert_close(matching_cost(student, teacher), expected)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)]
    assert_close(matching_cost(*last), expected)


def test_matching_cost_of_zero_maps_is_two_and_finite():
    student, teacher = randn(2, 3, 4, 4), randn(2, 5, 4, 4, seed=1)
    student[:, 1] = 0
    student[0, 2] = 0
    teacher[:, 3] = 0
    cost = matching_cost(student, teacher)
    assert_close(cost, oracles.matching_cost(as_numpy(student), as_numpy(teacher)))
    assert (cost[1] == 2).all()
    assert (cost[:, 3] == 2).all()


def test_matching_cost_of_constant_channels():
    student, teacher = randn(2, 2, 3, 3), randn(2, 3, 3, 3, seed=1)
    student[:, 0], teacher[:, 0], teacher[:, 1] = 0.3, 7.0, -1e-3
    cost = matching_cost(student, teacher)
    assert_close(cost, oracles.matching_cost(as_numpy(student), as_numpy(teacher)))
    assert cost[0, 0].item() == pytest.approx(0.0, abs=1e-12)
    assert cost[0, 1].item() == pytest.approx(4.0, abs=1e-12)


@pytest.mark.parametrize("spatial", SPATIAL, ids=SHAPE_IDS)
def test_matching_cost_of_one_image(spatial):
    student, teacher = randn(1, 2, *spatial), randn(1, 4, *spatial, seed=1)
    assert_close(matching_cost(student, teacher), oracles.matching_cost(as_numpy(student), as_numpy(teacher)))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-15), (torch.float32, 1e15), (torch.float64, 1e-100), (torch.float64, 1e100)],
)
def test_matching_cost_of_very_small_and_very_large_maps(dtype, scale):
    student, teacher = randn(2, 3, 3, 3), randn(2, 4, 3, 3, seed=1)
    expected = oracles.matching_cost(as_numpy(student), as_numpy(teacher))
    student[:, 1] *= scale
    teacher[1, 2] *= scale
    assert_close(matching_cost(student.to(dtype), teacher.to(dtype)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_matching_cost_does_not_hide_non_finite_features(bad):
    student, teacher = randn(2, 3, 4, 4), randn(2, 5, 4, 4, seed=1)
    student[1, 2, 0, 0] = bad
    finite = torch.isfinite(matching_cost(student, teacher))
    assert finite[:2].all()
    assert not finite[2].any()


def test_matching_cost_builds_no_graph():
    student, teacher = randn(2, 3, 4).requires_grad_(), randn(2, 5, 4, seed=1).requires_grad_()
    cost = matching_cost(student, teacher)
    assert not cost.requires_grad
    assert cost.grad_fn is None


def test_matching_cost_leaves_its_inputs_alone():
    student, teacher = randn(2, 3, 4, 4), randn(2, 5, 4, 4, seed=1)
    before = student.clone(), teacher.clone()
    matching_cost(student, teacher)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spatial", [(), (2, 2)], ids=["NC", "NCHW"])
def test_matching_cost_is_one_gemm_without_the_per_image_tensor_or_a_host_read(dtype, spatial):
    student, teacher = randn(16, 32, *spatial, dtype=dtype), randn(16, 64, *spatial, seed=1, dtype=dtype)
    with OperatorLog() as log:
        matching_cost(student, teacher)
    assert log.largest <= max(teacher.numel(), 32 * 64)
    assert log.count(*GEMMS) == 1
    assert log.count(*HOST_READS) == 0


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape"),
    [
        pytest.param((2, 3, 4, 4), (3, 5, 4, 4), id="batch"),
        pytest.param((2, 3, 4, 4), (1, 5, 4, 4), id="batch that would broadcast"),
        pytest.param((2, 3, 4, 4), (2, 5, 2, 2), id="spatial"),
        pytest.param((2, 3, 4, 4), (2, 5, 2, 8), id="spatial of equal area"),
        pytest.param((2, 3, 16), (2, 5, 4, 4), id="number of axes"),
        pytest.param((3,), (5,), id="one axis"),
        pytest.param((), (), id="no axis"),
        pytest.param((0, 3, 4, 4), (0, 5, 4, 4), id="empty batch"),
    ],
)
def test_matching_cost_refuses_inputs_that_do_not_fit(student_shape, teacher_shape):
    with pytest.raises(ValueError):
        matching_cost(torch.ones(student_shape), torch.ones(teacher_shape))


@properties
@given(st.data())
def test_matching_cost_property_loops_and_range(data):
    n, cs, ct, length = (data.draw(st.integers(1, 3)) for _ in range(4))
    student = data.draw(arrays(np.float64, (n, cs, length), elements=coarse_values))
    teacher = data.draw(arrays(np.float64, (n, ct, length), elements=coarse_values))
    cost = matching_cost(torch.from_numpy(student), torch.from_numpy(teacher))
    assert_close(cost, oracles.matching_cost(student, teacher))
    assert cost.min() >= -1e-12
    assert cost.max() <= 4 + 1e-12


@properties
@given(seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_matching_cost_property_positive_scaling_changes_nothing(seed, student_scale, teacher_scale):
    student, teacher = randn(2, 3, 4, seed=seed), randn(2, 5, 4, seed=seed + 1)
    before = matching_cost(student, teacher)
    student[:, 1] *= student_scale
    teacher[0, 2] *= teacher_scale
    assert_close(matching_cost(student, teacher), as_numpy(before), rtol=1e-9, atol=1e-9)


@properties
@given(seeds)
def test_matching_cost_property_permuting_channels_permutes_the_matrix(seed):
    student, teacher = randn(2, 4, 5, seed=seed), randn(2, 6, 5, seed=seed + 1)
    rows, columns = torch.randperm(4, generator=seeded(seed)), torch.randperm(6, generator=seeded(seed))
    expected = matching_cost(student, teacher)[rows][:, columns]
    assert_close(matching_cost(student[:, rows], teacher[:, columns]), as_numpy(expected))


GARBAGE = (float("nan"), float("inf"), -1e30, 0.0)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("spatial", SPATIAL, ids=SHAPE_IDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_matching_cost_of_the_positions_that_count(spatial, dtype, tolerance, garbage):
    student, teacher = randn(4, 3, *spatial, dtype=dtype), randn(4, 7, *spatial, seed=1, dtype=dtype)
    mask = masks(4, *spatial)
    expected = oracles.matching_cost(as_numpy(student), as_numpy(teacher), mask.numpy())
    cost = matching_cost(spoiled(student, mask, garbage), spoiled(teacher, mask, garbage), mask)
    assert_close(cost, expected, rtol=0, atol=tolerance)


@properties
@given(st.data())
def test_matching_cost_property_masked_loops(data):
    n, cs, ct, length = (data.draw(st.integers(1, 3)) for _ in range(4))
    student = data.draw(arrays(np.float64, (n, cs, length), elements=coarse_values))
    teacher = data.draw(arrays(np.float64, (n, ct, length), elements=coarse_values))
    mask = data.draw(arrays(np.bool_, (len(student), student.shape[2])))
    given_mask = torch.from_numpy(mask)
    features = (spoiled(torch.from_numpy(values), given_mask) for values in (student, teacher))
    assert_close(matching_cost(*features, given_mask), oracles.matching_cost(student, teacher, mask))


def test_matching_cost_with_a_mask_is_one_gemm_without_a_host_read():
    student, teacher = randn(16, 32, 2, 2, dtype=torch.float32), randn(16, 64, 2, 2, seed=1, dtype=torch.float32)
    mask = masks(16, 2, 2)
    with OperatorLog() as log:
        matching_cost(student, teacher, mask)
    assert log.count(*GEMMS) == 1
    assert log.count(*HOST_READS) == 0


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(torch.ones(2, 4, 5), id="float"),
        pytest.param(torch.ones(2, 4, 5, dtype=torch.uint8), id="uint8"),
        pytest.param(torch.ones(2, 3, 4, 5, dtype=torch.bool), id="with channels"),
        pytest.param(torch.ones(2, 1, 4, 5, dtype=torch.bool), id="with a channel axis"),
        pytest.param(torch.ones(1, 4, 5, dtype=torch.bool), id="batch that would broadcast"),
        pytest.param(torch.ones(2, 1, 5, dtype=torch.bool), id="positions that would broadcast"),
        pytest.param(torch.ones(4, 5, dtype=torch.bool), id="without a batch"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask):
    student, teacher = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1)
    message = re.escape(
        f"mask of {mask.dtype} {tuple(mask.shape)} for features (2, 3, 4, 5): expected torch.bool (2, 4, 5)"
    )
    for call in (
        lambda: matching_cost(student, teacher, mask),
        lambda: empirical_margin(teacher, mask),
        lambda: partial_loss(student, teacher, torch.zeros(3), "mean", mask),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# CostAccumulator


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_cost_accumulator_over_unequal_batches_equals_one_batch(dtype, tolerance):
    student, teacher = randn(11, 3, 4, 4, dtype=dtype), randn(11, 7, 4, 4, seed=1, dtype=dtype)
    accumulator = CostAccumulator()
    for start, stop in ((0, 1), (1, 6), (6, 8), (8, 11)):
        accumulator.update(student[start:stop], teacher[start:stop])
        assert int(accumulator.images) == stop
    cost = accumulator.compute()
    assert cost.dtype == torch.float64
    assert_close(cost, oracles.matching_cost(as_numpy(student), as_numpy(teacher)), rtol=0, atol=tolerance)


def test_cost_accumulator_weighs_images_not_batches():
    student, teacher = torch.ones(4, 1, 2), torch.ones(4, 1, 2)
    teacher[:3] = -1
    accumulator = CostAccumulator()
    accumulator.update(student[:3], teacher[:3])
    accumulator.update(student[3:], teacher[3:])
    assert accumulator.compute().item() == pytest.approx(3.0)


def test_cost_accumulator_compute_can_be_repeated_and_continued():
    student, teacher = randn(5, 2, 4), randn(5, 4, 4, seed=1)
    accumulator = CostAccumulator()
    accumulator.update(student[:2], teacher[:2])
    first = accumulator.compute()
    assert torch.equal(first, accumulator.compute())
    accumulator.update(student[2:], teacher[2:])
    assert_close(accumulator.compute(), oracles.matching_cost(as_numpy(student), as_numpy(teacher)))
    assert_close(first, oracles.matching_cost(as_numpy(student[:2]), as_numpy(teacher[:2])))


def test_cost_accumulator_keeps_small_terms_after_many_batches():
    accumulator = CostAccumulator()
    same, nearly = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 0.02]]])
    accumulator.update(same.expand(512, 1, 2), -same.expand(512, 1, 2))
    for _ in range(512):
        accumulator.update(same, nearly)
    expected = (4.0 + oracles.matching_cost(as_numpy(same), as_numpy(nearly)).item()) / 2
    assert int(accumulator.images) == 1024
    assert accumulator.compute().item() == pytest.approx(expected, abs=1e-6)


def test_cost_accumulator_update_reads_nothing_back_to_the_host():
    student, teacher = randn(16, 32, 2, 2, dtype=torch.float32), randn(16, 64, 2, 2, seed=1, dtype=torch.float32)
    accumulator = CostAccumulator()
    accumulator.update(student, teacher)
    with OperatorLog() as log:
        accumulator.update(student, teacher)
    assert log.largest <= max(teacher.numel(), 32 * 64)
    assert log.count(*GEMMS) == 1
    assert log.count(*HOST_READS) == 0


# solve_assignment


def check_index(index: Tensor, student_channels: int, teacher_channels: int, group_size: int) -> None:
    assert index.dtype == torch.int64
    assert tuple(index.shape) == (student_channels, group_size)
    used = index[index >= 0].tolist()
    assert len(used) == len(set(used)) == min(teacher_channels, student_channels * group_size)
    assert all(0 <= j < teacher_channels for j in used)
    if student_channels * group_size <= teacher_channels:
        assert (index >= 0).all()
        assert (index.sort(dim=1).values == index).all()
    else:
        assert set(index[index < 0].tolist()) == {-1}


@pytest.mark.parametrize(
    ("students", "teachers", "group_size"),
    [
        (1, 1, 1),
        (3, 3, 1),
        (2, 4, 2),
        (2, 5, 2),
        (2, 6, 3),
        (2, 6, 2),
        (3, 7, 2),
        (1, 6, 6),
        (3, 6, 1),
        (5, 3, 1),
        (6, 1, 1),
    ],
)
def test_solve_assignment_is_optimal_against_brute_force(students, teachers, group_size):
    for seed in range(6):
        cost = torch.rand(students, teachers, generator=seeded(seed), dtype=torch.float64) * 4
        index = solve_assignment(cost, group_size)
        check_index(index, students, teachers, group_size)
        best = oracles.brute_force_cost(cost.numpy(), group_size)
        assert oracles.assignment_cost(cost.numpy(), index.numpy()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(("students", "teachers", "group_size"), [(16, 64, 4), (24, 116, 4), (40, 97, 2), (32, 20, 1)])
def test_solve_assignment_is_optimal_against_the_stacked_problem(students, teachers, group_size):
    cost = torch.rand(students, teachers, generator=seeded(3), dtype=torch.float64) * 4
    index = solve_assignment(cost, group_size)
    check_index(index, students, teachers, group_size)
    expected = oracles.balanced_assignment(cost.numpy(), group_size)
    assert oracles.assignment_cost(cost.numpy(), index.numpy()) == pytest.approx(
        oracles.assignment_cost(cost.numpy(), expected), abs=1e-9
    )
    assert np.array_equal(index.numpy(), expected)


@pytest.mark.parametrize(
    ("students", "teachers", "group_size"), [(3, 6, 2), (3, 8, 2), (4, 4, 1), (4, 7, 1), (4, 3, 1)]
)
def test_solve_assignment_default_group_size(students, teachers, group_size):
    cost = torch.rand(students, teachers, generator=seeded(1))
    assert oracles.default_group_size(students, teachers) == group_size
    index = solve_assignment(cost)
    check_index(index, students, teachers, group_size)
    assert torch.equal(index, solve_assignment(cost, group_size))


def test_solve_assignment_uses_the_columns_that_shaving_would_drop():
    cost = torch.tensor([[3.0, 3.0, 3.0, 3.0, 0.0], [3.0, 3.0, 3.0, 3.0, 4.0]], dtype=torch.float64)
    index = solve_assignment(cost)
    check_index(index, 2, 5, 2)
    assert 4 in index[0].tolist()
    shaved = oracles.brute_force_cost(cost[:, :4].numpy(), 2)
    assert oracles.assignment_cost(cost.numpy(), index.numpy()) == pytest.approx(9.0)
    assert shaved == pytest.approx(12.0)


def test_solve_assignment_one_to_one_takes_the_best_of_many_teacher_channels():
    cost = torch.full((2, 6), 4.0)
    cost[0, 5], cost[0, 2], cost[1, 5] = 0.1, 0.3, 0.2
    assert solve_assignment(cost, group_size=1).tolist() == [[2], [5]]


def test_solve_assignment_with_fewer_teacher_channels_guides_the_best_students():
    cost = torch.tensor([[3.0, 3.5], [0.1, 2.0], [2.5, 3.0], [0.2, 0.3]])
    for group_size in (None, 1):
        assert solve_assignment(cost, group_size).tolist() == [[-1], [0], [-1], [1]]


@pytest.mark.parametrize(("students", "teachers", "group_size"), [(3, 7, None), (4, 8, 1), (5, 3, None), (1, 4, 2)])
def test_random_assignment_has_the_form_of_a_solved_one_and_every_pair_alike(students, teachers, group_size):
    cost = torch.arange(float(students * teachers)).reshape(students, teachers)
    solved = solve_assignment(cost, group_size)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.zeros(students, teachers)
    for _ in range(600):
        index = random_assignment(cost, group_size, generator)
        assert index.shape == solved.shape
        assert index.dtype == solved.dtype
        assert (index < 0).sum() == (solved < 0).sum()
        matched = index[index >= 0]
        assert len(matched.unique()) == len(matched)
        rows = torch.arange(students)[:, None].expand_as(index)[index >= 0]
        pairs[rows, matched] += 1
    expected = (solved >= 0).sum() / (students * teachers)
    assert (pairs / 600 - expected).abs().max() < 5 * (expected * (1 - expected) / 600).sqrt()
    again = [random_assignment(cost, group_size, torch.Generator().manual_seed(seed)) for seed in (1, 1)]
    assert torch.equal(*again)


@pytest.mark.parametrize(("shape", "group_size"), [((3, 5), 2), ((4, 3), 2), ((1, 1), 2), ((2, 8), 5)])
def test_solve_assignment_refuses_groups_that_do_not_fit(shape, group_size):
    with pytest.raises(ValueError):
        solve_assignment(torch.rand(shape, generator=seeded(0)), group_size)


@pytest.mark.parametrize("group_size", [0, -1])
def test_solve_assignment_refuses_a_group_size_below_one(group_size):
    with pytest.raises(ValueError):
        solve_assignment(torch.rand(3, 6, generator=seeded(0)), group_size)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_solve_assignment_refuses_a_cost_that_is_not_a_matrix(shape):
    with pytest.raises(ValueError):
        solve_assignment(torch.rand(shape, generator=seeded(0)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("group_size", [None, 1])
def test_solve_assignment_names_the_first_non_finite_cost(bad, group_size):
    cost = torch.rand(23, 57, generator=seeded(0))
    cost[13, 41] = bad
    cost[17, 5] = float("nan")
    with pytest.raises(ValueError) as error:
        solve_assignment(cost, group_size)
    assert re.search(r"\b13\b\D+\b41\b", str(error.value))
    assert not re.search(r"\b17\b\D+\b5\b", str(error.value))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_solve_assignment_accepts_every_float_type_strides_and_gradients(dtype):
    cost = (torch.rand(9, 4, generator=seeded(2)) * 4).to(dtype).t().requires_grad_()
    index = solve_assignment(cost)
    check_index(index, 4, 9, 2)
    rounded = as_numpy(cost)
    best = oracles.assignment_cost(rounded, oracles.balanced_assignment(rounded, 2))
    assert oracles.assignment_cost(rounded, index.numpy()) == pytest.approx(best, abs=1e-12)


def test_solve_assignment_of_equal_costs_is_still_balanced():
    check_index(solve_assignment(torch.full((5, 17), 2.0)), 5, 17, 3)


def test_solve_assignment_of_2048_by_2048_channels():
    cost = torch.rand(2048, 2048, generator=seeded(0)) * 4
    index = solve_assignment(cost)
    assert tuple(index.shape) == (2048, 1)
    assert index.flatten().sort().values.tolist() == list(range(2048))
    exact = as_numpy(cost)
    rows, columns = linear_sum_assignment(exact)
    assert exact[np.arange(2048), index.flatten().numpy()].sum() <= exact[rows, columns].sum() + 1e-9


@properties
@given(st.data())
def test_solve_assignment_property_optimal_with_ties(data):
    students, teachers = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    group_size = data.draw(st.integers(1, oracles.default_group_size(students, teachers)))
    cost = data.draw(arrays(np.float64, (students, teachers), elements=st.integers(0, 4).map(float)))
    index = solve_assignment(torch.from_numpy(cost), group_size)
    check_index(index, students, teachers, group_size)
    best = oracles.brute_force_cost(cost, group_size)
    assert oracles.assignment_cost(cost, index.numpy()) == pytest.approx(best)


@properties
@given(seeds, st.integers(1, 6), st.integers(1, 20))
def test_solve_assignment_property_permuting_teacher_channels_permutes_the_index(seed, students, teachers):
    cost = torch.rand(students, teachers, generator=seeded(seed), dtype=torch.float64) * 4
    order = torch.randperm(teachers, generator=seeded(seed))
    index, permuted = solve_assignment(cost), solve_assignment(cost[:, order])
    total = oracles.assignment_cost(cost.numpy(), index.numpy())
    assert oracles.assignment_cost(cost[:, order].numpy(), permuted.numpy()) == pytest.approx(total, abs=1e-9)
    back = torch.where(permuted >= 0, order[permuted.clamp(min=0)], -1)
    assert torch.equal(back.sort(dim=1).values, index.sort(dim=1).values)


# reduce_channels


@pytest.mark.parametrize("spatial", SPATIAL, ids=SHAPE_IDS)
@pytest.mark.parametrize("reduction", DETERMINISTIC)
def test_reduce_channels_equals_the_loops(spatial, reduction):
    teacher, index = randn(2, 11, *spatial), random_index(3, 3, 11)
    reduced = reduce_channels(teacher, index, reduction)
    assert_close(reduced, oracles.reduce_channels(as_numpy(teacher), index.numpy(), reduction))


@pytest.mark.parametrize("spatial", SPATIAL, ids=SHAPE_IDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_channels_of_groups_of_one_picks_the_channel(spatial, reduction):
    teacher, index = randn(2, 7, *spatial), random_index(4, 1, 7)
    reduced = reduce_channels(teacher, index, reduction)
    assert torch.equal(reduced, teacher[:, index[:, 0]])
    assert_close(reduced, oracles.reduce_channels(as_numpy(teacher), index.numpy(), "sm"))


def test_reduce_channels_default_is_absolute_max_pooling():
    teacher, index = randn(2, 6, 3, 3), random_index(2, 3, 6)
    assert torch.equal(reduce_channels(teacher, index), reduce_channels(teacher, index, "amp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", DETERMINISTIC)
def test_reduce_channels_of_lower_precision(dtype, reduction):
    teacher, index = randn(2, 8, 3, 3, dtype=dtype), random_index(2, 4, 8)
    expected = oracles.reduce_channels(as_numpy(teacher), index.numpy(), reduction)
    tolerance = 4 * torch.finfo(dtype).eps if reduction == "mean" else 0.0
    assert_close(reduce_channels(teacher, index, reduction), expected, rtol=tolerance, atol=tolerance)


def test_reduce_channels_mean_of_large_half_precision_values_does_not_overflow():
    teacher = torch.tensor([[[40000.0], [42000.0]]], dtype=torch.float16)
    assert reduce_channels(teacher, torch.tensor([[0, 1]]), "mean").item() == torch.tensor(41000.0).half().item()


def test_reduce_channels_of_strided_and_channels_last_inputs():
    teacher = randn(4, 12, 3, 8)[::2, ::2, :, 1::2]
    index = random_index(2, 3, 6)
    for reduction in DETERMINISTIC:
        expected = oracles.reduce_channels(as_numpy(teacher), index.numpy(), reduction)
        last = teacher.contiguous(memory_format=torch.channels_last)
        assert_close(reduce_channels(teacher, index, reduction), expected)
        assert_close(reduce_channels(last, index, reduction), expected)


def test_absolute_max_pooling_gives_ties_to_the_first_in_index_order():
    teacher = torch.tensor([[[2.0, -2.0, 1.0], [-2.0, 2.0, -1.0], [0.5, 2.0, 1.0]]])
    assert reduce_channels(teacher, torch.tensor([[0, 1, 2]]), "amp").tolist() == [[[2.0, -2.0, 1.0]]]
    assert reduce_channels(teacher, torch.tensor([[1, 0, 2]]), "amp").tolist() == [[[-2.0, 2.0, -1.0]]]
    assert reduce_channels(teacher, torch.tensor([[2, 1, 0]]), "amp").tolist() == [[[-2.0, 2.0, 1.0]]]


@properties
@given(st.data())
def test_reduce_channels_property_loops_with_ties(data):
    n, students, group_size, length = (data.draw(st.integers(1, 3)) for _ in range(4))
    channels = students * group_size + data.draw(st.integers(0, 2))
    teacher = data.draw(arrays(np.float64, (n, channels, length), elements=coarse_values))
    index = np.array(data.draw(st.permutations(range(channels))))[: students * group_size].reshape(students, group_size)
    for reduction in DETERMINISTIC:
        reduced = reduce_channels(torch.from_numpy(teacher), torch.from_numpy(index), reduction)
        assert_close(reduced, oracles.reduce_channels(teacher, index, reduction))


@pytest.mark.parametrize("group_size", [2, 3])
def test_sparse_matching_refuses_groups(group_size):
    index = random_index(2, group_size, 6)
    with pytest.raises(ValueError):
        reduce_channels(randn(1, 6, 2, 2), index, "sm")
    with pytest.raises(ValueError):
        reduce_margin(randn(6), index, "sm")


@pytest.mark.parametrize("name", ["avg", "AMP", "", "forward"])
def test_an_unknown_reduction_is_an_error_that_lists_the_names(name):
    index = random_index(2, 2, 6)
    for call in (
        lambda: reduce_channels(randn(1, 6, 2, 2), index, name),
        lambda: reduce_margin(randn(6), index, name),
    ):
        with pytest.raises(ValueError) as error:
            call()
        for known in REDUCTIONS:
            assert re.search(rf"\b{known}\b", str(error.value))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_channels_never_requires_grad(reduction):
    teacher = randn(2, 6, 3, 3).requires_grad_()
    index = random_index(2, 1, 6)
    assert not reduce_channels(teacher, index, reduction).requires_grad
    assert not reduce_channels(teacher * 2, index, reduction).requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_channels_of_unguided_rows_is_zero(reduction):
    teacher, index = randn(2, 3, 4, 4), torch.tensor([[-1], [2], [-1], [0], [1]])
    reduced = reduce_channels(teacher, index, reduction)
    assert_close(reduced, oracles.reduce_channels(as_numpy(teacher), index.numpy(), "sm"))
    assert (reduced[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("channel", [0, 2])
def test_reduce_channels_of_unguided_rows_reads_no_teacher_channel(reduction, channel):
    teacher = randn(2, 3, 4)
    teacher[:, channel] = float("nan")
    reduced = reduce_channels(teacher, torch.tensor([[0], [-1], [2]]), reduction)
    assert (reduced[:, 1] == 0).all()


# random drop


def drawn_members(spatial: tuple[int, ...], students: int, group_size: int, images: int, seed: int) -> Tensor:
    """Which member of its group each output element came from: teacher channel j holds the value j everywhere."""
    channels = students * group_size
    teacher = torch.arange(float(channels)).reshape(1, channels, *[1] * len(spatial)).expand(images, channels, *spatial)
    index = random_index(students, group_size, channels, seed=5)
    picked = reduce_channels(teacher.contiguous(), index, "rd", seeded(seed)).reshape(images, students, -1, 1)
    is_member = picked == index.reshape(1, students, 1, group_size)
    assert (is_member.sum(dim=-1) == 1).all()
    return is_member.int().argmax(dim=-1)


@pytest.mark.parametrize("spatial", SPATIAL, ids=SHAPE_IDS)
def test_random_drop_returns_values_of_the_group(spatial):
    teacher, index = randn(3, 9, *spatial), random_index(4, 2, 9)
    reduced = as_numpy(reduce_channels(teacher, index, "rd", seeded(0)))
    allowed = oracles.random_drop_choices(as_numpy(teacher), index.numpy())
    assert reduced.shape == allowed.shape[:-1]
    assert (reduced[..., None] == allowed).any(axis=-1).all()


def test_random_drop_picks_every_member_about_equally_often():
    members = drawn_members((16, 16), students=3, group_size=4, images=32, seed=0)
    for channel in range(3):
        shares = torch.bincount(members[:, channel].flatten(), minlength=4) / members[:, channel].numel()
        assert_allclose(shares.numpy(), 0.25, atol=0.02)


def test_random_drop_draws_anew_for_every_sample_channel_and_position():
    members = drawn_members((16, 16), students=8, group_size=4, images=16, seed=1)
    for pair in (
        (members[1:], members[:-1]),
        (members[:, 1:], members[:, :-1]),
        (members[..., 1:], members[..., :-1]),
        (members[..., 16:], members[..., :-16]),
    ):
        agreement = (pair[0] == pair[1]).double().mean().item()
        assert agreement == pytest.approx(0.25, abs=0.02)


def test_random_drop_repeats_with_its_generator_and_goes_on_drawing():
    teacher, index = randn(2, 12, 8, 8), random_index(3, 4, 12)
    first, second = seeded(7), seeded(7)
    a, b = (reduce_channels(teacher, index, "rd", first) for _ in range(2))
    assert torch.equal(a, reduce_channels(teacher, index, "rd", second))
    assert torch.equal(b, reduce_channels(teacher, index, "rd", second))
    assert not torch.equal(a, b)
    assert not torch.equal(a, reduce_channels(teacher, index, "rd", seeded(8)))


def test_random_drop_uses_the_global_state_only_without_a_generator():
    teacher, index = randn(2, 12, 8, 8), random_index(3, 4, 12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        state = torch.get_rng_state()
        reduce_channels(teacher, index, "rd", seeded(0))
        reduce_margin(randn(12), index, "rd", seeded(0))
        assert torch.equal(torch.get_rng_state(), state)
        a, b = (reduce_channels(teacher, index, "rd") for _ in range(2))
        torch.manual_seed(3)
        assert torch.equal(a, reduce_channels(teacher, index, "rd"))
        assert not torch.equal(a, b)


# reduce_margin


@pytest.mark.parametrize("reduction", DETERMINISTIC)
def test_reduce_margin_equals_the_loops(reduction):
    margin, index = -randn(13).abs(), random_index(4, 3, 13)
    assert_close(
        reduce_margin(margin, index, reduction), oracles.reduce_margin(as_numpy(margin), index.numpy(), reduction)
    )


def test_reduce_margin_default_is_the_mean():
    margin, index = -randn(6).abs(), random_index(2, 3, 6)
    assert_close(reduce_margin(margin, index), oracles.reduce_margin(as_numpy(margin), index.numpy(), "amp"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_margin_of_groups_of_one_picks_the_margin(reduction):
    margin, index = -randn(7).abs(), random_index(4, 1, 7)
    assert_close(reduce_margin(margin, index, reduction), oracles.reduce_margin(as_numpy(margin), index.numpy(), "sm"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_margin_of_unguided_rows_keeps_the_others_right(reduction):
    margin = torch.tensor([-0.5, -0.25, -0.125])
    reduced = reduce_margin(margin, torch.tensor([[-1], [2], [0], [1]]), reduction)
    assert reduced[1:].tolist() == [-0.125, -0.5, -0.25]
    assert torch.isfinite(reduced).all()


def test_reduce_margin_at_random_picks_one_member_per_student_channel():
    margin, index = -torch.arange(1.0, 4001.0), random_index(1000, 4, 4000)
    reduced = reduce_margin(margin, index, "rd", seeded(0))
    choices = oracles.random_margin_choices(as_numpy(margin), index.numpy())
    assert all(value in allowed for value, allowed in zip(reduced.tolist(), choices, strict=True))
    member = (reduced[:, None] == margin[index]).int().argmax(dim=1)
    assert_allclose(torch.bincount(member, minlength=4).numpy() / 1000, 0.25, atol=0.06)
    assert torch.equal(reduced, reduce_margin(margin, index, "rd", seeded(0)))
    assert not torch.equal(reduced, reduce_margin(margin, index, "rd", seeded(1)))


# batchnorm_margin

STANDARDISED_SHIFTS = np.concatenate(
    [[-50.0, -37.6, -20.0, -8.5, 8.5, 20.0, 38.5, 50.0], np.linspace(-6, 6, 49), [3.0, 3.08, 3.0902, 3.0903, 3.1]]
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.03, -40.0, 1e-30])
def test_batchnorm_margin_equals_numerical_integration(dtype, tolerance, scale):
    weight = torch.full((len(STANDARDISED_SHIFTS),), scale, dtype=dtype)
    bias = (torch.from_numpy(STANDARDISED_SHIFTS) * abs(scale)).to(dtype)
    margin = batchnorm_margin(weight, bias)
    assert margin.dtype == dtype
    assert_close(margin, oracles.batchnorm_margin(as_numpy(weight), as_numpy(bias)), rtol=tolerance, atol=0)


def test_batchnorm_margin_on_both_sides_of_the_tail_threshold():
    threshold = -norm.ppf(0.001)
    margin = batchnorm_margin(torch.full((2,), 2.0), torch.tensor([threshold - 1e-3, threshold + 1e-3]).float() * 2)
    below, above = margin.tolist()
    assert -0.7 < below < -0.5
    assert above == -6.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batchnorm_margin_of_a_zero_scale_is_the_negative_part_of_the_shift(dtype):
    bias = torch.tensor([-2.0, -1e-20, 0.0, 1e-20, 3.0], dtype=dtype)
    for zero in (0.0, -0.0):
        margin = batchnorm_margin(torch.full_like(bias, zero), bias)
        assert_close(margin, oracles.batchnorm_margin(np.zeros(5), as_numpy(bias)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batchnorm_margin_of_tiny_scales_is_finite(dtype):
    scales = torch.tensor([1e-30, -1e-30, 1e-38, 1e-45], dtype=dtype)
    shifts = torch.tensor([-3.0, -1e-20, 0.0, 1e-30, 1.0, 1e20, -1e20], dtype=dtype)
    weight, bias = (x.flatten() for x in torch.meshgrid(scales, shifts, indexing="ij"))
    margin = batchnorm_margin(weight, bias)
    assert torch.isfinite(margin).all()
    assert (margin <= 0).all()
    assert_close(margin, oracles.batchnorm_margin(as_numpy(weight), as_numpy(bias)), rtol=1e-5, atol=1e-44)


@properties
@given(st.floats(-5, 5, width=32), st.floats(-50, 50, width=32))
def test_batchnorm_margin_property_finite_never_positive_and_even_in_the_scale(weight, bias):
    scale, shift = torch.tensor([weight, -weight]), torch.tensor([bias, bias])
    margin = batchnorm_margin(scale, shift)
    assert torch.isfinite(margin).all()
    assert (margin <= 0).all()
    assert margin[0] == margin[1]


def test_batchnorm_margin_is_a_constant_without_a_graph():
    layer = torch.nn.BatchNorm2d(4)
    margin = batchnorm_margin(layer.weight, layer.bias)
    assert not margin.requires_grad
    assert_close(margin, np.full(4, -np.sqrt(2 / np.pi)), rtol=1e-6)


# empirical_margin


@pytest.mark.parametrize("spatial", SPATIAL, ids=SHAPE_IDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_empirical_margin_equals_the_loops(spatial, dtype, tolerance):
    features = randn(5, 4, *spatial, dtype=dtype)
    features[:, 1] = features[:, 1].abs()
    features[:, 2] = 0
    features[:, 3] = -features[:, 3].abs()
    margin = empirical_margin(features)
    assert_close(margin, oracles.empirical_margin(as_numpy(features)), rtol=tolerance, atol=0)
    assert margin[1:3].tolist() == [0.0, 0.0]


@properties
@given(st.data())
def test_empirical_margin_property_masked_loops(data):
    n, c, length = (data.draw(st.integers(1, 3)) for _ in range(3))
    features = data.draw(arrays(np.float64, (n, c, length), elements=coarse_values))
    mask = data.draw(arrays(np.bool_, (n, length)))
    garbage = data.draw(st.sampled_from([*GARBAGE, float("-inf")]))
    given_mask = torch.from_numpy(mask)
    margin = empirical_margin(spoiled(torch.from_numpy(features), given_mask, garbage), given_mask)
    assert_close(margin, oracles.empirical_margin(features, mask))


def test_empirical_margin_of_half_precision_does_not_overflow():
    features = torch.full((4, 1, 32, 32), -1000.0, dtype=torch.float16)
    assert empirical_margin(features).tolist() == [-1000.0]


def test_empirical_margin_is_a_constant_without_a_graph():
    assert not empirical_margin(randn(2, 3, 4, 4).requires_grad_()).requires_grad


def test_empirical_margin_of_normal_samples_approaches_the_batchnorm_margin():
    weight, bias = torch.tensor([0.5, -2.0, 1.0]), torch.tensor([0.3, -1.0, 1.5])
    samples = randn(40, 3, 50, 50, dtype=torch.float32) * weight.reshape(1, 3, 1, 1) + bias.reshape(1, 3, 1, 1)
    assert_close(empirical_margin(samples), as_numpy(batchnorm_margin(weight, bias)), rtol=0.02)


# partial_loss


def loss_inputs(*spatial: int, seed: int = 0, images: int = 2, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    student = randn(images, channels, *spatial, seed=seed)
    target = randn(images, channels, *spatial, seed=seed + 1)
    return student, target, -randn(channels, seed=seed + 2).abs() * 0.5


def loss_arrays(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    student, target, margin = inputs
    return as_numpy(student), as_numpy(target), as_numpy(margin)


@pytest.mark.parametrize("spatial", SPATIAL, ids=SHAPE_IDS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_partial_loss_equals_the_loops(spatial, reduction):
    inputs = loss_inputs(*spatial, images=4)
    loss = partial_loss(*inputs, reduction)
    assert loss.dtype == torch.float64
    assert_close(loss, oracles.partial_loss(*loss_arrays(inputs), reduction))


def test_partial_loss_default_is_the_sum():
    inputs = loss_inputs(4, 4)
    assert_close(partial_loss(*inputs), oracles.partial_loss(*loss_arrays(inputs), "sum"))


def test_partial_loss_keyword_names():
    student, target, margin = loss_inputs(4, 4)
    loss = partial_loss(student=student, target=target, margin=margin, reduction="mean")
    assert_close(loss, oracles.partial_loss(*loss_arrays((student, target, margin)), "mean"))


def test_partial_loss_of_strided_and_channels_last_inputs():
    inputs = loss_inputs(4, 6, images=4)
    strided = inputs[0][::2, :, :, ::2], inputs[1][1::2, :, :, 1::2], inputs[2]
    expected = oracles.partial_loss(*loss_arrays(strided), "sum")
    assert_close(partial_loss(*strided), expected)
    last = [x.contiguous(memory_format=torch.channels_last) for x in strided[:2]]
    assert_close(partial_loss(*last, strided[2]), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("margin_dtype", [None, torch.float32])
def test_partial_loss_of_lower_precision_is_float32(dtype, reduction, margin_dtype):
    student, target, margin = loss_inputs(6, 6)
    inputs = student.to(dtype), target.to(dtype), margin.to(margin_dtype or dtype)
    loss = partial_loss(*inputs, reduction)
    assert loss.dtype == torch.float32
    assert_close(loss, oracles.partial_loss(*loss_arrays(inputs), reduction), rtol=1e-5)


def test_partial_loss_keeps_float32_inside_autocast():
    student, target, margin = loss_inputs(6, 6)
    inputs = student.bfloat16(), target.float(), margin.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = partial_loss(*inputs)
    assert loss.dtype == torch.float32
    assert_close(loss, oracles.partial_loss(*loss_arrays(inputs), "sum"), rtol=1e-5)


def test_partial_loss_of_large_half_precision_values_does_not_overflow():
    student = torch.full((2, 1, 8, 8), 500.0, dtype=torch.float16, requires_grad=True)
    loss = partial_loss(student, torch.zeros_like(student), torch.zeros(1))
    assert loss.item() == 2 * 64 * 250000.0


def drawn_loss_inputs(data):
    """Student and target (N, C, L) and margin (C,), with ties and zeros."""
    n, c, length = (data.draw(st.integers(1, 3)) for _ in range(3))
    student = data.draw(arrays(np.float64, (n, c, length), elements=coarse_values))
    target = data.draw(arrays(np.float64, (n, c, length), elements=coarse_values))
    margin = data.draw(arrays(np.float64, (c,), elements=coarse_values))
    return student, target, margin


@properties
@given(st.data())
def test_partial_loss_property_loops_with_ties_and_zeros(data):
    student, target, margin = drawn_loss_inputs(data)
    for reduction in ("sum", "mean"):
        loss = partial_loss(*(torch.from_numpy(x) for x in (student, target, margin)), reduction)
        assert_close(loss, oracles.partial_loss(student, target, margin, reduction))


def away_from_kinks(student: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Moves the student elements that lie close to their target 0.01 above it."""
    effective = torch.maximum(target, margin.reshape(1, -1, *[1] * (target.dim() - 2)))
    return torch.where((student - effective).abs() < 0.01, effective + 0.01, student)


@pytest.mark.parametrize("spatial", [(), (2, 3)], ids=["NC", "NCHW"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_partial_loss_gradient_passes_gradcheck(spatial, reduction):
    student, target, margin = loss_inputs(*spatial, images=4)
    student = away_from_kinks(student, target, margin).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: partial_loss(s, target, margin, reduction), (student,))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_partial_loss_gradient_equals_finite_differences_of_the_loops(reduction):
    student, target, margin = loss_inputs(2, 3)
    student = away_from_kinks(student, target, margin).requires_grad_()
    partial_loss(student, target, margin, reduction).backward()
    inputs = loss_arrays((student, target, margin))
    expected = oracles.partial_loss_gradient(*inputs, reduction, step=1e-5)
    assert_close(student.grad, expected, rtol=1e-7, atol=1e-8)


@properties
@given(st.data())
def test_partial_loss_property_masked_loops(data):
    student, target, margin = drawn_loss_inputs(data)
    mask = data.draw(arrays(np.bool_, (len(student), student.shape[2])))
    given_mask = torch.from_numpy(mask)
    inputs = [spoiled(torch.from_numpy(values), given_mask) for values in (student, target)]
    for reduction in ("sum", "mean"):
        loss = partial_loss(*inputs, torch.from_numpy(margin), reduction, given_mask)
        assert_close(loss, oracles.partial_loss(student, target, margin, reduction, mask))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_partial_loss_gradient_of_the_positions_that_count_alone(reduction, garbage):
    student, target, margin = loss_inputs(2, 3, images=3)
    student, mask = away_from_kinks(student, target, margin), masks(3, 2, 3, seed=4)
    inputs = loss_arrays((student, target, margin))
    expected = oracles.partial_loss_gradient(*inputs, reduction, step=1e-5, mask=mask.numpy())
    values = spoiled(student, mask, garbage).requires_grad_()
    partial_loss(values, spoiled(target, mask, garbage), margin, reduction, mask).backward()
    assert_close(values.grad, expected, rtol=1e-7, atol=1e-8)
    assert not values.grad.masked_select(~mask[:, None]).any()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_partial_loss_without_a_position_that_counts_is_a_zero_in_the_graph(reduction):
    student = torch.full((2, 3, 4, 4), float("nan"), requires_grad=True)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    loss = partial_loss(student, torch.ones(2, 3, 4, 4), torch.zeros(3), reduction, mask)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_partial_loss_does_not_hide_what_is_not_finite_where_it_counts(reduction):
    student, target, margin = loss_inputs(2, 3)
    mask = masks(2, 2, 3)
    place = tuple(mask.nonzero()[0].tolist())
    student[place[0], 1, place[1], place[2]] = float("nan")
    assert partial_loss(student, target, margin, reduction, mask).isnan()


def test_partial_loss_gradient_reaches_the_student_only():
    student, target, margin = (x.requires_grad_() for x in loss_inputs(4, 4))
    partial_loss(student, target, margin).backward()
    assert student.grad.abs().sum() > 0
    assert target.grad is None
    assert margin.grad is None


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_partial_loss_with_nothing_to_compare_is_a_zero_in_the_graph(reduction, dtype):
    student = torch.full((2, 3, 4, 4), -5.0, dtype=dtype, requires_grad=True)
    target = torch.full((2, 3, 4, 4), -2.0, dtype=dtype)
    loss = partial_loss(student, target, torch.full((3,), -1.0, dtype=dtype), reduction)
    assert loss.shape == ()
    assert loss.item() == 0.0
    assert loss.requires_grad
    loss.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_partial_loss_of_huge_values_that_are_left_alone_stays_zero():
    student = torch.full((1, 2, 3), -1e30, requires_grad=True)
    loss = partial_loss(student, torch.full((1, 2, 3), -2.0), torch.full((2,), -1.0))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_partial_loss_mean_divides_by_all_elements():
    student, target, margin = torch.zeros(1, 1, 4), torch.tensor([[[2.0, 0.0, 0.0, 0.0]]]), torch.zeros(1)
    assert partial_loss(student, target, margin, "mean").item() == 1.0
    assert partial_loss(student, target, margin, "sum").item() == 4.0


@pytest.mark.parametrize(
    ("student_shape", "target_shape", "margin_shape"),
    [
        pytest.param((2, 3, 4, 4), (2, 3, 4, 5), (3,), id="spatial"),
        pytest.param((2, 3, 4, 4), (2, 3, 1, 1), (3,), id="spatial that would broadcast"),
        pytest.param((2, 3, 4, 4), (1, 3, 4, 4), (3,), id="batch that would broadcast"),
        pytest.param((2, 3, 4, 4), (2, 1, 4, 4), (3,), id="channels that would broadcast"),
        pytest.param((2, 3, 4, 4), (2, 3, 16), (3,), id="number of axes"),
        pytest.param((2, 3, 4, 4), (2, 3, 4, 4), (4,), id="margin of the width of the map"),
        pytest.param((2, 3, 4, 4), (2, 3, 4, 4), (1,), id="margin that would broadcast"),
        pytest.param((2, 3, 4, 4), (2, 3, 4, 4), (), id="scalar margin"),
    ],
)
def test_partial_loss_refuses_shapes_that_do_not_fit(student_shape, target_shape, margin_shape):
    with pytest.raises(ValueError):
        partial_loss(torch.zeros(student_shape), torch.zeros(target_shape), torch.zeros(margin_shape))


@pytest.mark.parametrize("reduction", ["none", "avg", ""])
def test_partial_loss_refuses_an_unknown_reduction(reduction):
    with pytest.raises(ValueError):
        partial_loss(*loss_inputs(2, 2), reduction)


# the weights of the total loss

MOBILENET_V1_POSITIONS = ((128, 56), (256, 28), (512, 14), (1024, 7))


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("batch_size", [1, 2])
def test_paper_weight_on_the_sum_is_5_0176_times_the_mean_for_mobilenet_v1(position, batch_size):
    channels, side = MOBILENET_V1_POSITIONS[position]
    student = randn(batch_size, channels, side, side, seed=position, dtype=torch.float32)
    target = randn(batch_size, channels, side, side, seed=position + 10, dtype=torch.float32)
    margin = -randn(channels, seed=position + 20, dtype=torch.float32).abs()
    weight = oracles.paper_loss_weights(4, batch_size)[position]
    total, mean = (partial_loss(student, target, margin, reduction).item() for reduction in ("sum", "mean"))
    assert weight * total == pytest.approx(5.0176 * mean, rel=1e-5)


def test_paper_total_equals_the_mean_form_with_weight_5_0176():
    paper = oracles.paper_loss_weights(4, batch_size=256)
    assert paper == pytest.approx([1 / (256 * 1e4 * k) for k in (8, 4, 2, 1)])
    means = [0.3, 0.1, 0.7, 0.2]
    sums = [m * 256 * c * side**2 for m, (c, side) in zip(means, MOBILENET_V1_POSITIONS, strict=True)]
    expected = oracles.total_loss(1.5, means, oracles.mean_loss_weights(4, 5.0176))
    assert oracles.total_loss(1.5, sums, paper) == pytest.approx(expected)


def plain_partial_loss(student: Tensor, target: Tensor, margin: Tensor, mask: Tensor | None = None) -> Tensor:
    """The loss in operations that PyTorch differentiates as often as one likes."""
    goal = torch.maximum(target, margin.reshape(-1, *[1] * (target.ndim - 2)))
    left_alone = (student <= goal) & (goal <= 0)
    if mask is not None:
        left_alone = left_alone | ~mask[:, None]
    return torch.where(left_alone, 0, student - goal).square().sum()


@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives_of_the_partial_loss(masked):
    torch.manual_seed(0)
    student = torch.randn(3, 4, 5, dtype=torch.float64)
    target, margin = torch.randn_like(student), -torch.rand(4, dtype=torch.float64)
    student[0, 0] = target[0, 0] = torch.tensor([1.0, 0.0, -0.0, -0.5, 0.25])  # at their goals
    mask = torch.rand(3, 5) > 0.3 if masked else None

    def of(loss):
        def through(values):
            return loss(values.sin() + values, target, margin, mask=mask) + values.pow(3).sum()

        return torch.autograd.functional.hessian(through, student)

    assert_allclose(of(partial_loss), of(plain_partial_loss), atol=1e-12)
    vector = torch.randn_like(student)
    products = [
        torch.autograd.functional.hvp(lambda x, f=loss: f(x, target, margin, mask=mask), student, vector)[1]
        for loss in (partial_loss, plain_partial_loss)
    ]
    assert_allclose(*products, atol=1e-12)


def test_second_derivatives_where_the_goal_is_reached_from_above():
    student = torch.tensor([[[0.5, -0.5]]], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(
        lambda values: partial_loss(values, student, torch.tensor([-1.0], dtype=torch.float64)), student
    )
    assert hessian.flatten().tolist() == [2, 0, 0, 0]


FEATURES, INDEX = torch.zeros(2, 6, 4), torch.tensor([[0, 1], [2, 3], [4, 5]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matching_cost(FEATURES.to(torch.complex64), FEATURES), "features must be real"),
        (lambda: matching_cost(FEATURES[..., :0], FEATURES[..., :0]), "at least one position"),
        (lambda: reduce_channels(FEATURES, INDEX + 4), "index holds 4 to 9, but there are 6 teacher channels"),
        (lambda: reduce_channels(FEATURES, INDEX - 2), "index holds -2 to 3"),
        (lambda: reduce_channels(FEATURES, INDEX.float()), "index must be int64"),
        (lambda: reduce_channels(FEATURES[0, 0], INDEX), "a batch and a channel axis"),
        (lambda: reduce_margin(torch.zeros(3), INDEX), "there are 3 teacher channels"),
        (lambda: reduce_margin(torch.zeros(6, 2), INDEX), r"margin must have shape \(Ct,\)"),
        (lambda: batchnorm_margin(torch.ones(3), torch.ones(1)), "scale and shift of one shape"),
        (lambda: empirical_margin(torch.ones(3)), "a batch and a channel axis"),
        (lambda: solve_assignment(torch.ones(3, 6), 2.0), "group_size=2.0 does not fit"),
        (lambda: solve_assignment(torch.ones(3, 6).to(torch.complex64)), "cost must be a real matrix"),
        (lambda: partial_loss(FEATURES.to(torch.complex64), FEATURES, torch.zeros(6)), "features must be real"),
        (lambda: kd_loss(torch.zeros(3), torch.zeros(3)), "logits must have shape"),
        (lambda: kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), float("inf")), "temperature=inf"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
