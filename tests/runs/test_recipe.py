from pathlib import Path

import pytest
import yaml

from matchdistill.methods import default_weights
from matchdistill.recipes import packaged
from matchdistill.runs.recipe import (
    SECTIONS,
    Recipe,
    plain_config,
    read_recipe,
    recipe_parser,
    resolve_recipe,
    task_of,
)

STUDENT = {"student": {"name": "timm:resnet18"}, "distillation": {"method": "none"}}


def resolved(values, *arguments):
    parser = recipe_parser(task=task_of(values, arguments))
    return plain_config(resolve_recipe(values, parser, arguments))


def complaint(values, *arguments):
    with pytest.raises(ValueError) as info:
        Recipe.of(resolved(values, *arguments))
    assert "\n" not in str(info.value)
    return str(info.value)


def test_every_problem_at_once():
    message = complaint(
        {
            "data": {"nmae": "digits", "batch_size": 0},
            "student": {"nme": "timm:resnet18"},
            "training": {"lr": "high", "epochs": 2.5, "schedule": "cosin"},
            "teacher": {"training": {"epoch": 3}},
            "distillation": {"taps": [["a", "b", "c"]], "method": "mgd-apm"},
            "trainer": 3,
            "something": 1,
        }
    )
    for part in (
        "unknown key 'data.nmae'; did you mean 'data.name'",
        "data.batch_size is 0: expected a whole number from 1 on",
        "unknown key 'student.nme'; did you mean 'student.name'",
        "student.name is missing",
        "training.lr is 'high': expected a number or null",
        "training.epochs is 2.5: expected a whole number",
        "training.schedule is 'cosin'",
        "unknown key 'teacher.training.epoch'; did you mean 'teacher.training.epochs'",
        "distillation.taps is [['a', 'b', 'c']]",
        "unknown method 'mgd-apm'; did you mean 'mgd-amp'",
        "trainer is 3: expected a mapping of accelerator",
        "unknown key 'something'",
    ):
        assert part in message
    assert message.count(";") >= 11


def test_a_value_that_is_wrong_is_not_called_missing_as_well():
    message = complaint({**STUDENT, "student": {"name": ["timm:resnet18"]}})
    assert message.startswith("the recipe does not fit: student.name is ['timm:resnet18']")
    assert "missing" not in message


@pytest.mark.parametrize("key", ["out", "resume", "config", "print_config", "help", "methods", "data.seed"])
def test_options_of_a_command_are_no_keys_of_a_recipe(key):
    parser = recipe_parser()
    for option in ("--out", "--resume", "--config", "--print_config", "--methods"):
        parser.add_argument(option)
    values = {**STUDENT, "data": {"seed": 1}} if key == "data.seed" else {**STUDENT, key: "x"}
    with pytest.raises(ValueError, match=f"unknown key '{key}'"):
        resolve_recipe(values, parser)


