"""The functions of momentum contrast beside loops that are written from the papers, and in two real processes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distributed
from matchdistill.tasks.moco import contrast


def unit(count, dimensions, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dimensions, generator=generator, dtype=torch.float64), dim=1)


def slow_info_nce(queries, keys, queue, temperature):
    """Equation 1 of He et al., of each image the sum over its positive key and the keys of the queue."""
    losses = []
    for query, positive in zip(queries.numpy(), keys.numpy(), strict=True):
        alike = [float(query @ key) / temperature for key in [positive, *queue.numpy()]]
        largest = max(alike)
        losses.append(-(alike[0] - largest) + math.log(sum(math.exp(each - largest) for each in alike)))
    return float(np.mean(losses))


class SlowQueue:
    """Algorithm 1 of He et al.: the newest keys come in, the oldest go."""

    def __init__(self, queue):
        self.keys = list(queue.numpy())  # the oldest one first

    def take(self, keys):
        self.keys += list(keys.numpy())
        del self.keys[: len(keys)]


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_the_loss_is_that_of_the_paper(temperature):
    queries, keys, queue = unit(6, 5, 0), unit(6, 5, 1), unit(9, 5, 2)
    loss = contrast.info_nce(queries, keys, queue, temperature)
    assert loss.item() == pytest.approx(slow_info_nce(queries, keys, queue, temperature), rel=1e-12)


def test_the_positive_is_in_column_0():
    queries, queue = unit(4, 5, 0), unit(7, 5, 2)
    logits = contrast.contrastive_logits(queries, queries, queue, 0.2)
    assert logits.shape == (4, 8)
    torch.testing.assert_close(logits[:, 0], torch.full((4,), 1 / 0.2, dtype=torch.float64))
    torch.testing.assert_close(logits[:, 1:], queries @ queue.T / 0.2)


def test_gradients_reach_the_queries_alone():
    queries, keys, queue = (unit(4, 5, seed).requires_grad_() for seed in range(3))
    contrast.info_nce(queries, keys, queue, 0.2).backward()
    assert (keys.grad, queue.grad) == (None, None)

    def loss(values):
        return contrast.info_nce(values, keys, queue, 0.2)

    assert torch.autograd.gradcheck(loss, (queries.detach().requires_grad_(),))
    assert queries.grad.abs().sum() > 0


def test_a_new_queue_has_random_keys_of_length_1():
    queue = contrast.new_queue(50, 7, torch.Generator().manual_seed(0))
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(50))
    assert len(queue.unique(dim=0)) == 50
    assert queue.mean(0).norm() < 0.3  # to all sides


def test_the_queue_is_filled_in_order():
    queue = unit(12, 3, 0)
    slow, place = SlowQueue(queue), torch.tensor(0)
    for step in range(7):
        keys = unit(4, 3, 10 + step)
        contrast.enqueue(queue, place, keys)
        slow.take(keys)
        assert place == 4 * (step + 1) % 12
        torch.testing.assert_close(queue.roll(-int(place), 0), torch.from_numpy(np.stack(slow.keys)), rtol=0, atol=0)


def test_keys_follow_the_queries():
    torch.manual_seed(0)
    leader, follower = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = [
        [0.9 * old + 0.1 * new for old, new in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)]
        for one, other in zip(follower.parameters(), leader.parameters(), strict=True)
    ]
    before = [value.clone() for value in leader.parameters()]
    contrast.follow(follower.parameters(), leader.parameters(), 0.9)
    for value, own in zip(follower.parameters(), expected, strict=True):
        torch.testing.assert_close(value.flatten(), torch.tensor(own))
    assert all(map(torch.equal, leader.parameters(), before))


def test_one_process_puts_back_too():
    values = unit(8, 3, 0)
    order = contrast.drawn_order(8, 0, values.device)
    dealt = contrast.shuffled(values, order)
    assert not torch.equal(dealt, values)
    assert torch.equal(contrast.put_back(dealt, order), values)
    assert torch.equal(order, contrast.drawn_order(8, 0, values.device))
    assert not torch.equal(order, contrast.drawn_order(8, 1, values.device))


def both(rank):
    """In one process of two: the batch that it shuffles, what it gets, and what comes back."""
    values = torch.arange(5)[:, None, None] + 100 * rank + torch.zeros(5, 2, 3)
    order = contrast.drawn_order(10, 40 + rank, values.device)  # as if each would draw another one
    dealt = contrast.shuffled(values, order)
    norm = nn.BatchNorm1d(2, affine=False)
    back = contrast.put_back(dealt, order)
    return {
        "values": values,
        "order": order,
        "dealt": dealt,
        "normalised": contrast.put_back(norm(dealt), order),
        "back": back,
        "own": contrast.share_of(back),
    }


def test_two_processes_shuffle_and_put_back_exactly(tmp_path):
    found = distributed.run(both, tmp_path)
    everything = torch.cat([each["values"] for each in found])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(40))
    for rank, own in enumerate(found):
        assert torch.equal(own["order"], order)  # that of rank 0
        assert torch.equal(own["dealt"], torch.stack([everything[number] for number in order[5 * rank : 5 * rank + 5]]))
        assert torch.equal(own["back"], everything)
        assert torch.equal(own["own"], own["values"])
    origins = [{int(value) // 100 for value in own["dealt"][:, 0, 0]} for own in found]
    assert origins == [{0, 1}, {0, 1}]  # each has images of both
    # So batch norm sees other images together than those of a process: that is what the shuffling is for.
    together = [nn.BatchNorm1d(2, affine=False)(own["values"]) for own in found]
    assert not torch.allclose(found[0]["normalised"], torch.cat(together), atol=1e-3)
    slow = torch.empty(10, 2, 3)
    for rank in range(2):
        places = order[5 * rank : 5 * rank + 5].tolist()
        part = torch.stack([everything[place] for place in places])
        mean, deviation = part.mean((0, 2)), part.var((0, 2), unbiased=False).add(1e-5).sqrt()
        for place, image in zip(places, part, strict=True):
            slow[place] = (image - mean[:, None]) / deviation[:, None]
    torch.testing.assert_close(found[0]["normalised"], slow)
