"""The recipes of semantic segmentation. The numbers of Cityscapes are those that its authors and users publish."""

import pytest
import torch

from matchdistill.models.segmentation import segmenter
from matchdistill.recipes import packaged
from matchdistill.runs.recipe import load_recipe
from matchdistill.tasks.optimizing import lr_factor

NAME = "segmentation_cityscapes_r101_r18"
TRAINING_IMAGES = 2975


def test_cityscapes_has_the_usual_settings():
    recipe = load_recipe(NAME)
    data = recipe.data.options
    assert (data.name, data.batch_size, data.crop, data.scale) == ("cityscapes", 8, [512, 1024], [0.5, 2.0])
    for training in (recipe.training, recipe.teacher.training):
        steps = training.epochs * (TRAINING_IMAGES // data.batch_size)
        assert steps == pytest.approx(80_000, rel=0.01)
        usual = (training.optimizer, training.lr, training.momentum, training.nesterov, training.weight_decay)
        assert usual == ("sgd", 0.01, 0.9, False, 0.0005)
        assert lr_factor(training, training.epochs / 4) == pytest.approx(0.75**0.9)
    assert "It has not been run" in packaged()[NAME].splitlines()[0]


def test_its_student_divides_by_eight():
    student = load_recipe(NAME).student
    options = {**student.options, "backbone_weights": None, "num_classes": 19}
    maps = segmenter(**options).eval().backbone(torch.zeros(1, 3, 64, 64))
    assert {each.shape[-1] for each in list(maps.values())[-1:]} == {64 // 8}
