"""When the matching is refreshed, from which images, and on how many processes.

Axes: N images.
"""

import copy
import gc
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, TensorDataset

import distributed
import oracles
from distributed import BATCH, IMAGES, distiller, images, plain_loader, refreshed
from matchdistill import MatchingDistiller
from matchdistill.distributed import is_sharded, rank_and_world
from matchdistill.functional import solve_assignment
from matchdistill.refresh import check_refreshes, due, images_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("every", [0, 3, [0, 2], ()])
def test_numbers_of_refreshes(every: Any) -> None:
    check_refreshes(every, 1)


@pytest.mark.parametrize(
    ("every", "most", "told"),
    [
        (-1, 5, "refresh_every is -1"),
        ("x", 5, "refresh_every is 'x'"),
        (True, 5, "refresh_every is True"),
        ([0, 1.5], 5, r"refresh_every is \[0, 1.5\]"),
        (1, 0, "max_images is 0"),
        (1, "many", "max_images is 'many'"),
    ],
)
def test_numbers_that_no_refresh_has(every: Any, most: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_refreshes(every, most)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, range(7)),
        (2, [0, 2, 4, 6]),
        (3, [0, 3, 6]),
        (9, [0]),
        (0, [0]),
        (-1, [0]),
        ([], [0]),
        ([1, 5, 9], [0, 1, 5]),
    ],
)
def test_due_before_training_and_then_every_so_many_epochs(every: int | list[int], expected: Any) -> None:
    assert [epoch for epoch in range(7) if due(epoch, every)] == list(expected)


@pytest.mark.parametrize(
    "batch",
    [images(2), [images(2), torch.zeros(2)], {"name": ["a", "b"], "image": images(2)}, ("id", [(images(2), 3)])],
)
def test_first_tensor_of_a_batch_holds_the_images(batch: Any) -> None:
    assert torch.equal(images_of(batch), images(2))


@pytest.mark.parametrize("batch", ["text", [], {"a": 1}, 3])
def test_batch_without_a_tensor(batch: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"found no images in a batch of type {type(batch).__name__}: .* give forward="
    ):
        images_of(batch)


def test_loaders_that_deal_the_images_out() -> None:
    data = list(range(8))
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    own = SequentialSampler(data)
    assert not is_sharded(DataLoader(data))
    assert not is_sharded([images()])
    assert not is_sharded(DataLoader(data, sampler=own))
    assert is_sharded(DataLoader(data, sampler=sampler))
    assert is_sharded(DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False)))
    own.sharded = True
    assert is_sharded(DataLoader(data, sampler=own))


def test_one_process_outside_of_a_group() -> None:
    assert rank_and_world() == (0, 1)


@pytest.mark.parametrize(("limit", "run"), [(1, 1), (4, 4), (6, 6), (23, 23), (24, 24), (20_000, 24)])
def test_most_images_exactly(limit: int, run: int) -> None:
    found = refreshed(distiller(), plain_loader(), max_images=limit)
    assert found["run"] == [run, run]
    assert found["total"] == [run] * 3


def test_the_images_of_the_limit_are_the_first_ones() -> None:
    found, expected = refreshed(distiller(), plain_loader(), max_images=6), refreshed(distiller(), [images()[:6]])
    assert_same(found, expected)


def test_no_batch_is_loaded_beyond_the_limit() -> None:
    loaded = []

    def batches() -> Iterator[Tensor]:
        for number in range(5):
            loaded.append(number)
            yield images()[:BATCH]

    distiller().refresh(batches(), max_images=8)
    assert loaded == [0, 1]


def test_parts_of_larger_models_count_the_images_that_they_see() -> None:
    made = distiller()
    found = refreshed(made, plain_loader(), max_images=6, forward=lambda batch: made.student(batch[0][:3]))
    assert found["run"] == [6, 6]
    assert found["total"] == [6, 6, 6]


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_without_images(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_images={limit}: expected at least 1"):
        distiller().refresh(plain_loader(), max_images=limit)


def test_loader_without_images() -> None:
    with pytest.raises(ValueError, match="no image was seen"):
        distiller().refresh([])


def test_batches_may_have_any_sizes() -> None:
    assert_same(refreshed(distiller(), images().split([1, 20, 3])), refreshed(distiller(), [images()]))


def test_memory_is_flat_over_many_batches() -> None:
    """1024 x 2048 channels."""
    alive = []

    def batches() -> Iterator[Tensor]:
        for _ in range(6):
            gc.collect()
            tensors = (value for value in gc.get_objects() if type(value) is Tensor)
            alive.append(sum(value.numel() * value.element_size() for value in tensors))
            yield images()[:BATCH].float()

    networks = (nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.ReLU()) for width in (2048, 1024))
    (matching,) = MatchingDistiller(*networks, [("1:input", "1:input")], example=images(1)).refresh(batches())
    assert matching.images == 6 * BATCH
    assert len(set(alive[2:])) == 1


