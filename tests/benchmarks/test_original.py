"""What the original is rebuilt as gives the losses, costs and assignments of the library."""

import pytest
import torch

from benchmarks.assign import COSTS
from benchmarks.original import Original, assignment
from benchmarks.pairs import chosen, random_batch
from matchdistill.functional import solve_assignment


@pytest.mark.parametrize("student", ["mobilenet_v2", "resnet18"])
def test_the_same_loss_gradients_and_costs(student):
    (pair,) = chosen(student).values()
    images, _ = random_batch(size=64, batch=3)
    original, distiller = Original(pair, images), pair.distiller(images)
    batches = images.split(2)
    costs = original.costs(batches)
    for cost, matching in zip(costs, distiller.refresh(batches), strict=True):
        torch.testing.assert_close(cost, matching.cost, atol=1e-4, rtol=0, check_dtype=False)
    original.match([position.index for position in distiller.positions])
    found = []
    for made in (original, distiller):
        output, loss = made(images)
        (output.square().mean() + loss).backward()
        found.append((loss.detach(), torch.cat([weight.grad.flatten() for weight in made.student.parameters()])))
    (loss, gradient), (expected, other) = found
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected > 0
    assert (gradient - other).norm() < 1e-3 * other.norm()
    assert all(weight.grad is None for weight in original.teacher.parameters())
    assert {id(weight) for weight in original.parameters()}.isdisjoint(map(id, original.teacher.parameters()))


def test_a_run_from_the_input_for_each_position():
    (pair,) = chosen("mobilenet_v2").values()
    images, _ = random_batch(size=64, batch=2)
    original = Original(pair, images)
    runs = {"features.0": 0, "features.4": 0, "features.7": 0, "features.11": 0, "features.17": 0, "classifier": 0}

    def count(name):
        def counting(*_):
            runs[name] += 1

        return counting

    for name in runs:
        original.student.get_submodule(name).register_forward_pre_hook(count(name))
    original.features(images)
    assert list(runs.values()) == [4, 4, 3, 2, 1, 1]


@pytest.mark.parametrize("cost", COSTS)
def test_the_same_objective(cost):
    pytest.importorskip("ortools")
    costs = COSTS[cost](12, 36)
    own, theirs = solve_assignment(costs), assignment(costs)
    assert sorted(theirs.flatten().tolist()) == list(range(36))
    totals = [costs.gather(1, index).sum().item() for index in (own, theirs)]
    assert totals[0] == pytest.approx(totals[1], abs=36 * 1e-4)
    assert totals[0] <= totals[1] + 1e-9


def test_channels_that_do_not_divide_are_shaved():
    pytest.importorskip("ortools")
    assert sorted(assignment(torch.rand(3, 8)).flatten().tolist()) == list(range(6))
