"""The recipes of MoCo-v2 with MGD. The numbers are those of its authors, and of He et al. and Chen et al."""

import math

import pytest
import torch

from matchdistill.models import build_body
from matchdistill.options import FeatureOptions
from matchdistill.recipes import packaged
from matchdistill.runs.recipe import load_recipe
from matchdistill.tasks.optimizing import lr_factor, warmup_factor

STEPS = 1_281_167 // 256  # of an epoch of ImageNet
ROWS = {
    "moco_resnet50_resnet18": ("torchvision:resnet18", "53.6", "52.5"),
    "moco_resnet50_resnet34": ("torchvision:resnet34", "58.5", "57.2"),
}


@pytest.mark.parametrize("name", ROWS)
def test_pre_training(name):
    recipe = load_recipe(name)
    student, distilled, alone = ROWS[name]
    first = packaged()[name].splitlines()[0]
    assert f"{distilled}% top-1" in first
    assert f"MoCo alone {alone}%" in first
    assert (recipe.student.name, recipe.teacher.name, recipe.teacher.training.epochs) == (
        student,
        "torchvision:resnet50",
        0,
    )
    contrast = recipe.objective
    assert (contrast.queue, contrast.temperature, contrast.momentum, contrast.dimensions) == (65_536, 0.2, 0.999, 128)
    assert contrast.queue % recipe.data.options.batch_size == 0
    assert (recipe.data.options.batch_size, recipe.data.image_size) == (256, 224)
    settings = recipe.distillation
    assert (settings.method, settings.refresh_images) == ("mgd-amp", 20_000)
    logspaced = [math.ceil(10 ** (2.1 * place / 9)) for place in range(10)]
    assert settings.refresh_every == [0, *logspaced]
    assert FeatureOptions(loss_weight=settings.feature_weight).weights(4) == [
        pytest.approx(1 / (1e4 * 2 ** (3 - place))) for place in range(4)
    ]


def test_the_weight_that_the_authors_suggest_can_be_given():
    given = ["--distillation.loss_reduction=sum", "--distillation.weights.mgd=[0.00125, 0.0025, 0.005, 0.01]"]
    recipe = load_recipe("moco_resnet50_resnet18", *given)
    options = FeatureOptions(
        loss_weight=recipe.distillation.feature_weight, loss_reduction=recipe.distillation.loss_reduction
    )
    assert options.applied_loss_reduction == "sum"
    assert options.weights(4) == [pytest.approx(1 / (1e2 * 2 ** (3 - place))) for place in range(4)]


def test_the_learning_rate_rises_for_three_epochs_and_falls_as_a_cosine():
    training = load_recipe("moco_resnet50_resnet18").training.settled()
    assert (training.optimizer, training.momentum, training.nesterov, training.weight_decay) == (
        "sgd",
        0.9,
        False,
        1e-4,
    )
    assert training.all_epochs == 200

    def rate(step):
        return training.lr * lr_factor(training, step / STEPS) * warmup_factor(training, step)

    assert rate(0) == pytest.approx(0.03 * 0.001)
    assert rate(3 * STEPS // 2) == pytest.approx(0.015, rel=0.002)
    assert rate(3 * STEPS) == pytest.approx(0.03, rel=0.001)
    assert rate(100 * STEPS) == pytest.approx(0.015)
    assert rate(200 * STEPS) == pytest.approx(0, abs=1e-12)


def test_linear_classification():
    recipe = load_recipe("moco_linear", "--data.root=.")
    training = recipe.training.settled()
    assert (training.frozen, training.epochs, training.lr, training.weight_decay) == (True, 100, 30.0, 0.0)
    assert (training.momentum, training.nesterov, training.all_epochs) == (0.9, False, 100)
    assert [lr_factor(training, epoch) for epoch in (0, 59, 60, 79, 80)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert (recipe.task, recipe.distillation.method, recipe.data.options.batch_size) == ("classification", "none", 256)


def test_positions_are_the_four_stages_before_their_last_activation():
    from matchdistill import find_taps

    found = find_taps(
        build_body("torchvision:resnet50"), build_body("torchvision:resnet18"), torch.zeros(1, 3, 224, 224)
    )
    assert [(str(one), str(other)) for one, other in found] == [
        (f"layer{stage}.{blocks - 1}.relu:input", f"layer{stage}.1.relu:input")
        for stage, blocks in enumerate((3, 4, 6, 3), start=1)
    ]
