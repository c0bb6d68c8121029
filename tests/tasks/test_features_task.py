"""The task features, but for whole runs, which are in tests/runs/test_train_features.py."""

import re

import pytest
import timm
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F
from torchmetrics.utilities import dim_zero_sum
from torchvision import models

from matchdistill import MatchingDistiller
from matchdistill.baselines import FitNetsPosition
from matchdistill.features import FeatureDistiller
from matchdistill.models import small_resnet
from matchdistill.models.preparation import IMAGENET
from matchdistill.runs.recipe import load_recipe
from matchdistill.tasks import TASKS
from matchdistill.tasks.features.module import Likeness, _freeze_rest
from matchdistill.tasks.features.pooling import find_pooling, name_part, part_of

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "head", "expected"),
    [
        (lambda: models.resnet18(), "fc", lambda net, x: nn.Sequential(*list(net.children())[:-1])(x).flatten(1)),
        (
            lambda: models.mobilenet_v3_small(),
            "classifier.3",
            lambda net, x: net.classifier[:3](net.avgpool(net.features(x)).flatten(1)),
        ),
        (
            lambda: timm.create_model("vit_tiny_patch16_224", img_size=32),
            "head",
            lambda net, x: net.forward_head(net.forward_features(x), pre_logits=True),
        ),
        (lambda: timm.create_model("resnet10t", num_classes=0), None, lambda net, x: net(x)),
        (lambda: models.resnet18().layer1, None, None),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4).layers,
            None,
            None,
        ),
    ],
)
def test_where_the_pooled_output_is(build, head, expected):
    network = build().eval()
    images = IMAGES
    if expected is None:  # maps, with the channels second or last
        last = isinstance(network, nn.Sequential) and "Swin" in type(network[0]).__name__
        images = torch.randn(2, 8, 8, 96) if last else torch.randn(2, 64, 8, 8)
        axes = (1, 2) if last else (2, 3)
        expected = lambda net, x: net(x).mean(axes)  # noqa: E731
    pooling = find_pooling(network, images, "student")
    assert pooling.head == head
    with torch.no_grad():
        found = pooling(network, images)
        torch.testing.assert_close(found, expected(network, images))
        torch.testing.assert_close(pooling.backbone(network)(images), found)
    if head:
        assert isinstance(network.get_submodule(head), nn.Linear)  # it is back


