"""The patches of the alignment study change what they say, and nothing else."""

import copy
import types

import numpy as np
import pytest
import torch

from benchmarks import alignment_study as study
from matchdistill import MatchingDistiller, refreshed
from matchdistill.aligned import AlignedPosition
from matchdistill.functional import empirical_margin, orthogonal_map, partial_loss
from matchdistill.tasks.classification.module import ClassificationModule
from networks import PLAIN_TAPS, Plain, as_if_trained

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
PATCHED = ("_map", "solve", "loss", "loss_arguments", "maps", "reduces_early")


@pytest.fixture(autouse=True)
def _originals(monkeypatch):
    """What the patches replace comes back after each test."""
    for name in PATCHED:
        monkeypatch.setattr(AlignedPosition, name, getattr(AlignedPosition, name))
    monkeypatch.setattr(refreshed, "partial_loss", partial_loss)
    monkeypatch.setattr(ClassificationModule, "losses", ClassificationModule.losses)


@pytest.fixture
def distiller():
    torch.manual_seed(0)
    networks = as_if_trained(Plain(8)), as_if_trained(Plain(4))
    return MatchingDistiller(*networks, PLAIN_TAPS, example=IMAGES, reduction="align")


class Block(torch.nn.Module):
    """A convolution and a batch norm, named as in the networks of the transfer recipe, before a ReLU."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self._bn0 = torch.nn.BatchNorm2d(outputs)

    def forward(self, images):
        """Values behind the ReLU."""
        return self._bn0(self.conv(images)).relu()


def features(distiller, images=IMAGES):
    """The maps (student, teacher) (N, C, H, W) of each position in evaluation mode, at the student's size."""
    distiller.student.eval()
    with torch.no_grad(), distiller.capture() as captured:
        distiller.student(images)
    teacher = distiller._teacher(captured)
    distiller.student.train()
    pairs = enumerate(distiller.positions)
    return [position.maps(captured.values[number], teacher[number]) for number, position in pairs]


def flat(values):
    return values.transpose(0, 1).flatten(1).double().numpy()


def kernels_alike(student, teacher):
    """By the kernels of all pairs of values (C, V)."""
    size = student.shape[1]
    centring = np.eye(size) - 1 / size
    first, second = (centring @ values.T @ values @ centring for values in (student, teacher))
    return (first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second))


def covariance(student, teacher):
    one, other = (flat(values) - flat(values).mean(1, keepdims=True) for values in (student, teacher))
    return torch.from_numpy(one @ other.T / one.shape[1])


def refreshed_by(distiller, name):
    study.VARIANTS[name][1]()
    distiller.refresh([IMAGES])
    return distiller.positions


CHANGES = {
    "align found on images' differences": lambda values: values - values.mean(0, keepdim=True),
    "align found on places' differences": lambda values: values - values.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_map_of_other_features_with_the_same_loss(distiller, name):
    pairs = features(distiller)
    for position, pair in zip(refreshed_by(distiller, name), pairs, strict=True):
        expected = orthogonal_map(covariance(*map(CHANGES[name], pair)))
        torch.testing.assert_close(position.rotation.double(), expected, atol=1e-4, rtol=0)
        target = position.target(pair[1])
        student, given, _, _ = position.loss_arguments(*pair)
        assert torch.equal(given, target)
        assert student.shape == target.shape


def test_groups_of_no_negative_weight_are_disjoint(distiller):
    for position in refreshed_by(distiller, "align in positive groups"):
        weights = position.rotation
        assert (weights >= 0).all()
        assert ((weights > 0).sum(0) <= 1).all()
        lengths = weights.norm(dim=1)  # 0 where no channel of the group varies with the student's
        torch.testing.assert_close(lengths, (lengths > 0).float())
        assert lengths.mean() > 0.5


def test_a_map_that_stays_near_is_orthogonal_and_between(distiller):
    first = [position.rotation.double().clone() for position in refreshed_by(distiller, "align near before")]
    found = [orthogonal_map(covariance(*pair)) for pair in features(distiller, OTHERS)]
    distiller.refresh([OTHERS])
    for position, before, now in zip(distiller.positions, first, found, strict=True):
        rotation = position.rotation.double()
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(rotation)).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close((rotation - before).norm(), (rotation - now).norm(), atol=1e-4, rtol=0)
        assert (rotation - before).norm() < (now - before).norm()


def test_alignment_of_kernels_equals_the_one_of_all_pairs_of_values():
    student, teacher = (np.random.default_rng(number).normal(size=(number + 3, 20)) for number in (0, 1))
    student[1] += 2 * teacher[0]
    expected = 1 - kernels_alike(student, teacher)
    found = study.cka(torch.from_numpy(student), torch.from_numpy(teacher), None)
    assert found.item() == pytest.approx(expected)


