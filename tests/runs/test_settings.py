import math
from pathlib import Path

import pytest
import yaml

from matchdistill import cli
from matchdistill.methods import METHODS
from matchdistill.runs.recipe import recipe_parser
from matchdistill.runs.settings import Comparison, Distillation, Machine, Training


def test_which_methods_need_a_teacher():
    assert [Distillation(method=method).needs_teacher for method in ("none", "kd", "mgd-rd")] == [False, True, True]


def test_weights():
    settings = Distillation(method="random-amp", weights={"mgd": [1.0, 2.0]})
    assert settings.feature_weight == [1.0, 2.0]  # a control weighs as what it is the control of
    assert Distillation(method="at", weights={"mgd": 3.0}).feature_weight == METHODS["at"].weight
    assert (settings.weight("kd"), Distillation(weights={"kd": 2.0}).weight("kd")) == (1.0, 2.0)


def test_warm_up_is_added():
    assert Training(epochs=120, warmup_epochs=10).all_epochs == 130


# For every setting; what is right for one is wrong for another.
VALUES = "nan .nan .inf -.inf -1 0 -0.5 1.5 1e400 [] {} null true word [[]] [1,x] [-1] [.nan] {a:.nan}".split()
VALUES += [str(10**30), str(2**40), "", "\0", "é", "{a: 1, a: 2}", "[" * 2000]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "detection"])
def test_any_value_of_any_setting_is_taken_or_refused_in_one_line(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = {"root": "coco"} if task == "detection" else {"name": "digits"}
    name = "torchvision:fcos_resnet50_fpn" if task == "detection" else "timm:resnet18"
    values = {"task": task, "data": data, "student": {"name": name}, "distillation": {"method": "none"}}
    Path("r.yaml").write_text(yaml.safe_dump(values))
    options = [
        action.dest for action in recipe_parser(task=task)._actions if "." in action.dest or action.dest == "seed"
    ]
    assert len(options) > 50
    for number, option in enumerate(options):
        if task == "detection" and not option.startswith("data."):
            continue
        for value in VALUES[number % 5 :: 5]:  # each value meets a fifth of the settings
            code = cli.main(["fit", "r.yaml", f"--{option}={value}", "--print_config"])
            said = capsys.readouterr().err
            assert (code, said.count("\n")) in ((0, 0), (2, 1)), (option, value, said)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (Training(), None),
        (Training(gamma=-0.1), "t.gamma is -0.1"),
        (Training(gamma=math.nan), "t.gamma is nan"),
        (Training(momentum=1.0), "t.momentum is 1.0"),
        (Training(weight_decay=math.inf), "t.weight_decay is inf"),
        (Training(ema=math.nan), "t.ema is nan"),
        (Training(milestones=[3, -1]), "t.milestones is -1"),
        (Training(epochs=2**40), f"t.epochs is {2**40}: expected a whole number from 0 to 2147483647"),
        (Distillation(), None),
        (Distillation(weights={"mgd": "paper"}), None),
        (Distillation(weights={"mgd": [1.0, math.nan]}), "t.weights.mgd is nan"),
        (Distillation(weights={"mgd": []}), "t.weights.mgd is empty"),
        (Distillation(weights={"mdg": 1.0}), "t.weights has no 'mdg'; did you mean 'mgd'"),
        (Distillation(weights={"random": 1.0}), "t.weights has no 'random'"),
        (Distillation(weights={"kd": [1.0]}), "t.weights.kd is [1.0]: expected a finite number"),
        (Distillation(taps=[]), "t.taps is empty"),
        (Distillation(refresh_every=[]), None),
        (Distillation(refresh_steps=[[-5, 3], [0, 1]]), "t.refresh_steps is"),
        (Distillation(weights={"kd": math.inf}), "t.weights.kd is inf"),
        (Machine(), None),
        (Machine(devices="auto"), None),
        (Machine(devices=-1), "t.devices is -1: expected a whole number from 1 to 1024, or auto for all"),
        (Machine(log_every=0), "t.log_every is 0"),
        (Comparison(methods=["none"]), None),
        (Comparison(methods=[]), "t.methods is empty"),
    ],
)
def test_problems(settings, problem):
    found = list(settings.problems("t"))
    assert len(found) == (problem is not None)
    assert problem is None or found[0].startswith(problem)
