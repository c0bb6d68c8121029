"""The patches of the study change what they say and nothing else, and its table compares equal seeds."""

import copy

import pytest
import torch
from torch.nn import functional as F

from matchdistill.distiller import MatchingDistiller
from matchdistill.functional import empirical_margin, matching_cost, reduce_margin, solve_assignment
from matchdistill.matched import MatchedPosition
from matchdistill.position import FeaturePosition
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.tasks.classification.module import ClassificationModule
from networks import PLAIN_TAPS, Plain, as_if_trained
from scripts import script

study = script("transfer_study")

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _originals(monkeypatch):
    """What the patches replace comes back after each test."""
    for owner, name in (
        (MatchedPosition, "solve"),
        (MatchedPosition, "maps"),
        (FeaturePosition, "margin_norm"),
        (ClassificationModule, "losses"),
        (MatchingDistiller, "refresh"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture
def distiller():
    torch.manual_seed(0)
    return MatchingDistiller(as_if_trained(Plain(8)), as_if_trained(Plain(4)), PLAIN_TAPS, example=IMAGES)


def features(distiller):
    """The tapped (student, teacher) values in evaluation mode."""
    distiller.student.eval()
    with torch.no_grad(), distiller.capture() as captured:
        distiller.student(IMAGES)
    teacher = distiller._teacher(captured)
    distiller.student.train()
    return [(captured.values[number], teacher[number]) for number in range(3)]


def unit_variance(values):
    return (values - values.mean((0, 2, 3), keepdim=True)) / values.var((0, 2, 3), correction=0, keepdim=True).sqrt()


CHANGES = {
    "normalised": lambda student, teacher: (unit_variance(student), teacher),
    "centred": lambda student, teacher: (
        student - student.mean((2, 3), keepdim=True),
        teacher - teacher.mean((2, 3), keepdim=True),
    ),
    "rectified": lambda student, teacher: (F.relu(student), F.relu(teacher)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_matched_on_other_features_with_the_same_loss(distiller, name):
    pairs = features(distiller)
    distiller.refresh([IMAGES])
    plain = [position.index.clone() for position in distiller.positions]
    study.VARIANTS[name][1]()
    distiller.refresh([IMAGES])
    for position, pair in zip(distiller.positions, pairs, strict=True):
        cost = matching_cost(*CHANGES[name](*pair))
        torch.testing.assert_close(position.matching.cost, cost, atol=1e-4, rtol=0, check_dtype=False)
        assert torch.equal(position.index, solve_assignment(position.matching.cost))
    assert any(not torch.equal(before, now.index) for before, now in zip(plain, distiller.positions, strict=True))
    changed = distiller(IMAGES)[1].item()
    same = copy.deepcopy(distiller)
    MatchedPosition.maps = FeaturePosition.maps
    assert same(IMAGES)[1].item() == changed


def test_averaged_costs(distiller):
    study.averaged(0.75)()
    costs = []
    for _ in range(2):
        costs.append([matching_cost(*pair) for pair in features(distiller)])
        distiller.refresh([IMAGES])
        with torch.no_grad():
            distiller.student.conv0.weight.neg_()
    for position, first, second in zip(distiller.positions, *costs, strict=True):
        torch.testing.assert_close(
            position.matching.cost, 0.75 * first + 0.25 * second, atol=1e-5, rtol=0, check_dtype=False
        )


def test_measured_margins(distiller):
    study.measured_margins()
    distiller.refresh([IMAGES])
    for position, (_, teacher) in zip(distiller.positions, features(distiller), strict=True):
        expected = reduce_margin(empirical_margin(teacher), position.index)
        torch.testing.assert_close(position.margin, expected, atol=1e-5, rtol=0, check_dtype=False)


@pytest.mark.parametrize("recipe", ["transfer_fashion_mnist", "transfer_fashion_mnist_narrow"])
def test_every_variant_is_a_recipe(recipe):
    pytest.importorskip("efficientnet_lite_pytorch")
    config = load_recipe(recipe).config
    for changes, _ in study.VARIANTS.values():
        Recipe.of(config, **{f"distillation__{key}": value for key, value in changes.items()})


def test_the_table_compares_equal_seeds():
    found = {
        study.BASE: {"100": 0.8, "101": 0.9, "102": 0.7},
        "better": {"100": 0.81, "101": 0.91},
        "lucky": {"101": 0.89},
        "wild": {"100": None},
    }
    lines = study.markdown(found).splitlines()[2:]
    assert lines == [
        "| better | +1.00 ± 0.00 | 100: 81.00, 101: 91.00 |",
        "| every 2 |  | 100: 80.00, 101: 90.00, 102: 70.00 |",
        "| lucky | -1.00 | 101: 89.00 |",
        "| wild |  | 100: diverged |",
    ]
