"""The paper's experiments as packaged recipes. The numbers here are those of Yue et al., ECCV 2020, and its code."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.datasets import imagenet
from torchvision.models import WeightsEnum

from data.trees import CUB_SIZES, write_cub, write_imagenet_archives
from matchdistill import MatchingDistiller, cli
from matchdistill.data import cub
from matchdistill.models import build_model
from matchdistill.recipes import packaged
from matchdistill.runs.recipe import load_recipe, read_recipe

SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
STEPS = {"epochs": 120, "schedule": "steps", "milestones": [31, 61, 81], "gamma": 0.1}
IMAGENET = {**SGD, **STEPS, "lr": 0.1, "warmup_epochs": 0}
CUB = {**IMAGENET, "lr": 0.01}
SHUFFLENET = "matchdistill.models.shufflenet:shufflenet_v2_x1_0"

# name: errors, data, batch, training, student, its weights
ALONE = {
    "imagenet_resnet152": ("21.69 / 5.94", "imagenet", 256, IMAGENET, "torchvision:resnet152", None),
    "imagenet_resnet50": ("23.85 / 7.13", "imagenet", 256, IMAGENET, "torchvision:resnet50", None),
    "imagenet_mobilenetv1": (
        "31.13 / 11.24",
        "imagenet",
        256,
        {**IMAGENET, "warmup_epochs": 10},
        "timm:mobilenetv1_100",
        None,
    ),
    "cub200_resnet50": ("20.02 / 6.06", "cub200", 64, CUB, "torchvision:resnet50", "IMAGENET1K_V1"),
    "cub200_mobilenetv2": ("24.61 / 7.56", "cub200", 64, CUB, "torchvision:mobilenet_v2", "IMAGENET1K_V1"),
    "cub200_shufflenetv2": ("31.39 / 10.9", "cub200", 64, CUB, SHUFFLENET, "IMAGENET1K_V1"),
}
# name: errors, method, refresh_every, the recipes of teacher and student alone
DISTILLED = {
    "imagenet_resnet152_resnet50": ("22.02 / 5.68", "mgd-sm", 1, "imagenet_resnet152", "imagenet_resnet50"),
    "imagenet_resnet50_mobilenetv1": ("28.53 / 9.65", "mgd-amp", 1, "imagenet_resnet50", "imagenet_mobilenetv1"),
    "cub200_resnet50_mobilenetv2": ("20.47 / 5.23", "mgd-amp", 2, "cub200_resnet50", "cub200_mobilenetv2"),
    "cub200_resnet50_shufflenetv2": ("25.95 / 7.46", "mgd-amp", 2, "cub200_resnet50", "cub200_shufflenetv2"),
    "cub200_resnet50_shufflenetv2_kd": ("25.18 / 7.87", "mgd-amp+kd", 2, "cub200_resnet50", "cub200_shufflenetv2"),
}
# widths and map sizes of the student at 224 px, the modules that return the tapped values activated, the activation (none in
# ShuffleNet-V2, where it comes first in what follows)
RESNET50 = ("layer1", "layer2", "layer3", "layer4")
POSITIONS = {
    "imagenet_resnet152_resnet50": ([256, 512, 1024, 2048], [56, 28, 14, 7], RESNET50, nn.ReLU()),
    "imagenet_resnet50_mobilenetv1": (
        [128, 256, 512, 1024],
        [56, 28, 14, 7],
        ("blocks.1.1", "blocks.2.1", "blocks.3.5", "blocks.4.1"),
        nn.ReLU(),
    ),
    "cub200_resnet50_mobilenetv2": (
        [192, 384, 960],
        [28, 14, 7],
        ("features.7.conv.1", "features.11.conv.1", "features.17.conv.1"),
        nn.ReLU6(),
    ),
    "cub200_resnet50_shufflenetv2": ([116, 232, 464], [28, 14, 7], ("stage2", "stage3", "stage4"), nn.Identity()),
}


def networks_of(recipe, num_classes=200):
    """Teacher and student, untrained."""
    return [build_model(each.name, num_classes, **each.options) for each in (recipe.teacher, recipe.student)]


def distiller_of(recipe, taps=None, size=224):
    settings = recipe.distillation
    taps = settings.taps if taps is None else taps
    reduction = settings.method.removeprefix("mgd-").removesuffix("+kd")
    example = torch.zeros(1, 3, size, size)
    return MatchingDistiller(
        *networks_of(recipe), taps, reduction, loss_weight=settings.feature_weight, example=example
    )


def tapped(model, taps, images):
    """What flows through the taps, by plain hooks."""
    values = {}
    for tap in taps:
        path, _, side = tap.partition(":")
        module = model.get_submodule(path)
        if side == "input":
            module.register_forward_pre_hook(lambda _, inputs, tap=tap: values.update({tap: inputs[0].clone()}))
        else:
            module.register_forward_hook(lambda _, inputs, output, tap=tap: values.update({tap: output.clone()}))
    with torch.no_grad():
        model.eval()(images)
    return [values[tap] for tap in taps]


def test_all_of_them_are_packaged_with_the_papers_errors():
    texts = {name: text for name, text in packaged().items() if name.startswith(("imagenet_", "cub200_"))}
    assert texts.keys() == {*ALONE, *DISTILLED}
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name, (errors, *row) in {**ALONE, **DISTILLED}.items():
        assert f" {errors}% top-1 / top-5 error in the paper" in texts[name].splitlines()[0]
        assert f"`{name}`" in readme
        if name in DISTILLED:
            columns = [ALONE[alone][0] for alone in row[-2:]]
            assert re.search(rf"^\| `{name}`.* \| {' . '.join([*columns, errors])} \|$", readme, re.MULTILINE)


@pytest.mark.parametrize("name", ALONE)
def test_networks_alone(name):
    _, data, batch, training, student, weights = ALONE[name]
    values = read_recipe(name)
    assert (values["data"]["name"], values["data"]["batch_size"]) == (data, batch)
    assert values["training"] == training  # written there, whatever the defaults are
    assert (values["student"]["name"], values["student"].get("weights")) == (student, weights)
    assert values["distillation"] == {"method": "none"}
    recipe = load_recipe(name)
    assert (recipe.data.image_size, recipe.data.options.augment) == (224, True)
    assert recipe.training.all_epochs == 120 + training["warmup_epochs"]


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_networks(name):
    _, method, every, teacher, student = DISTILLED[name]
    values, alone, guide = read_recipe(name), read_recipe(student), read_recipe(teacher)
    for section in ("data", "student", "training"):
        assert values[section] == alone[section], section
    taps = values["distillation"].pop("taps")
    assert values["distillation"] == {
        "method": method,
        "hysteresis": 0,
        "refresh_every": every,
        "refresh_images": 20_000,
        "weights": {"mgd": "paper", "kd": 1},
        "kd_temperature": 1.5,
    }
    assert len(taps) == (4 if "imagenet" in name else 3)
    assert values["teacher"]["name"] == guide["student"]["name"]
    assert values["teacher"]["weights"] == "IMAGENET1K_V1"
    assert values["teacher"].get("training") == (guide["training"] if "cub200" in name else None)
    recipe = load_recipe(name)
    assert recipe.teacher.training.epochs == (120 if "cub200" in name else 0)
    if "cub200" in name:
        assert recipe.for_teacher().config == load_recipe(teacher, "--data.root", str(recipe.data.root)).config | {
            section: recipe.config[section] for section in ("teacher", "distillation")
        } | {"distillation": {**recipe.config["distillation"], "method": "none"}}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name):
    recipe = load_recipe(name)
    widths, sizes, activated, activation = POSITIONS[name]
    distiller = distiller_of(recipe)
    positions = distiller.positions
    assert [position.student_channels for position in positions] == widths
    assert [position.spatial for position in positions] == [((size, size), (size, size)) for size in sizes]
    stages = [int(56 / size).bit_length() for size in sizes]  # of the teacher, by resolution
    assert [position.teacher_channels for position in positions] == [128 * 2**stage for stage in stages]
    last = {1: 2, 2: 3, 3: 5, 4: 2} if "resnet50_" in name else {1: 2, 2: 7, 3: 35, 4: 2}
    assert [position.margin_norm for position in positions] == [f"layer{k}.{last[k]}.bn3" for k in stages]
    distiller.release()
    images = torch.randn(2, 3, 64, 64)
    first, second = zip(*recipe.distillation.taps, strict=True)
    for model, taps, paths, function in (
        (networks_of(recipe)[0], first, [f"layer{k}" for k in stages], nn.ReLU()),
        (networks_of(recipe)[1], second, activated, activation),
    ):
        after = tapped(model, [f"{path}:output" for path in paths], images)
        for value, later in zip(tapped(model, taps, images), after, strict=True):
            assert value.min() < 0
            torch.testing.assert_close(function(value), later)


def test_positions_that_are_left_out_change_no_weight():
    recipe = load_recipe("cub200_resnet50_mobilenetv2")
    torch.manual_seed(0)
    whole = distiller_of(recipe, [["layer1.2.relu:input", "features.4.conv.1.2:input"], *recipe.distillation.taps], 64)
    torch.manual_seed(0)
    part = distiller_of(recipe, size=64)
    images = torch.randn(4, 3, 64, 64)
    for distiller in (whole, part):
        distiller.refresh([images])
        distiller(images)
    assert [position.student_channels for position in whole.positions] == [144, 192, 384, 960]
    torch.testing.assert_close(part.position_losses, whole.position_losses[1:])
    assert (part.position_losses > 0).all()


def test_mobilenetv1_is_the_papers():
    recipe = load_recipe("imagenet_mobilenetv1")
    model = build_model(recipe.student.name, 1000, **recipe.student.options)
    depthwise = sum(9 * channels + 2 * channels for channels in (32, 64, 128, 128, 256, 256, *[512] * 6, 1024))
    widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    pointwise = sum(before * after + 2 * after for before, after in itertools.pairwise(widths))
    stem, head = 3 * 9 * 32 + 2 * 32, 1024 * 1000 + 1000
    assert sum(parameter.numel() for parameter in model.parameters()) == stem + depthwise + pointwise + head
    activations = {type(module) for module in model.modules() if "Re" in type(module).__name__}
    assert activations == {nn.ReLU}


@pytest.mark.parametrize("name", ["imagenet_resnet50_mobilenetv1", "cub200_mobilenetv2", "cub200_shufflenetv2"])
def test_weights_by_name(name, monkeypatch):
    recipe = load_recipe(name)
    chosen = recipe.student if recipe.student.weights else recipe.teacher
    architecture = chosen.name.partition(":")[2]
    trained = models.get_model(architecture).state_dict()
    asked = []
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda weights, **_: asked.append(weights) or trained)
    model = build_model(chosen.name, 200, chosen.weights, **chosen.options)
    assert asked == [models.get_model_weights(architecture).IMAGENET1K_V1]
    other = {key for key, value in model.state_dict().items() if not torch.equal(value, trained[key])}
    assert {key.partition(".")[0] for key in other} == {list(trained)[-1].partition(".")[0]}  # the head
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 200)


def test_the_moved_stride_keeps_the_weights_shapes():
    moved, plain = (
        networks_of(load_recipe("cub200_resnet50_mobilenetv2", *more))[1]
        for more in ((), ["--student.options={dropout: 0.0}"])
    )
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (moved, plain)]
    assert shapes[0] == shapes[1]
    strides = [
        [model.features[first].conv[1][0].stride[0] for first in (2, 4, 7, 11, 14, 17)] for model in (moved, plain)
    ]
    assert strides == [[2, 2, 1, 2, 2, 1], [2, 2, 2, 1, 2, 1]]


def test_variants_that_the_mobilenetv2_recipe_names():
    text = packaged()["cub200_resnet50_mobilenetv2"]
    assert "--distillation.method mgd-amp+kd" in text
    assert "--student.options '{dropout: 0.0}'" in text
    assert (
        load_recipe("cub200_resnet50_mobilenetv2", "--distillation.method=mgd-amp+kd").distillation.method
        == "mgd-amp+kd"
    )
    distiller = distiller_of(load_recipe("cub200_resnet50_mobilenetv2", "--student.options={dropout: 0.0}"))
    assert [position.student_channels for position in distiller.positions] == [192, 384, 960]
    assert [position.spatial[1] for position in distiller.positions] == [(14, 14), (14, 14), (7, 7)]
    given = load_recipe("cub200_resnet50_mobilenetv2", "--teacher.weights", __file__, "--teacher.training.epochs", "0")
    assert (given.teacher.weights, given.teacher.training.epochs) == (__file__, 0)


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """A function that writes a data set with 3 classes as it is distributed, and returns its folder."""

    def write(name):
        root = tmp_path / name
        root.mkdir()
        if name == "cub200":
            write_cub(root)
            monkeypatch.setattr(cub, "CUB_SIZES", CUB_SIZES)
        else:
            monkeypatch.setattr(imagenet, "ARCHIVE_META", write_imagenet_archives(root))
        return root

    return write


def calibrated(model, path):
    """Save an untrained network with the statistics of its activations: with the initial ones, deep ones overflow."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "cub200_mobilenetv2" else pytest.mark.slow)
        for name in [*ALONE, *DISTILLED]
    ],
)
def test_end_to_end(name, miniature, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    root = miniature(name.partition("_")[0])

    def run(*arguments):
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out

    small = ["--data.image_size=64", "--data.batch_size=4", "--data.workers=0", "--trainer.accelerator=cpu"]
    # Slowly, as images of one colour teach little.
    small += ["--training.epochs=1", "--training.warmup_epochs=0", "--training.lr=1e-4", "--teacher.training.lr=1e-4"]
    recipe = load_recipe(name)
    for role, network in (("teacher", recipe.teacher), ("student", recipe.student)):
        if network.name:
            model = build_model(network.name, 3, **network.options)
            small += [f"--{role}.weights", calibrated(model, tmp_path / f"{role}.pth")]
    trains_teacher = recipe.teacher.training.epochs > 0
    small += ["--teacher.training.epochs=1"] if trains_teacher else []
    out = run("fit", name, "--data.root", root, *small)
    table = out[out.index("top-1 ") :]
    roles = ("teacher", "student") if name in DISTILLED else ("student",)
    assert re.findall(r"│ (teacher|student) ", table) == list(roles)
    folder = Path("runs", name)
    assert (folder / "teacher" / "student.safetensors").is_file() == trains_teacher
    run("export", folder)
    assert re.search(r"student +│ +[\d.]+% │", run("validate", folder / "student.safetensors"))