def maps(network: nn.Module, x: Tensor) -> list[np.ndarray]:
    """What is before each activation of a plain network, without hooks."""
    found = []
    with torch.no_grad():
        for stage in range(3):
            x = network.get_submodule(f"bn{stage}")(network.get_submodule(f"conv{stage}")(x))
            found.append(x.numpy().copy())
            x = x.relu()
    return found


TURNED = images().roll(8, 0)  # of which halves of the first 8 agree less than those of the first 16


def images_by_hand(tolerance: float, first: int) -> int:
    """After how many images halves of the batches agree, by slow loops."""
    made = distiller().eval()
    student, teacher = (maps(network, TURNED) for network in (made.student, made.teacher))
    half_of = np.arange(IMAGES) // BATCH % 2
    for count in range(BATCH, IMAGES, BATCH):
        if count not in (first, 2 * first, 4 * first):
            continue
        regrets = []
        for own, others in zip(student, teacher, strict=True):
            seen = [(half_of == half) & (np.arange(IMAGES) < count) for half in (0, 1)]
            costs = [oracles.matching_cost(own[half], others[half]) for half in seen]
            indices = [oracles.balanced_assignment(cost, 2) for cost in costs]
            least = sum(oracles.assignment_cost(*pair) for pair in zip(costs, indices, strict=True))
            swapped = sum(oracles.assignment_cost(*pair) for pair in zip(costs, indices[::-1], strict=True))
            regrets.append((swapped - least) / least / 2)
        if max(regrets) <= tolerance:
            return count
    return IMAGES