class Pyramid(nn.Module):
    """Gives a list of maps, as encoders do; its decoder is not reached by it."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), nn.Conv2d(8, 2, 1)

    def forward(self, images):
        return self.decoder(self.encoder(images)[-1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Conv2d(n, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()) for n in (3, 8))
        self.three = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images):
        first = self.one(images)
        return [first, second := self.two(first), self.three(second)]


def test_a_part_by_its_name():
    network = name_part(Pyramid(), "encoder")
    assert part_of(network) is network.encoder
    pooling = find_pooling(part_of(network), IMAGES, "student")
    network.eval()
    torch.testing.assert_close(pooling(part_of(network), IMAGES), network.encoder(IMAGES)[-1].mean((2, 3)))
    with pytest.raises(ValueError, match="has no module 'encodr'; did you mean 'encoder'"):
        name_part(network, "encodr")


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Linear(5, 2), "the student, or the part of it that is named, does not take images of shape"),
        (nn.Sequential(nn.Flatten(0)), "gives .* for 3 images: expected features"),
    ],
)
def test_networks_that_give_no_features(network, said):
    with pytest.raises(ValueError, match=said):
        find_pooling(network, IMAGES, "student")


@pytest.mark.parametrize("matched", [True, False])
def test_likeness_is_that_of_a_slow_loop(matched):
    torch.manual_seed(0)
    teacher, student = small_resnet(width=6), small_resnet(width=4)
    if matched:
        distiller = MatchingDistiller(teacher, student, example=IMAGES)
        distiller.refresh([IMAGES])
    else:
        distiller = FeatureDistiller(teacher, student, "auto", FitNetsPosition, example=IMAGES)
    distiller.eval()
    measure, losses, taken = Likeness(distiller), [], []
    for images in IMAGES.split(2):
        with distiller.capture() as captured, torch.no_grad():
            student(images)
        measure.update(captured, len(images), trained=True)
        with torch.no_grad():
            losses.append(distiller(images)[1].item() * len(images))
        taken.append([[v.clone() for v in each.values()] for each in (captured.values, captured.teacher_values)])
    cosines = []
    for number in range(len(distiller.positions)):
        ours, theirs = (torch.cat([batch[role][number] for batch in taken]) for role in (0, 1))
        images = list(zip(ours, theirs, strict=True))
        table = torch.zeros(ours.shape[1], theirs.shape[1])
        for i in range(len(table)):
            for j in range(theirs.shape[1]):
                found = [F.cosine_similarity(s[i].flatten(), t[j].flatten(), dim=0) for s, t in images]
                table[i, j] = sum(found) / len(found)
        cosines.append(table[linear_sum_assignment(-table.numpy())].mean())
    found = measure.compute()
    torch.testing.assert_close(found["matched_cosine"], torch.stack(cosines).mean(), atol=1e-5, rtol=1e-5)
    assert found["held_out_loss"].item() == pytest.approx(sum(losses) / len(IMAGES), rel=1e-5)


def test_likeness_is_summed_in_what_an_apple_gpu_has(monkeypatch):
    """Which has no float64."""
    distiller = FeatureDistiller(small_resnet(width=6), small_resnet(width=4), "auto", FitNetsPosition, example=IMAGES)
    with monkeypatch.context() as patched:
        patched.setattr(torch.backends.mps, "is_available", lambda: True)
        measure = Likeness(distiller.eval())
    with distiller.capture() as captured, torch.no_grad():
        distiller.student(IMAGES)
    measure.update(captured, len(IMAGES), trained=True)
    assert {state.dtype for state in measure.metric_state.values()} == {torch.float32, torch.int64}
    narrow, measure = measure.compute(), Likeness(distiller)
    measure.update(captured, len(IMAGES), trained=True)
    assert torch.float64 in {state.dtype for state in measure.metric_state.values()}
    torch.testing.assert_close(narrow, measure.compute(), check_dtype=False)


@pytest.mark.parametrize("batch", [2, 3, 5])
@pytest.mark.parametrize("processes", [1, 2])
def test_likeness_of_pooled_values_does_not_depend_on_the_batches(batch, processes):
    """A last batch of one image, whose channels are alike but for their signs, counts as one image of the set."""
    torch.manual_seed(0)
    teacher, student = small_resnet(width=6), small_resnet(width=4)
    tap = find_pooling(student, IMAGES, "student").tap
    distiller = FeatureDistiller(teacher, student, [(tap, tap)], FitNetsPosition, example=IMAGES).eval()
    images = torch.randn(11, 3, 16, 16)
    measures, taken = [Likeness(distiller) for _ in range(processes)], []
    for number, part in enumerate(images.split(batch)):
        with distiller.capture() as captured, torch.no_grad():
            student(part)
        measures[number % processes].update(captured, len(part), trained=True)
        taken.append([next(iter(each.values())).clone() for each in (captured.values, captured.teacher_values)])
    for name in measures[0]._defaults:  # as torchmetrics sums over processes
        assert measures[0]._reductions[name] is dim_zero_sum
        setattr(measures[0], name, sum(getattr(measure, name) for measure in measures))
    ours, theirs = (torch.cat([each[role] for each in taken]).double() for role in (0, 1))
    table = torch.zeros(ours.shape[1], theirs.shape[1])
    for i in range(len(table)):
        for j in range(theirs.shape[1]):
            table[i, j] = F.cosine_similarity(ours[:, i], theirs[:, j], dim=0)
    expected = table[linear_sum_assignment(-table.numpy())].mean()
    torch.testing.assert_close(measures[0].compute()["matched_cosine"], expected, atol=1e-6, rtol=0)


def test_what_leads_to_no_position_is_frozen():
    network = name_part(Pyramid(), "encoder")
    teacher = Pyramid().encoder
    distiller = FeatureDistiller(teacher, network.encoder, [("two.1", "two.1")], FitNetsPosition, example=IMAGES)
    _freeze_rest(network, distiller)
    trained = {name.rpartition(".")[0] for name, each in network.named_parameters() if each.requires_grad}
    assert trained == {"encoder.one.0", "encoder.one.1", "encoder.two.0", "encoder.two.1"}


def test_the_pooled_output_is_compared_over_the_batch():
    """Of pooled features the images are what a channel varies over."""
    torch.manual_seed(0)
    teacher, student = small_resnet(width=6), small_resnet(width=4)
    tap = find_pooling(student, IMAGES, "student").tap
    distiller = MatchingDistiller(teacher, student, [(tap, tap)], example=IMAGES)
    images = torch.randn(12, 3, 16, 16)
    matching = distiller.refresh([images])[0]
    values = []
    for network in (student, teacher):
        network.fc.register_forward_pre_hook(lambda _, given: values.append(given[0].clone()))
        network.eval()(images)
    cost = 2 - 2 * F.normalize(values[0], dim=0).T @ F.normalize(values[1], dim=0)
    torch.testing.assert_close(matching.cost, cost.detach(), atol=1e-5, rtol=1e-5)
    assert matching.cost.unique().numel() > 100  # by one image alone, channels would be alike but for their signs
    assert matching.images == 12
    assert [each.images for each in distiller.refresh([images, images[:5]])] == [17]
    assert [each.images for each in distiller.refresh([images, images[:5]], tolerance=0.5)] == [17]
    _, loss = distiller.train()(images)
    loss.backward()
    assert student.layer3.conv1.weight.grad.abs().sum() > 0


def problems(*arguments):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as info:
        load_recipe("features_fashion_mnist", *arguments)
    return str(info.value)


def test_settings_that_do_not_fit():
    assert "method 'mgd-amp+kd' distils the output of classifiers" in problems("--distillation.method=mgd-amp+kd")
    assert "teacher.training.epochs is for tasks with labels" in problems("--teacher.training.epochs=1")
    assert "trainer.compile is not for features" in problems("--trainer.compile=true")
    for task, setting in (("classification", "student.part=layer1"), ("detection", "teacher.part=backbone")):
        with pytest.raises(ValueError, match=f"{setting.partition('=')[0]} is not for {task}"):
            load_recipe("quickstart", f"--task={task}", f"--{setting}", "--data.root=x")
    with pytest.raises(ValueError, match=r"distillation.pooled is not for classification"):
        load_recipe("quickstart", "--distillation.pooled=true")


@pytest.mark.parametrize("task", ["features", "moco"])
def test_a_network_without_a_head_is_named_as_timm_does(task):
    """num_classes=0; the data's classes have nothing to do with it."""
    network = {"name": "timm:resnet10t", "options": {"num_classes": 0}}
    given = [f"--{role}.{key}={value}" for role in ("teacher", "student") for key, value in network.items()]
    options = ["--teacher.weights=null", "--student.weights=null", "--distillation.method=mgd-amp"]
    recipe = load_recipe("features_fashion_mnist", f"--task={task}", *given, *options)
    built = TASKS[task].build(recipe.teacher, 10)
    assert built.eval()(IMAGES).shape == (3, 512)
    with pytest.raises(ValueError, match=r"teacher.options.num_classes cannot be given: the data has its number"):
        load_recipe("quickstart", *given)
    described = {"name": network["name"], "options": TASKS[task].bare(network["options"]), "num_classes": 0}
    described |= {"image_size": 32, "preparation": IMAGENET.plain(), "gray": False, "class_names": []}
    code = TASKS[task].card(built, described, {}).use("safetensors", "f")
    names: dict = {}
    exec(re.search(r"```python\n(.*\nmodel = .*?)\n", code, re.DOTALL)[1], names)
    assert names["model"](IMAGES).shape == (3, 512)


def test_metrics_are_in_the_order_by_which_runs_compare():
    assert [metric.name for metric in TASKS["features"].metrics] == ["knn", "probe", "matched_cosine", "held_out_loss"]