def test_mistakes_on_the_command_line():
    assert "--training.lrr" in complaint(STUDENT, "--training.lrr=1")
    assert "training.lr" in complaint(STUDENT, "--training.lr=high")
    both = complaint({**STUDENT, "foo": 1}, "--training.lrr=1")
    assert "unknown key 'foo'" in both
    assert "--training.lrr" in both


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"student": {}}, "student.name is missing"),
        ({"distillation": {"method": "kd"}}, "method 'kd' needs a teacher: give teacher.name"),
        ({"training": {"epochs": 0}}, "training.epochs is 0: expected at least 1"),
        ({"training": {"warmup_epochs": -1}}, "training.warmup_epochs is -1: expected a whole number from 0 on"),
        ({"training": {"lr": 0}}, "training.lr is 0: expected a finite number of more than 0"),
        ({"training": {"lr": float("inf")}}, "training.lr is inf: expected a finite number"),
        ({"teacher": {"training": {"weight_decay": -1}}}, "teacher.training.weight_decay is -1:"),
        (
            {"student": {"name": "timm:resnet18", "weights": "absent.pt"}},
            "student.weights absent.pt: there is no such file",
        ),
        ({"teacher": {"weights": "no/such.file"}}, "teacher.weights no/such.file: there is no such file"),
        (
            {"distillation": {"method": "none", "refresh_images": 0}},
            "distillation.refresh_images is 0: expected a whole",
        ),
        (
            {"distillation": {"method": "none", "refresh_every": -1}},
            "distillation.refresh_every is -1: expected a whole",
        ),
        (
            {"distillation": {"method": "none", "refresh_every": [1, -1]}},
            "distillation.refresh_every is -1: expected a whole",
        ),
        (
            {"distillation": {"method": "none", "hysteresis": -0.1}},
            "distillation.hysteresis is -0.1: expected a finite",
        ),
        (
            {"distillation": {"method": "none", "refresh_tolerance": -0.1}},
            "distillation.refresh_tolerance is -0.1: expected a number from 0 to below 1",
        ),
        ({"distillation": {"method": "none", "refresh_online": -1}}, "distillation.refresh_online is -1: expected a"),
        (
            {"distillation": {"method": "none", "refresh_online": 2, "refresh_steps": [[0, 100]]}},
            "distillation.refresh_online is of whole epochs",
        ),
        (
            {"distillation": {"method": "none", "weights": {"at": float("inf")}}},
            "distillation.weights.at is inf: expected",
        ),
        ({"student": {"name": "timm:resnet18", "weights": "nopackage:a.pt"}}, "there is no package 'nopackage'"),
        (
            {"distillation": {"method": "none", "kd_temperature": 0}},
            "distillation.kd_temperature is 0: expected a finite number of more than 0",
        ),
        (
            {"distillation": {"method": "none", "weights": {"kd": -1}}},
            "distillation.weights.kd is -1.0: expected a finite",
        ),
        ({"compare": {"seeds": 0}}, "compare.seeds is 0: expected a whole number from 1"),
        ({"compare": {"methods": []}}, "compare.methods is empty: expected one method at least"),
        ({"compare": {"methods": ["none", "mgd"]}}, "unknown method 'mgd'; did you mean"),
        ({"teacher": {"options": {1: 2}}}, "teacher.options has the key 1: expected names"),
        ({"teacher": {"options": {"num_classes": 2}}}, "teacher.options.num_classes cannot be given"),
        ({"teacher": {"options": {"weights": "a.pt"}}}, "teacher.options.weights cannot be given: use teacher.weights"),
        ({"data": {"name": "digts"}}, "data.name is 'digts'"),
        ({"data": {"name": "folder"}}, "data.root"),
        ({"data": {"workers": -1}}, "data.workers is -1"),
        ({"teacher": {"train_part": [5, 3]}}, "teacher.train_part is [5, 3]: expected two whole numbers"),
        ({"teacher": {"train_limit": 0}}, "teacher.train_limit is 0: expected a whole number from 1 on"),
        ({"trainer": {"precision": "bf16-true"}}, "trainer.precision is 'bf16-true': expected '32-true', "),
    ],
)
def test_values_that_do_not_fit_together(values, message):
    assert message in complaint({**STUDENT, **values})


def test_contradictions_are_listed_together():
    message = complaint({**STUDENT, "training": {"lr": -1, "momentum": -1}, "data": {"batch_size": 0, "val_limit": 0}})
    for key in ("training.lr", "training.momentum", "data.batch_size", "data.val_limit"):
        assert key in message


def test_overrides_are_above_the_recipe_and_the_recipe_above_the_defaults():
    values = {**STUDENT, "training": {"lr": 0.5, "gamma": 0.3}, "teacher": {"options": {"width": 4}}}
    config = resolved(values, "--training.lr=0.25", "--teacher.options={width: 9}", "--data.batch_size=7")
    assert config["training"]["lr"] == 0.25
    assert config["training"]["gamma"] == 0.3
    assert config["training"]["momentum"] == 0.9
    assert config["teacher"]["options"] == {"width": 9}
    assert config["data"]["batch_size"] == 7
    assert list(config) == [section for section in SECTIONS if section != "objective"]  # of some tasks


def test_the_teacher_has_its_own_images():
    teacher = {"name": "timm:resnet18", "fresh_head": True, "train_limit": 40, "train_part": [0, 50]}
    values = {**STUDENT, "teacher": teacher, "data": {"train_limit": 5, "train_part": [50, 70], "val_part": [0, 30]}}
    recipe = Recipe.of(resolved({**values, "training": {"epochs": 3}}, "--teacher.training.epochs=7")).for_teacher()
    assert (recipe.student.name, recipe.student.fresh_head, recipe.training.epochs) == ("timm:resnet18", True, 7)
    assert (recipe.data.options.train_limit, recipe.data.options.train_part, recipe.data.options.val_part) == (
        40,
        [0, 50],
        [0, 30],
    )
    assert recipe.distillation.method == "none"