def test_correlations_of_channels_are_compared():
    student, target = (np.random.default_rng(number).normal(size=(4, 20)) for number in (0, 1))
    expected = np.square(np.corrcoef(student) - np.corrcoef(target)).mean()
    found = study.channels_apart(torch.from_numpy(student), None, torch.from_numpy(target))
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["align with cka 0.1", "align with channels 1", "cka"])
def test_a_relation_is_added_to_the_loss(distiller, name):
    pairs = features(distiller)
    distiller.refresh([IMAGES])
    before = [position.loss(*pair, "mean") for position, pair in zip(distiller.positions, pairs, strict=True)]
    study.VARIANTS[name][1]()
    for position, pair, own in zip(distiller.positions, pairs, before, strict=True):
        values = [values.transpose(0, 1).flatten(1) for values in (*pair, position.target(pair[1]))]
        distance = (study.channels_apart if "channels" in name else study.cka)(*values)
        expected = {"cka": distance, "align with cka 0.1": own + 0.1 * distance}.get(name, own + distance)
        torch.testing.assert_close(position.loss(*pair, "mean"), expected)
        assert not position.reduces_early


def test_correlation_as_the_loss(distiller):
    pairs = features(distiller)
    for position, pair in zip(refreshed_by(distiller, "align pearson 1"), pairs, strict=True):
        both = flat(pair[0]), flat(position.target(pair[1]))
        expected = 1 - np.mean([np.corrcoef(*channels)[0, 1] for channels in zip(*both, strict=True)])
        assert position.loss(*pair, "mean").item() == pytest.approx(expected, abs=1e-5)


def test_margins_of_the_batch(distiller):
    pairs = features(distiller)
    for position, pair in zip(refreshed_by(distiller, "align measured margins"), pairs, strict=True):
        margin = empirical_margin(position.target(pair[1]))
        torch.testing.assert_close(position.loss_arguments(*pair)[2], margin)
        assert not torch.equal(margin, position.margin)


def test_stages_are_paired_by_their_kernels(monkeypatch):
    torch.manual_seed(0)
    student = as_if_trained(torch.nn.Sequential(Block(3, 4), Block(4, 4)))
    teacher = as_if_trained(torch.nn.Sequential(Block(3, 8), *copy.deepcopy(list(student))))
    teacher[1] = as_if_trained(Block(8, 4))
    loader = types.SimpleNamespace(data=types.SimpleNamespace(refresh_dataloader=lambda *_: [(IMAGES, None)]))
    monkeypatch.setattr(study, "load_recipe", lambda name: loader)
    monkeypatch.setattr(MatchingDistiller, "__init__", MatchingDistiller.__init__)
    columns = [[flat(value) for value in outputs(network.eval())] for network in (teacher, student)]
    alike = [[kernels_alike(one, other) for one in columns[0]] for other in columns[1]]
    orders = [(0, 1), (0, 2), (1, 2)]
    best = max(orders, key=lambda order: alike[0][order[0]] + alike[1][order[1]])
    study.VARIANTS["align stages by cka"][1]()
    for given in orders:  # whichever are given
        taps = [(f"{number}._bn0:output", f"{place}._bn0:output") for place, number in enumerate(given)]
        distiller = MatchingDistiller(teacher, student, taps, example=IMAGES, reduction="align")
        found = [(str(position.teacher), str(position.student)) for position in distiller.positions]
        assert found == [(f"{number}._bn0:output", f"{place}._bn0:output") for place, number in enumerate(best)]
        distiller.release()


def outputs(network):
    """The values of the batch norms of a sequence of blocks."""
    values, images = [], IMAGES
    with torch.no_grad():
        for block in network:
            values.append(block._bn0(block.conv(images)))
            images = values[-1].relu()
    return values


def test_positions_weigh_as_they_are_aligned(distiller):
    pairs = features(distiller)
    distiller.refresh([IMAGES])
    before = [position.loss(*pair, "mean") for position, pair in zip(distiller.positions, pairs, strict=True)]
    for position, pair, own in zip(refreshed_by(distiller, "align weighted"), pairs, before, strict=True):
        both = flat(pair[0]), flat(position.target(pair[1]))
        share = np.mean([np.corrcoef(*channels)[0, 1] for channels in zip(*both, strict=True)])
        torch.testing.assert_close(position.loss(*pair, "mean"), own * share, atol=1e-4, rtol=1e-4)


TRAINED = [name for name, (_, patch) in study.ALIGNMENTS.items() if patch and name.startswith(("align", "cka"))]


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "align stages by cka"])
def test_every_variant_trains(distiller, name):
    refreshed_by(distiller, name)
    loss = distiller(IMAGES)[1]
    assert loss.isfinite()
    loss.backward()
    assert any(value.grad is not None and value.grad.any() for value in distiller.student.parameters())
