"""Targets by an orthogonal map: against an independent solution, and through the distiller's life.

Axes: N images, Cs student channels, Ct teacher channels, P positions.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchdistill import MatchingDistiller
from matchdistill.aligned import CovarianceSums
from matchdistill.functional import orthogonal_map, random_assignment
from networks import Plain, as_if_trained

pytestmark = pytest.mark.usefixtures("one_thread")


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def networks(teacher: int = 8, student: int = 4, seed: int = 0) -> tuple[Plain, Plain]:
    torch.manual_seed(seed)
    return as_if_trained(Plain(teacher)), as_if_trained(Plain(student))


def ready(teacher: int = 8, student: int = 4, count: int = 24, **options: Any) -> MatchingDistiller:
    distiller = MatchingDistiller(*networks(teacher, student), reduction="align", example=values(2, 3, 8, 8), **options)
    distiller.refresh([values(count, 3, 8, 8, seed=1)])
    return distiller


def features(network: Plain, x: Tensor) -> list[np.ndarray]:
    """(C, N * P) before each activation, computed without hooks."""
    found = []
    for stage in range(3):
        x = network.get_submodule(f"bn{stage}")(network.get_submodule(f"conv{stage}")(x))
        found.append(x.detach().double().transpose(0, 1).flatten(1).numpy())
        x = F.relu(x)
    return found


@pytest.mark.parametrize(("students", "teachers"), [(4, 4), (3, 9), (9, 3), (1, 5)])
def test_the_map_is_the_procrustes_solution(students: int, teachers: int) -> None:
    covariance = values(students, teachers, seed=3).double()
    found = orthogonal_map(covariance)
    # SciPy's polar decomposition takes another way.
    expected, _ = scipy.linalg.polar(covariance.numpy())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8)
    gram = found @ found.T if students <= teachers else found.T @ found
    np.testing.assert_allclose(gram.numpy(), np.eye(min(students, teachers)), atol=1e-12)


@pytest.mark.parametrize("least", [1e-1, 1e-5, 1e-7, 1e-12, 0.0])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50)])
def test_the_map_is_exact_whatever_the_least_singular_value_is(shape: tuple[int, int], least: float) -> None:
    left, _, right = torch.linalg.svd(values(*shape).double(), full_matrices=False)
    singular = torch.logspace(0, -1, len(right), dtype=torch.float64)
    singular[-1] = least
    covariance = (left * singular) @ right
    found = orthogonal_map(covariance)
    gram = found @ found.T if shape[0] <= shape[1] else found.T @ found
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-9)
    assert float((found * covariance).sum()) == pytest.approx(float(singular.sum()), rel=1e-8)
    if least >= 1e-5:
        torch.testing.assert_close(found, left @ right, rtol=0, atol=1e-5)


def test_no_other_orthogonal_map_is_nearer() -> None:
    covariance = values(4, 7, seed=3).double()
    best = float((orthogonal_map(covariance) * covariance).sum())
    for seed in range(50):
        other = np.linalg.qr(values(7, 4, seed=seed).double().numpy())[0].T
        assert float((torch.from_numpy(other) * covariance).sum()) < best
    index = random_assignment(covariance, 1)
    assert float(covariance.gather(1, index).sum()) < best


def test_what_the_covariance_leaves_open_is_the_same_every_time() -> None:
    covariance = values(5, 8, seed=3).double()
    covariance[[1, 3]] = 0  # dead channels
    found = orthogonal_map(covariance)
    np.testing.assert_allclose((found @ found.T).numpy(), np.eye(5), atol=1e-6)
    noise = 1e-15 * covariance.norm() * values(5, 8, seed=4).double()
    np.testing.assert_allclose(orthogonal_map(covariance + noise).numpy(), found.numpy(), atol=1e-3)
    torch.testing.assert_close(orthogonal_map(torch.zeros(2, 3)), torch.eye(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(0, 2), torch.full((2, 2), torch.nan)])
def test_covariances_that_are_none(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="covariance"):
        orthogonal_map(wrong)


@pytest.mark.parametrize("split", [(6,), (1, 2, 3), (4, 0, 2)])
@pytest.mark.parametrize("counted", [False, True])
def test_batches_add_up_to_the_covariances_of_all_values(split: tuple[int, ...], counted: bool) -> None:
    student, teacher = values(6, 3, 4, 5), 2 + values(6, 7, 4, 5, seed=1)
    mask = values(6, 4, 5, seed=2) > 0 if counted else torch.ones(6, 4, 5, dtype=torch.bool)
    own, others = (each.movedim(1, -1)[mask].double().numpy() for each in (student, teacher))
    for each in (student, teacher):
        each.masked_fill_(~mask[:, None], torch.nan)
    parts = [CovarianceSums(), CovarianceSums()]
    for number, batch in enumerate(zip(student.split(split), teacher.split(split), mask.split(split), strict=True)):
        parts[number % 2].update(*batch[:2], batch[2] if counted else None)
    sums = parts[0] + parts[1]
    assert sums.images == 6
    both = np.cov(own.T, others.T, bias=True)
    np.testing.assert_allclose(sums.covariance().numpy(), both[:3, 3:], atol=1e-5)
    rotation = orthogonal_map(sums.covariance())
    targets = others @ rotation.numpy().T
    mean, deviation = sums.of_targets(rotation)
    np.testing.assert_allclose(mean.numpy(), targets.mean(0), atol=1e-5)
    np.testing.assert_allclose(deviation.numpy(), targets.std(0), atol=1e-5)
    expected = np.corrcoef(own.T, targets.T)[:3, 3:]
    np.testing.assert_allclose(sums.correlation(rotation).numpy(), expected, atol=1e-5)
    for found, channels in zip(sums.deviations(), (own, others), strict=True):
        np.testing.assert_allclose(found.numpy(), channels.std(0), atol=1e-5)


def test_channels_that_do_not_vary_correlate_with_none() -> None:
    student, teacher = values(64, 3, 9, 9), values(64, 5, 9, 9, seed=1)
    student[:, 1], teacher[:, 2] = 7.3, -1e3  # whose squares 32 bits sum to more or less
    sums = CovarianceSums()
    for batch in zip(student.split(16), teacher.split(16), strict=True):
        sums.update(*batch)
    own, others = sums.deviations()
    assert (own > 0).tolist() == [True, False, True]
    assert (others > 0).tolist() == [True, True, False, True, True]
    correlation = sums.correlation(torch.eye(3, 5, dtype=torch.float64))
    assert not correlation[1].any()
    assert not correlation[:, 2].any()
    assert correlation[[0, 2]][:, :2].all()


def test_small_differences_from_a_large_mean_are_not_lost_in_rounding() -> None:
    student, teacher = 1 + 1e-3 * values(64, 3, 9, 9), -5 + 1e-2 * values(64, 5, 9, 9, seed=1)
    teacher[:, :3] += 20 * (student - 1)
    mask = values(64, 9, 9, seed=2) > 0
    for counted in (None, mask):
        sums = CovarianceSums()
        for start in range(0, 64, 16):
            part = slice(start, start + 16)
            sums.update(student[part], teacher[part], None if counted is None else counted[part])
        every = torch.ones_like(mask) if counted is None else counted
        own, others = (each.movedim(1, -1)[every].double().numpy() for each in (student, teacher))
        expected = np.cov(own.T, others.T, bias=True)[:3, 3:]
        scale = np.outer(own.std(0), others.std(0))
        np.testing.assert_allclose(sums.covariance().numpy() / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("widths", [(8, 4), (6, 4), (4, 4), (3, 4)])
def test_the_distiller_against_numpy(widths: tuple[int, int]) -> None:
    batch, seen = values(4, 3, 8, 8, seed=5).double(), values(96, 3, 8, 8, seed=1).double()
    # In double precision: where the covariance has small singular values, the map depends on rounding.
    distiller = MatchingDistiller(*(each.double() for each in networks(*widths)), reduction="align", example=batch)
    distiller.refresh([seen])
    teacher, student = distiller.teacher.eval(), distiller.student.eval()
    own, others = features(student, seen), features(teacher, seen)
    losses = []
    now, goals = features(student.train(), batch), features(teacher, batch)
    for number, position in enumerate(distiller.positions):
        covariance = np.cov(own[number], others[number], bias=True)[: len(own[number]), len(own[number]) :]
        rotation, _ = scipy.linalg.polar(covariance)
        np.testing.assert_allclose(position.rotation.numpy(), rotation, atol=1e-4)
        targets = rotation @ others[number]
        normal = scipy.stats.norm(targets.mean(1), targets.std(1))
        share = normal.cdf(0)
        margins = targets.mean(1) - targets.std(1) ** 2 * normal.pdf(0) / np.maximum(share, 1e-3)
        margins = np.where(share > 1e-3, margins, -3 * targets.std(1))
        np.testing.assert_allclose(position.margin.numpy(), margins, rtol=1e-3, atol=1e-4)
        values_of = (now[number] - now[number].mean(1, keepdims=True)) / np.sqrt(
            now[number].var(1, keepdims=True) + 1e-5
        )
        goal = np.maximum(rotation @ goals[number], margins[:, None])
        losses.append((((values_of - goal) ** 2) * ((values_of > goal) | (goal > 0))).mean())
    distiller.train()
    loss = distiller(batch)[1]
    np.testing.assert_allclose(loss.item(), 5 * sum(losses), rtol=1e-4)
    loss.backward()
    assert all(weight.grad is None for weight in distiller.teacher.parameters())
    assert all(weight.grad is not None for weight in distiller.student.conv0.parameters())


def test_channels_that_are_rotated_are_found_again() -> None:
    """Of a student whose features are an orthogonal map of the teacher's, the loss is what the norm leaves."""
    teacher = networks(6, 6)[0].double()
    student = copy.deepcopy(teacher)
    turn, _ = np.linalg.qr(values(24, 24, seed=7).double().numpy())
    student.bn2 = nn.Sequential(student.bn2, nn.Conv2d(24, 24, 1, bias=False).double())
    student.bn2[1].weight.data = torch.from_numpy(turn)[:, :, None, None]
    options = {"taps": [("bn2", "bn2")], "example": values(2, 3, 8, 8).double()}
    distiller = MatchingDistiller(teacher, student, reduction="align", **options)
    (matching,) = distiller.refresh([values(64, 3, 8, 8, seed=1).double()])
    np.testing.assert_allclose(distiller.positions[0].rotation.numpy(), turn, atol=1e-4)
    assert matching.mean_cost == pytest.approx(0, abs=1e-5)
    (matched,) = MatchingDistiller(teacher, student, **options).refresh([values(64, 3, 8, 8, seed=1).double()])
    assert matched.mean_cost > 0.1


