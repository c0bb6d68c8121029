"""The transportation problem against SciPy's dense solver on equal rows, and its prices against the definition."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from matchdistill import transport
from matchdistill.transport import groups_of_least_cost


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def uniform(students, teachers, seed=0):
    return 4 * torch.rand(students, teachers, generator=seeded(seed), dtype=torch.float64)


def cosines(students, teachers):
    """Costs of channels that have a few causes in common, as a network's have."""
    causes = torch.randn(12, 64, generator=seeded(0), dtype=torch.float64)
    unit = [
        torch.nn.functional.normalize(
            torch.randn(channels, 12, generator=seeded(seed), dtype=torch.float64) @ causes
            + 0.3 * torch.randn(channels, 64, generator=seeded(seed + 2), dtype=torch.float64)
        )
        for channels, seed in ((students, 1), (teachers, 2))
    ]
    return 2 - 2 * unit[0] @ unit[1].T


def hubs(students, teachers):
    """All rows want the same columns, so that the nearest entries have no solution."""
    wanted = torch.arange(teachers, dtype=torch.float64).square() / teachers
    return wanted + 0.01 * uniform(students, teachers)


def equal(students, teachers):
    return torch.full((students, teachers), 2.0, dtype=torch.float64)


def whole(students, teachers):
    """Many optima."""
    return uniform(students, teachers).round()


def separable(students, teachers):
    """Every choice costs the same."""
    return uniform(students, 1, 1) + uniform(1, teachers, 2)


def with_dead_channels(students, teachers):
    cost = cosines(students, teachers)
    cost[::3], cost[:, ::4] = 2.0, 2.0
    return cost


COSTS = [uniform, cosines, hubs, equal, whole, separable, with_dead_channels]


@pytest.mark.parametrize("make", COSTS)
@pytest.mark.parametrize(
    ("students", "teachers", "group"), [(150, 600, 4), (200, 400, 2), (180, 500, 2), (2, 40_000, 9)]
)
def test_groups_cost_as_little_as_the_stacked_problem(make, students, teachers, group, monkeypatch):
    cost = make(students, teachers)
    monkeypatch.setattr(transport, "_dense", None)  # the sparse solver comes to its end
    index = groups_of_least_cost(cost, group)
    assert index.shape == (students, group)
    assert len(index.unique()) == students * group
    stacked = cost.repeat(group, 1).numpy()
    best = stacked[linear_sum_assignment(stacked)].sum()
    assert cost.gather(1, index).sum().item() == pytest.approx(best, rel=1e-10)


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e12, 1e300])
def test_no_scale_of_the_costs_matters(scale):
    cost = uniform(150, 600)
    assert torch.equal(
        groups_of_least_cost(cost * scale, 4).sort(1).values, groups_of_least_cost(cost, 4).sort(1).values
    )


def test_costs_too_far_apart_for_their_difference_to_be_a_number():
    cost = (uniform(150, 600) - 2).sign() * 1e308
    index = groups_of_least_cost(cost, 4)
    assert len(index.unique()) == 600


def test_an_offset_of_the_costs_does_not_matter():
    cost = uniform(150, 600)
    assert torch.equal(groups_of_least_cost(cost - 3, 4).sort(1).values, groups_of_least_cost(cost, 4).sort(1).values)


def test_the_cost_is_left_as_it_was():
    cost = uniform(150, 600)
    before = cost.clone()
    groups_of_least_cost(cost, 4)
    assert torch.equal(cost, before)


def test_prices_prove_an_optimum_and_refuse_another_choice():
    cost = uniform(6, 12).mul(1000).round()
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(6), torch.arange(12), indexing="ij"))
    best = torch.from_numpy(linear_sum_assignment(cost.repeat(2, 1).numpy())[1]).reshape(2, 6).T
    free = torch.zeros(12, dtype=torch.float64)
    found = transport._prices(cost.flatten(), row, column, cost.gather(1, best), best, free)
    assert found is not None
    slack = cost - found[0][:, None] - found[1]
    assert slack.min() == 0
    assert (slack.gather(1, best) == 0).all()
    other = best.roll(1, 0)
    assert transport._prices(cost.flatten(), row, column, cost.gather(1, other), other, free) is None


@pytest.mark.parametrize(("name", "value"), [("ROUNDS", 0), ("_prices", lambda *given: None)])
def test_the_dense_solver_takes_over_where_the_sparse_one_comes_to_no_end(name, value, monkeypatch):
    cost = cosines(150, 600)
    expected = groups_of_least_cost(cost, 4).sort(1).values
    monkeypatch.setattr(transport, name, value)
    assert torch.equal(groups_of_least_cost(cost, 4).sort(1).values, expected)
