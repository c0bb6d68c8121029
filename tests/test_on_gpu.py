"""The library on a GPU against the same on the CPU; each test runs on the CPU, too, so that it is itself tested."""

import warnings

import pytest
import torch

from matchdistill import MatchingDistiller
from matchdistill.functional import matching_cost, partial_loss, reduce_channels, solve_assignment
from networks import PLAIN_TAPS, Plain

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])


@pytest.fixture(autouse=True)
def full_precision():
    """Without TF32, so that a GPU computes what the CPU does."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def distiller_on(device, **options):
    torch.manual_seed(0)
    return MatchingDistiller(Plain(8), Plain(4), PLAIN_TAPS, loss_weight=1.0, **options).to(device)


def images(device, seed=0):
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)


def trained(device, autocast=False):
    """The matching, and the losses and the student after three steps."""
    distiller = distiller_on(device)
    found = distiller.refresh([images(device), images(device, 1)])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    losses = []
    for seed in range(3):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output, loss = distiller(images(device, seed))
        (loss + output.float().square().mean()).backward()
        optimizer.step()
        losses.append(loss.item())
    return (
        [each.index.cpu() for each in found],
        losses,
        [each.detach().cpu() for each in distiller.student.parameters()],
    )


@on_both
def test_matching_losses_and_weights_are_those_of_the_cpu(device):
    index, losses, weights = trained(device)
    for found, expected in zip(index, trained("cpu")[0], strict=True):
        assert torch.equal(found, expected)
    assert losses == pytest.approx(trained("cpu")[1], rel=1e-4)
    for found, expected in zip(weights, trained("cpu")[2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@on_both
def test_bfloat16_is_near(device):
    assert trained(device, autocast=True)[1] == pytest.approx(trained("cpu")[1], rel=0.1)


@on_both
@pytest.mark.parametrize("reduction", ["amp", "max", "mean", "sm"])
def test_the_functions_are_those_of_the_cpu(device, reduction):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, channels, 4, 4, generator=generator) for channels in (6, 12))
    margin = -torch.rand(6, generator=generator)

    def results(device):
        own = student.to(device, torch.float64).requires_grad_()
        cost = matching_cost(own.detach(), teacher.to(device, torch.float64))
        index = solve_assignment(cost, 1 if reduction == "sm" else 2)
        target = reduce_channels(teacher.to(device, torch.float64), index, reduction)
        loss = partial_loss(own, target, margin.to(device, torch.float64))
        loss.backward()
        return [each.cpu() for each in (cost, index, target, loss.detach(), own.grad)]

    for found, expected in zip(results(device), results("cpu"), strict=True):
        torch.testing.assert_close(found, expected)


@on_both
def test_a_step_does_not_wait_for_the_device(device):
    distiller = distiller_on(device)
    batch = images(device)
    distiller.refresh([batch])
    distiller(batch)[1].backward()  # what is looked at once is looked at here
    if device == "cuda":
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
    try:
        output, loss = distiller(batch)
        (loss + output.mean()).backward()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert loss.device.type == device
    assert loss.item() > 0


@on_both
def test_a_prepared_teacher_in_bfloat16_moves_with_the_distiller(device):
    from functools import partial

    from matchdistill.prepare import prepared

    distiller = distiller_on("cpu", prepare=partial(prepared, dtype=torch.bfloat16)).to(device)
    distiller.refresh([images(device)])
    plain = distiller_on(device)
    plain.load_state_dict(distiller.state_dict())
    assert distiller(images(device))[1].item() == pytest.approx(plain(images(device))[1].item(), rel=0.1)