@pytest.mark.parametrize("section", ["training", "teacher.training"])
def test_a_section_from_a_file(tmp_path, section):
    path = tmp_path / "training.yaml"
    path.write_text("epochs: 3\nlr: 0.5\n")
    config = Recipe.of(resolved(STUDENT, f"--{section}", str(path), f"--{section}.lr=0.25")).config
    for key in section.split("."):
        config = config[key]
    assert (config["epochs"], config["lr"], config["momentum"]) == (3, 0.25, 0.9)
    assert "__path__" not in config
    assert "absent.yaml" in complaint(STUDENT, f"--{section}", str(tmp_path / "absent.yaml"))


def test_parsers_share_no_defaults():
    resolved({**STUDENT, "training": {"milestones": [1], "lr": 3.0}, "student": {"name": "x", "options": {"a": 1}}})
    config = resolved(STUDENT)
    assert config["training"]["milestones"] == [31, 61, 81]
    assert config["training"]["lr"] is None
    assert config["student"]["options"] == {}


@pytest.mark.parametrize("weight", ["paper", 3.0, [1.0, 0.0]])
@pytest.mark.parametrize("taps", ["auto", [["layer1:output", "features.3:input"]]])
def test_plain_values_resolve_to_themselves(weight, taps):
    values = {
        **STUDENT,
        "data": {"name": "folder", "root": "/data/birds", "image_size": 224},
        "training": {"lr": 1e-5, "weight_decay": 5e-4, "milestones": []},
        "distillation": {"method": "none", "weights": {"mgd": weight}, "taps": taps},
        "trainer": {"devices": 2},
    }
    config = resolved(values)
    assert config["distillation"]["taps"] == values["distillation"]["taps"]
    assert config["distillation"]["weights"] == {**default_weights(), "mgd": weight}
    assert resolved(yaml.safe_load(yaml.safe_dump(config))) == config


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_resolve(name):
    config = resolved(read_recipe(name))
    recipe = Recipe.of(config)
    for method in recipe.compare.methods if recipe.teacher.name else ():
        assert Recipe.of(config, distillation__method=method).distillation.method == method
    assert resolved(config) == config
    assert packaged()[name].startswith("# ")


def test_reading(tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_bytes("# größer\nseed: 3\n".encode())
    assert read_recipe(path) == read_recipe(str(path)) == {"seed": 3}
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("seed: 9")
    assert read_recipe("quickstart")["task"] == "classification"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n- 2\n", r"r.yaml is not a recipe: expected a mapping of sections, got list"),
        (b"", r"r.yaml is not a recipe: expected a mapping of sections, got NoneType"),
        (b"a: [1\nb: {", r"r.yaml is not YAML: .*line 2"),
        (b"a: \xff\xfe", r"r.yaml is not YAML"),
        (b"a: !!python/object/apply:os.getcwd []", r"r.yaml is not YAML: could not determine a constructor"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        read_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(info.value)


def test_unknown_recipe():
    with pytest.raises(ValueError, match=r"no recipe 'quickstrat'.*did you mean 'quickstart'"):
        read_recipe("quickstrat")


def test_recipe_of_the_teacher(tiny):
    recipe = tiny("--teacher.training.epochs=7", "--teacher.train_limit=90", "--teacher.training.lr=0.3", "--seed=4")
    teacher = recipe.for_teacher()
    assert (teacher.student.name, teacher.student.options) == (recipe.teacher.name, {"width": 4})
    assert teacher.student.weights == recipe.teacher.weights
    assert (teacher.training.epochs, teacher.training.lr) == (7, 0.3)
    assert (teacher.data.options.train_limit, recipe.data.options.train_limit) == (90, 60)
    assert teacher.data.options.val_limit == 50
    assert (teacher.distillation.method, teacher.seed, teacher.data.options.seed) == ("none", 4, 4)
    assert recipe.config["distillation"]["method"] == "mgd-amp"


def test_recipe_with_a_trained_teacher(tiny, teacher_weights, monkeypatch):
    monkeypatch.chdir(teacher_weights.parent)
    recipe = tiny("--teacher.training.epochs=7").with_trained_teacher(Path(teacher_weights.name))
    assert recipe.teacher.weights == str(teacher_weights)
    assert recipe.teacher.training.epochs == 0