def test_a_state_goes_on() -> None:
    first, second = ready(), MatchingDistiller(*networks(seed=1), reduction="align", example=values(2, 3, 8, 8))
    assert not second.has_matching
    with pytest.raises(RuntimeError, match="no matching"):
        second(values(4, 3, 8, 8))
    second.load_state_dict(first.state_dict())
    assert second.has_matching
    assert torch.equal(second.positions[1].rotation, first.positions[1].rotation)
    other = MatchingDistiller(*networks(8, 4), reduction="sm", example=values(2, 3, 8, 8))
    with pytest.raises((ValueError, RuntimeError), match="another reduction"):
        other.load_state_dict(first.state_dict())


def test_a_state_from_before_the_first_refresh_holds_no_map() -> None:
    first, second = (MatchingDistiller(*networks(), reduction="align", example=values(2, 3, 8, 8)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert not second.has_matching
    with pytest.raises(RuntimeError, match="no matching"):
        second(values(4, 3, 8, 8))


def test_refreshes_with_a_tolerance_or_of_the_steps_alone() -> None:
    distiller = ready(online=1)
    whole = [position.rotation.clone() for position in distiller.positions]
    batches = [values(60, 3, 8, 8, seed=seed) for seed in range(16)]
    found = distiller.refresh(batches, tolerance=0.5)
    assert found[0].images == 240
    assert found[0].churn is not None
    assert 0 < found[0].churn < 0.5
    distiller.student.eval()  # so that the features are the ones of a refresh
    distiller.forget()
    for batch in batches[:2]:
        distiller(batch)
    distiller.refresh()
    online = [position.rotation.clone() for position in distiller.positions]
    distiller.refresh(batches[:2])
    for position, before, seen in zip(distiller.positions, online, whole, strict=True):
        torch.testing.assert_close(position.rotation, before)
        assert not torch.allclose(position.rotation, seen)


@pytest.mark.parametrize("options", [{"matcher": random_assignment}, {"hysteresis": 0.1}])
def test_what_assigns_channels_has_no_place(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="assigns no channels"):
        MatchingDistiller(*networks(), reduction="align", **options)


def test_features_that_are_not_finite_are_named() -> None:
    distiller = ready()
    distiller.student.conv1.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"position relu1.* not finite"):
        distiller.refresh([values(4, 3, 8, 8)])


def test_half_precision_and_the_order_of_axes_in_memory() -> None:
    distiller = ready()
    batch = values(4, 3, 8, 8, seed=5)
    plain = distiller(batch)[1].item()
    with torch.autocast("cpu", torch.bfloat16):
        assert distiller(batch)[1].item() == pytest.approx(plain, rel=0.05)
    for network in (distiller.teacher, distiller.student):
        network.to(memory_format=torch.channels_last)
    assert distiller(batch.to(memory_format=torch.channels_last))[1].item() == pytest.approx(plain, rel=1e-4)


def test_it_can_be_pickled(tmp_path: Path) -> None:
    distiller = ready()
    torch.save(distiller, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    batch = values(4, 3, 8, 8, seed=5)
    assert torch.equal(loaded(batch)[1], distiller(batch)[1])