@pytest.mark.parametrize("tolerance", [0.0, 0.005, 0.015, 0.05, 10.0])
def test_a_refresh_stops_where_two_halves_of_the_images_agree(tolerance: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("matchdistill.refresh.FIRST_CHECK", 8)
    count = images_by_hand(tolerance, 8)
    found = refreshed(distiller(), TURNED.split(BATCH), tolerance=tolerance)
    assert found["total"] == [count] * 3
    assert_same(found, refreshed(distiller(), [TURNED[:count]]))


def test_tolerances_of_the_test_above_differ_in_what_they_take() -> None:
    taken = [images_by_hand(tolerance, 8) for tolerance in (0.0, 0.005, 0.015, 0.05, 10.0)]
    assert taken == [IMAGES, IMAGES, 16, 8, 8]


def test_a_batch_that_passes_several_checks_is_looked_at_once(monkeypatch: Any) -> None:
    monkeypatch.setattr("matchdistill.refresh.FIRST_CHECK", 2)
    solved = []

    def matcher(cost: Tensor, group: int) -> Tensor:
        solved.append(1)
        return solve_assignment(cost, group)

    found = refreshed(distiller(matcher=matcher), images().split(8), tolerance=0.0)
    assert found["total"] == [IMAGES] * 3
    assert len(solved) == 3 + 2  # the first position alone is tried at 16 images; 8 are one half


@pytest.mark.parametrize("tolerance", [-0.1, float("nan")])
def test_tolerance_out_of_range(tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"tolerance=.*: expected a share of the objective"):
        distiller().refresh(plain_loader(), tolerance=tolerance)


def test_a_refresh_from_the_steps_themselves() -> None:
    """Costs of the features that the student had in training, of every second step, since the last refresh."""
    made = distiller(online=2).train()
    made.refresh(plain_loader())
    for first in (0, BATCH):  # the second time, what was added up before is gone
        batches = images()[first:].split(BATCH)[:5]
        own, others = [], []
        for number, batch in enumerate(batches):
            before = copy.deepcopy(made.student)
            made(batch)
            if number % 2 == 0:
                own.append(maps(before, batch))
                others.append(maps(made.teacher, batch))
        for position, matching in enumerate(made.refresh()):
            student, teacher = (np.concatenate([found[position] for found in values]) for values in (own, others))
            cost = oracles.matching_cost(student, teacher)
            torch.testing.assert_close(matching.cost, torch.from_numpy(cost).float(), rtol=1e-6, atol=1e-6)
            assert matching.images == 3 * BATCH
            assert matching.churn is not None
            index = torch.from_numpy(oracles.balanced_assignment(matching.cost.numpy(), 2))
            assert torch.equal(made.positions[position].index, index)


def test_steps_that_are_not_of_training_are_not_added_up() -> None:
    made = distiller(online=1)
    made.refresh(plain_loader())
    made.eval()(images())
    with pytest.raises(ValueError, match="no image was seen"):
        made.refresh()
    made.train()(images())
    made.forget()
    with pytest.raises(ValueError, match="no image was seen"):
        made.refresh()
    made(images()[:5])
    assert made.refresh()[0].images == 5
    made = distiller()
    made.refresh(plain_loader())
    made.train()(images())
    with pytest.raises(ValueError, match="no image was seen"):
        made.refresh()


def test_a_refresh_with_images_begins_anew() -> None:
    made = distiller(online=1).train()
    made.refresh(plain_loader())
    made(images()[:5])
    made.refresh(plain_loader())
    made(images()[:3])
    assert made.refresh()[0].images == 3


def test_adding_up_leaves_the_loss_as_it_is() -> None:
    losses = []
    for online in (0, 1):
        made = distiller(online=online)
        made.refresh(plain_loader())
        losses.append(made.train()(images())[1])
    assert torch.equal(*losses)


def test_steps_between_out_of_range() -> None:
    with pytest.raises(ValueError, match="online=-1: expected a number of steps, or 0"):
        distiller(online=-1)


def test_modules_keep_their_modes_and_statistics() -> None:
    made = distiller()
    made.train()
    made.student.bn1.eval()
    modes = {name: module.training for name, module in made.named_modules()}
    modules: list[nn.Module] = [made.student, made.teacher, *made.positions]
    buffers = [{name: value.clone() for name, value in module.named_buffers()} for module in modules]
    made.refresh(plain_loader())
    assert {name: module.training for name, module in made.named_modules()} == modes
    assert not any(module.training for module in made.teacher.modules())
    for module, before in zip(modules, buffers, strict=True):
        for name, value in module.named_buffers():
            if name not in ("index", "margin"):
                assert torch.equal(value, before[name]), name


def test_modes_are_kept_when_a_refresh_fails() -> None:
    made = distiller()
    made.train()
    with pytest.raises(ValueError, match="found no images"):
        made.refresh(["text"])
    assert all(module.training for module in made.modules())


def test_networks_run_in_evaluation_mode_without_a_graph() -> None:
    made, seen = distiller(), []
    for network in (made.student, made.teacher):
        network.bn2.register_forward_hook(
            lambda module, args, output: seen.append((module.training, output.requires_grad))
        )
    made.train().refresh([images()])
    assert seen == [(False, False)] * 2
    made.refresh([images().requires_grad_()])
    assert all(parameter.grad is None for parameter in made.parameters())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    return distributed.run(distributed.all_at_once, tmp_path_factory.mktemp("ranks"))


def test_two_processes_find_the_same_map(ranks: list[dict[str, Any]]) -> None:
    alone = distributed.aligned()
    assert alone
    for name, value in alone.items():
        assert torch.equal(ranks[0]["aligned"][name], ranks[1]["aligned"][name])
        torch.testing.assert_close(ranks[0]["aligned"][name], value, rtol=1e-6, atol=1e-9)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal indices, and costs and margins but for the order of sums."""
    assert found["total"] == expected["total"]
    for index, other in zip(found["index"], expected["index"], strict=True):
        assert torch.equal(index, other)
    for name in ("cost", "margin"):
        for value, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("loader", ["plain", "sharded", "again"])
def test_ranks_find_what_one_process_finds_with_half_of_the_images_each(ranks: Any, loader: str) -> None:
    expected = refreshed(distiller(), plain_loader())
    for found in ranks:
        assert_same(found[loader], expected)
        assert found[loader]["run"] == [IMAGES // 2, IMAGES // 2]
    assert all(torch.equal(*pair) for pair in zip(ranks[0][loader]["cost"], ranks[1][loader]["cost"], strict=True))


def test_ranks_share_the_limit(ranks: Any) -> None:
    assert [found["sharded, limited"]["run"] for found in ranks] == [[6, 6], [5, 5]]
    dealt = torch.cat([images()[0::2][:6], images()[1::2][:5]])
    for found in ranks:
        assert_same(found["sharded, limited"], refreshed(distiller(), [dealt]))
    # Batches of 4, of which the third is cut: ranks 0, 1, 0.
    assert [found["plain, limited"]["run"] for found in ranks] == [[6, 6], [4, 4]]
    for found in ranks:
        assert_same(found["plain, limited"], refreshed(distiller(), [images()[:10]]))


@pytest.mark.parametrize("kind", ["", ", shuffled", ", dispatched"])
def test_loaders_of_accelerate(ranks: Any, kind: str) -> None:
    for found in ranks:
        assert found[f"accelerate{kind}"]["run"] == [IMAGES // 2, IMAGES // 2]
        assert_same(found[f"accelerate{kind}"], refreshed(distiller(), plain_loader()))


def test_a_rank_without_images(ranks: Any) -> None:
    assert [found["one batch"]["run"] for found in ranks] == [[BATCH, BATCH], [0, 0]]
    for found in ranks:
        assert_same(found["one batch"], refreshed(distiller(), [images()[:BATCH]]))


def test_parts_of_larger_models_on_ranks(ranks: Any) -> None:
    for found in ranks:
        assert found["part"]["run"] == [IMAGES // 2, IMAGES // 2]
        assert_same(found["part"], refreshed(distiller(), plain_loader()))


def test_padding_is_left_out_on_ranks_as_in_one_process(ranks: Any) -> None:
    made, unmasked = distiller(), distiller()
    expected = refreshed(made, plain_loader(), forward=distributed.padding(made))
    other = refreshed(unmasked, plain_loader(), forward=lambda batch: distributed.padding(unmasked)(batch).int())
    for found in ranks:
        assert found["padded"]["run"] == [IMAGES // 2, IMAGES // 2]
        assert_same(found["padded"], expected)
    assert not any(torch.allclose(*pair) for pair in zip(expected["cost"], other["cost"], strict=True))


@pytest.mark.parametrize("drawn", ["index", "margin"])
def test_what_is_drawn_is_the_same_on_every_rank(ranks: Any, drawn: str) -> None:
    for first, second in zip(ranks[0]["random"][drawn], ranks[1]["random"][drawn], strict=True):
        assert torch.equal(first, second)
    alone = [refreshed(distributed.drawing(seed), plain_loader())[drawn] for seed in range(2)]
    assert not all(torch.equal(*pair) for pair in zip(*alone, strict=True))


@pytest.mark.parametrize("tolerance", distributed.TOLERANCES)
def test_ranks_stop_where_one_process_does(ranks: Any, tolerance: float, monkeypatch: Any) -> None:
    """Each rank's batches take turns, so that halves differ, but with the images of both agreed at the same moment."""
    for kind in ("", "sharded, "):
        found = [rank[f"{kind}tolerance {tolerance}"] for rank in ranks]
        assert found[0]["total"] == found[1]["total"]
        assert all(torch.equal(*pair) for pair in zip(found[0]["index"], found[1]["index"], strict=True))
        count = found[0]["total"][0]
        assert count in {0.0: [IMAGES], 0.02: [16, IMAGES], 10.0: [16]}[tolerance]
        run = images()[:count] if not kind else torch.cat([images()[0::2][: count // 2], images()[1::2][: count // 2]])
        assert_same(found[0], refreshed(distiller(), [run]))


def test_ranks_with_other_numbers_of_images_stop_together(ranks: Any) -> None:
    assert [found["short, with a tolerance"]["run"][0] for found in ranks] == [2 * BATCH, BATCH]
    for found in ranks:
        assert_same(found["short, with a tolerance"], refreshed(distiller(), plain_loader(3 * BATCH)))


def test_ranks_add_up_their_steps(ranks: Any) -> None:
    made = distiller(online=1)
    made.refresh(plain_loader())
    for number in (0, 1, 4, 5):  # batches of the first and of the third step
        made.train()(images()[BATCH * number :][:BATCH])
    for found, expected in zip(
        zip(*(rank["online"]["cost"] for rank in ranks), strict=True), made.refresh(), strict=True
    ):
        assert torch.equal(*found)
        torch.testing.assert_close(found[0], expected.cost)
    assert all(rank["online"]["total"] == [4 * BATCH] * 3 for rank in ranks)


def test_a_step_with_two_processes(ranks: Any) -> None:
    """Every rank's loss is of its own half, the gradients are the mean of both."""
    halves = images().chunk(2)
    gradients = []
    for rank, half in enumerate(halves):
        made = distiller()
        made.refresh(plain_loader())
        output, loss = made.train()(half)
        (loss + output.square().mean()).backward()
        torch.testing.assert_close(ranks[rank]["step"]["loss"], loss.detach())
        gradients.append([parameter.grad for parameter in made.parameters()])
    for rank in ranks:
        for found, *expected in zip(rank["step"]["gradients"], *gradients, strict=True):
            torch.testing.assert_close(found, sum(expected) / 2)


class Adapter(nn.Conv2d):
    """Merges an update in evaluation mode, and takes it out in training mode."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 1, bias=False)
        self.update, self.merged = nn.Parameter(torch.randn(width, width, 1, 1) / 4), False

    def train(self, mode: bool = True) -> nn.Module:
        if mode == self.merged:
            self.weight.data += self.update.detach() * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight if self.merged else self.weight + self.update, None)


def test_modes_after_a_refresh_are_those_before() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Adapter(4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    found = MatchingDistiller(teacher, student, [("2:input", "4:input")], example=images().float())
    student.train()
    student[3].eval()
    modes = [module.training for module in student.modules()]
    statistics = student[3].running_mean.clone()
    for _ in range(2):
        found.refresh([images().float()])
        assert [module.training for module in student.modules()] == modes
        assert not student[2].merged
    found(images().float())[1].backward()
    assert student[2].update.grad.abs().sum() > 0
    assert student[3].running_mean.equal(statistics)


def test_images_are_found_beside_other_tensors() -> None:
    labels = torch.arange(len(images()))
    expected = refreshed(distiller(), [images()])
    for batch in (
        {"labels": labels, "pixel_values": images()},
        UserDict(labels=labels, images=images()),
        [labels, images()],
    ):
        assert_same(refreshed(distiller(), [batch]), expected)
    assert images_of((labels, torch.zeros(2, 5))).shape == (2, 5)
    assert images_of((labels,)) is labels


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (torch.zeros(8, 3, 8, 8), {}, "the loader is a tensor: expected batches"),
        (TensorDataset(torch.zeros(8, 3, 8, 8)), {}, "the loader is a data set"),
        (7, {}, "the loader is a int"),
        ([torch.zeros(2, 5, 8, 8)], {}, r"does not take what a batch seems to hold as images, \(2, 5, 8, 8\)"),
        ([torch.zeros(2, 3, 8, 8).long()], {}, r"images, \(2, 3, 8, 8\) of torch.int64: RuntimeError"),
        ([torch.zeros(2, 3, 8, 8)], {"max_images": 1e4}, "max_images=10000.0: expected at least 1, a whole number"),
        ([torch.zeros(2, 3, 8, 8)], {"tolerance": "0.1"}, "tolerance=0.1: expected a share"),
        ([torch.zeros(2, 3, 8, 8)], {"tolerance": float("nan")}, "tolerance=nan: expected a share"),
    ],
)
def test_what_is_no_loader_is_said_in_a_sentence(loader: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distiller().refresh(loader, **options)


def test_a_student_that_was_not_called_itself() -> None:
    found = distiller()
    with pytest.raises(ValueError, match=r"the student itself was not called .*give the teacher's arguments"):
        found.refresh([images()], forward=found.student.forward)


def test_matchers_and_norms_that_do_not_fit() -> None:
    found = distiller(matcher=lambda cost, group: torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"position .*: the matcher gives an index \(1, 1\), expected"):
        found.refresh([images()])
    with pytest.raises(ValueError, match="norm fails for 4 channels"):
        distiller(norm=nn.BatchNorm2d(4))
