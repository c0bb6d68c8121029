import pytest
import torch
from torch import Generator
from torch.utils.data import TensorDataset

from matchdistill.data import EpochSampler, ImageData
from matchdistill.data.loading import BatchLoader, FixedViews, as_it_is, balanced_subset, mix_seed, strided_batches
from matchdistill.slots import checksum

DATA = TensorDataset(torch.arange(23))


def order(seed, epoch, rank=0, world=1, repeats=1):
    sampler = EpochSampler(DATA, seed, Generator(), rank, world, repeats)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_mixed_seeds_differ_by_every_part_and_never_change():
    parts = [(), ("a",), ("a", 0), ("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("a", 10), ("b", 0, 0)]
    assert len({mix_seed(*part) for part in parts}) == len(parts)
    assert mix_seed("order", 3) == 854161665  # a checkpoint of today must resume with the next version


def test_order_is_a_function_of_seed_and_epoch():
    assert sorted(order(0, 0)) == list(range(23))
    assert order(0, 1) == order(0, 1)
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(first != second for i, first in enumerate(orders) for second in orders[:i])


def test_ranks_share_the_images():
    shares = [order(0, 2, rank, 3) for rank in range(3)]
    assert {len(share) for share in shares} == {8}
    assert set().union(*shares) == set(range(23))
    assert [share[i] for i in range(7) for share in shares] == order(0, 2)[:21]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("repeats", [2, 3, 30])
def test_repeated_images_are_dealt_out_to_the_ranks(world, repeats):
    shares = [order(4, 2, rank, world, repeats) for rank in range(world)]
    dealt = [share[turn] for turn in range(len(shares[0])) for share in shares]
    images = order(4, 2)
    assert dealt == [images[place // repeats] for place in range(-(-23 // world) * world)]
    assert [len(share) for share in shares] == [len(order(4, 2, rank, world)) for rank in range(world)]
    assert order(4, 2, 0, world, repeats) != order(4, 3, 0, world, repeats)
    sampler = EpochSampler(DATA, 4, Generator(), 0, world, repeats)
    assert len(list(sampler)) == len(sampler)


def test_set_epoch_seeds_the_generator_of_the_workers():
    def state(seed, epoch, rank):
        generator = Generator()
        EpochSampler(DATA, seed, generator, rank, 4).set_epoch(epoch)
        return generator.initial_seed()

    keys = [(seed, epoch, rank) for seed in range(2) for epoch in range(3) for rank in range(4)]
    assert len({state(*key) for key in keys}) == len(keys)
    assert state(1, 2, 3) == state(1, 2, 3)
    generator = Generator()
    EpochSampler(DATA, 0, generator)
    assert generator.initial_seed() == state(0, 0, 0)  # without any set_epoch: epoch 0


class Scribbled(TensorDataset):
    """Batches of indices and random numbers; index 13 is bad luck."""

    def __init__(self, unlucky=-1):
        super().__init__(torch.arange(23))
        self.unlucky = unlucky

    def __getitems__(self, indices):
        if self.unlucky in indices:
            raise ValueError("image 13 is unlucky: remove it")
        return torch.tensor(indices), torch.rand(len(indices))


def loader(workers, unlucky=-1):
    generator = Generator()
    sampler = EpochSampler(DATA, 0, generator)
    arguments = {"batch_size": 5, "num_workers": workers, "collate_fn": as_it_is, "generator": generator}
    return BatchLoader(Scribbled(unlucky), sampler=sampler, **arguments)


def batches(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [(indices.tolist(), noise.tolist()) for indices, noise in loader]


def test_workers_repeat_an_epoch_and_vary_between_epochs():
    first = loader(2)
    assert batches(first, 3) == batches(loader(2), 3)
    noise = {value for epoch in (3, 4) for _, values in batches(first, epoch) for value in values}
    assert len(noise) == 2 * 23


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_set_after_iter_still_counts(workers):
    # Lightning asks for the iterator before it sets the epoch when a run resumes.
    resumed = loader(workers)
    iterator = iter(resumed)
    resumed.sampler.set_epoch(3)
    torch.manual_seed(0)
    got = [(indices.tolist(), noise.tolist()) for indices, noise in iterator]
    torch.manual_seed(0)
    assert got == batches(loader(workers), 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_keeps_its_one_line(workers):
    with pytest.raises(ValueError, match=r"^image 13 is unlucky: remove it$"):
        batches(loader(workers, unlucky=13), 0)


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    iterator = iter(loader(2))
    next(iterator)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(("size", "counts"), [(9, [3, 3, 3]), (10, [3, 3, 4]), (30, [5, 12, 13]), (55, [5, 20, 30])])
def test_balanced_subset(size, counts):
    labels = torch.tensor([0] * 5 + [1] * 20 + [2] * 30)[torch.randperm(55)]
    chosen = balanced_subset(labels, size, seed=1)
    assert sorted(labels[chosen].bincount().tolist()) == counts
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.tolist() == balanced_subset(labels, size, seed=1).tolist()
    if size < 55:
        assert chosen.tolist() != balanced_subset(labels, size, seed=2).tolist()


def test_balanced_subsets_of_one_order():
    labels = torch.tensor([0] * 5 + [1] * 20 + [2] * 30)[torch.randperm(55)]
    parts = [balanced_subset(labels, 7, seed=1, first=first) for first in range(0, 49, 7)]
    assert len(torch.cat(parts).unique()) == 49
    assert set(torch.cat(parts[:3]).tolist()) == set(balanced_subset(labels, 21, seed=1).tolist())
    # Class 0 is used up after 15 images, class 1 after 45.
    counts = [labels[part].bincount(minlength=3).tolist() for part in parts]
    assert all(max(count) - min(count) <= 2 for count in counts[:2])
    assert all(count[0] == 0 and abs(count[1] - count[2]) <= 2 for count in counts[3:6])


def test_balanced_subset_without_some_class():
    labels = torch.tensor([4, 4, 1, 1])
    assert labels[balanced_subset(labels, 2, seed=0)].sort().values.tolist() == [1, 4]


@pytest.mark.parametrize("count", [3, 7, 64, 65, 128, 129])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_strided_batches(count, batch_size, world):
    ranks = [strided_batches(count, batch_size, rank, world) for rank in range(world)]
    assert sorted(index for rank in ranks for batch in rank for index in batch) == list(range(count))
    assert len({len(rank) for rank in ranks}) == 1
    sizes = [len(batch) for rank in ranks for batch in rank]
    assert min(sizes) >= 1
    assert max(sizes) <= (batch_size if world == 1 else max(batch_size, 2))


def test_too_many_processes():
    with pytest.raises(ValueError, match="2 validation images cannot be shared among 3 processes"):
        strided_batches(2, 4, 0, 3)


class Noisy:
    """Images (N, 1, 2, 2) of their own number and noise, and labels."""

    def __len__(self):
        return 5

    def __getitems__(self, indices):
        labels = torch.tensor(indices)
        return labels.view(-1, 1, 1, 1) + torch.rand(len(indices), 1, 2, 2), labels


def test_a_view_has_the_same_pixels_in_every_batch_and_others_have_others():
    views = FixedViews(Noisy(), 3)
    assert len(views) == 15
    torch.manual_seed(1)
    (images, labels), numbers = views.__getitems__(list(range(15)))
    assert labels.tolist() == [*range(5)] * 3
    assert numbers[:, 0].tolist() == list(range(15))
    assert numbers[:, 1].tolist() == [checksum(image) for image in images]
    assert len({image.numpy().tobytes() for image in images}) == 15
    assert torch.equal(images.long().flatten(1), labels[:, None].expand(-1, 4))
    torch.manual_seed(2)
    (again, _), told = views.__getitems__([7, 2, 7])
    assert torch.equal(again, images[[7, 2, 7]])
    assert torch.equal(told, numbers[[7, 2, 7]])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_epochs_have_one_view_after_the_other_of_the_images_in_their_usual_order(workers):
    def epochs(views, seed=0):
        data = ImageData(train_limit=40, batch_size=20, workers=workers, seed=seed)
        data.views = views
        loader, found = data.train_dataloader(), []
        for epoch in range(4):
            loader.sampler.set_epoch(epoch)
            found.append(list(loader))
        return data, found

    data, usual = epochs(0)
    for epoch, batches in enumerate(epochs(3)[1]):
        numbers = torch.cat([batch.numbers[:, 0] for batch in batches])
        assert set((numbers // 40).tolist()) == {epoch % 3}
        assert torch.equal(data.train_set.data.labels[numbers % 40], torch.cat([labels for _, labels in usual[epoch]]))
    pixels = [
        {number: sum_of for batch in batches for number, sum_of in batch.numbers.tolist()} for batches in epochs(3)[1]
    ]
    assert pixels[0] == pixels[3]
    assert not set(pixels[0].values()) & set(pixels[1].values())


def test_a_refresh_has_the_view_of_its_epoch():
    data = ImageData(train_limit=40, batch_size=20)
    data.views = 2
    trained = data.train_dataloader()
    trained.sampler.set_epoch(1)
    known = {tuple(each) for batch in trained for each in batch.numbers.tolist()}
    assert {tuple(each) for batch in data.refresh_dataloader(30, 3) for each in batch.numbers.tolist()} <= known


def test_drawing_views_leaves_the_random_numbers_outside_alone():
    data = ImageData(train_limit=40, batch_size=20)
    data.views = 2
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    batches = iter(data.train_dataloader())
    next(batches)
    first = torch.rand(1)
    next(batches)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
