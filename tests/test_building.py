import pytest
import torch

from matchdistill.baselines import BASELINES
from matchdistill.building import build_module, build_teacher
from matchdistill.functional import random_assignment, solve_assignment
from matchdistill.models import small_resnet


@pytest.fixture
def other_classes(tmp_path):
    """Weights of the teacher for seven classes, not ten."""
    path = tmp_path / "seven.pt"
    torch.save(small_resnet(num_classes=7, width=4).state_dict(), path)
    return f"--teacher.weights={path}", "--teacher.fresh_head=true"


def test_a_teacher_whose_head_nobody_trains_teaches_features_alone(tiny, other_classes):
    teacher = build_module(tiny(*other_classes, "--distillation.method=mgd-amp")).guide()
    assert teacher.fc.out_features == 10
    build_module(tiny(*other_classes, "--distillation.method=kd", "--teacher.training.epochs=1"))
    for method in ("kd", "mgd-amp+kd"):
        with pytest.raises(ValueError, match="weights are for 7 classes, the model has 10"):
            build_module(tiny(*other_classes, f"--distillation.method={method}"))


def test_nor_has_a_teacher_of_a_library_s_weights_a_new_head_for_its_output(tiny, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda name, pretrained, num_classes=9, **_: small_resnet(num_classes, 4))
    for method, message in (("kd", r"the teacher gives \(2, 9\) for 2 images, but the data has 10"), ("mgd-amp", None)):
        recipe = tiny("--teacher.name=timm:resnet18", "--teacher.options={}", f"--distillation.method={method}")
        recipe.data.setup()
        if message is None:
            assert build_teacher(recipe, "pretrained").fc.out_features == 10
        else:
            with pytest.raises(ValueError, match=message):
                build_teacher(recipe, "pretrained")


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_the_weight_of_its_recipe(tiny, name):
    distiller = build_module(tiny(f"--distillation.method={name}", f"--distillation.{name}_weight=0.3")).distiller
    assert {type(position) for position in distiller.positions} == {BASELINES[name]}
    assert distiller._weights == [0.3] * len(distiller.positions)


@pytest.mark.parametrize(("features", "matcher"), [("mgd", solve_assignment), ("random", random_assignment)])
def test_the_matching_is_that_of_the_recipe(tiny, features, matcher):
    options = f"--distillation.method={features}-rd", "--distillation.hysteresis=0.2", "--distillation.loss_weight=3"
    distiller = build_module(tiny(*options)).distiller
    assert distiller._weights == [3.0] * len(distiller.positions)
    for position in distiller.positions:
        assert (position.matcher, position.hysteresis, position.reduction) == (matcher, 0.2, "rd")
