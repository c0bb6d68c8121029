"""Models by name. Nothing here touches the network: what would be downloaded is replaced."""

import sys
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from torch import nn

from matchdistill.models import build_model, weights_file
from matchdistill.models.build import SOURCES, Source, take_head
from matchdistill.models.trust import check_trusted


def one_line(info):
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Write a module into the current folder, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    def write(name, source):
        tmp_path.joinpath(f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


@pytest.mark.parametrize("name", ["torchvision:shufflenet_v2_x0_5", "timm:mobilenetv1_100"])
@pytest.mark.parametrize("num_classes", [None, 7])
def test_library_models(name, num_classes):
    model = build_model(name, num_classes).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, num_classes or 1000)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:fcn_resnet50",
        "torchvision:lraspp_mobilenet_v3_large",
        "torchvision:ssdlite320_mobilenet_v3_large",
        "torchvision.models.segmentation:deeplabv3_mobilenet_v3_large",
    ],
)
def test_nothing_is_downloaded_for_a_backbone_unless_it_is_asked_for(monkeypatch, name):
    wanted = []

    def download(url, *args, **kwargs):
        wanted.append(url)
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    assert isinstance(build_model(name, 4), nn.Module)
    assert wanted == []
    with pytest.raises(ValueError, match="no network"):
        build_model(name, weights_backbone="DEFAULT")
    assert len(wanted) == 1


def test_a_library_whose_encoders_come_with_weights(own_module):
    own_module(
        "unets",
        "from torch import nn\ndef unet(encoder_weights='imagenet'): return nn.Linear(2, 2 if encoder_weights else 3)",
    )
    assert build_model("unets:unet").out_features == 3
    assert build_model("unets:unet", encoder_weights="imagenet").out_features == 2


def test_options_reach_the_builder():
    assert build_model("torchvision:mobilenet_v2", width_mult=0.25).features[0][0].out_channels == 8
    assert build_model("timm:resnet18", in_chans=1).conv1.in_channels == 1
    assert build_model("matchdistill.models:small_resnet", width=8).fc.in_features == 32


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("torchvision:resnt50", ["no such model", "'resnet50'"]),
        ("timm:mobilenetv1_10", ["no such model", "'mobilenetv1_100'"]),
        ("timm:hf-hub:someone/model", ["no such model"]),
        ("resnet50", ["'torchvision:NAME'", "'torchvision:resnet50'", "'timm:resnet50'"]),
        ("torchvision:", ["'torchvision:NAME'"]),
        ("torchvison:resnet50", ["'torchvison'", "'torchvision'"]),
        ("matchdistill.modls:small_resnet", ["'matchdistill.modls'", "'matchdistill.models'"]),
        ("matchdistill.models:smal_resnet", ["'smal_resnet'", "'small_resnet'"]),
        ("matchdistill.models:__name__", ["has no function '__name__'"]),
        ("timm:resnet18.a9_in1k", ["'a9_in1k'", "a1_in1k"]),
    ],
)
def test_unknown_names(name, parts):
    with pytest.raises(ValueError) as info:
        build_model(name)
    assert all(part in one_line(info) for part in parts), str(info.value)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "matchdistill.models:small_resnet"])
def test_unknown_option(name):
    with pytest.raises(ValueError, match="unexpected keyword argument 'widht'") as info:
        build_model(name, widht=8)
    assert name in one_line(info)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("error", [KeyError("depth"), OSError("no route"), RuntimeError("size\nmore")])
def test_library_that_fails_to_build(monkeypatch, library, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("torchvision.models.get_model", fail)
    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(ValueError, match=f"'{library}:resnet18' cannot be built, it fails with") as info:
        build_model(f"{library}:resnet18")
    assert type(error).__name__ in one_line(info)


def test_own_function_in_the_current_folder(own_module):
    own_module(
        "my_nets",
        "from torch import nn\ndef build(num_classes=3, bias=True):\n    return nn.Linear(2, num_classes, bias)\n",
    )
    model = build_model("my_nets:build", num_classes=5, bias=False)
    assert model.out_features == 5
    assert model.bias is None


def test_own_function_is_given_num_classes_only_if_it_takes_it(own_module):
    own_module(
        "my_heads",
        "from torch import nn\ndef fixed():\n    return nn.Linear(2, 3)\n"
        "def open(**options):\n    return nn.Linear(2, options['num_classes'])\n",
    )
    assert build_model("my_heads:fixed", num_classes=5).out_features == 3
    assert build_model("my_heads:open", num_classes=5).out_features == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import not_there_at_all",
            "importing 'broken' failed with ModuleNotFoundError: No module named 'not_there_at_all'",
        ),
        ("1 / 0", "importing 'broken' failed with ZeroDivisionError: division by zero"),
        ("def build(:", "importing 'broken' failed with SyntaxError"),
        (
            "def build():\n    return {}['depth']",
            "model 'broken:build' cannot be built, it fails with KeyError: 'depth'",
        ),
        ("def build():\n    return 1 + ''", "cannot be built, it fails with TypeError: unsupported operand"),
        (
            "from urllib.error import URLError\ndef build():\n    raise URLError('no route')",
            "cannot be built, it fails with URLError: <urlopen error no route>: check the network connection",
        ),
        ("def build():\n    return 3", "expected an nn.Module, the function returned a int"),
    ],
)
def test_own_module_that_is_broken(own_module, source, message):
    own_module("broken", source)
    with pytest.raises(ValueError) as info:
        build_model("broken:build")
    assert message in one_line(info)


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "squeezenet1_1"])
def test_head_is_exchanged(name):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model, fresh = (torchvision.models.get_model(name, num_classes=count, **options) for count in (11, 4))
    body = {key: value.clone() for key, value in model.state_dict().items()}
    take_head(model, fresh)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, body[key])}
    assert changed
    assert all(key.startswith(("fc.", "classifier.1.")) for key in changed)
    assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 4)


@pytest.mark.parametrize("weights", ["DEFAULT", "pretrained", "true", "IMAGENET1K_V1"])
@pytest.mark.parametrize("num_classes", [None, 1000, 6])
def test_torchvision_pretrained(monkeypatch, weights, num_classes):
    source = torchvision.models.shufflenet_v2_x0_5().state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: source)
    state = build_model("torchvision:shufflenet_v2_x0_5", num_classes, weights).state_dict()
    assert state["fc.weight"].shape[0] == (num_classes or 1000)
    for key, value in state.items():
        assert torch.equal(value, source[key]) or (num_classes == 6 and key.startswith("fc."))


@pytest.mark.parametrize("weights", ["a1_in1k", "pretrained"])
@pytest.mark.parametrize("num_classes", [None, 6])
def test_timm_pretrained(tmp_path, weights, num_classes):
    source = timm.create_model("resnet18").state_dict()
    torch.save(source, tmp_path / "source.pth")
    overlay = {"file": str(tmp_path / "source.pth")}
    state = build_model("timm:resnet18", num_classes, weights, pretrained_cfg_overlay=overlay).state_dict()
    assert state["fc.weight"].shape[0] == (num_classes or 1000)
    for key, value in state.items():
        assert torch.equal(value, source[key]) or (num_classes == 6 and key.startswith("fc."))


@pytest.mark.parametrize(
    ("name", "weights", "part"),
    [
        ("torchvision:resnet50", "IMAGENET1K_V9", "IMAGENET1K_V2"),
        ("timm:resnet18", "a9_in1k", "a1_in1k"),
        ("matchdistill.models:small_resnet", "IMAGENET1K_V1", "expected weights from a file"),
    ],
)
def test_unknown_pretrained_name(name, weights, part):
    with pytest.raises(ValueError) as info:
        build_model(name, weights=weights)
    assert weights in one_line(info)
    assert part in one_line(info)


def test_download_that_fails(monkeypatch):
    def offline(*_, **__):
        raise URLError("Temporary failure in name resolution\nsecond line")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", offline)
    monkeypatch.setattr("timm.create_model", offline)
    for name in ("torchvision:resnet18", "timm:resnet18"):
        with pytest.raises(ValueError, match="network connection, or give weights=FILE") as info:
            build_model(name, weights="pretrained")
        assert "name resolution" in one_line(info)


@pytest.mark.parametrize(
    "weights", ["missing.pt", "runs/missing", "missing.safetensors", r"C:\w\missing.pth", "torch.nn:x.pt"]
)
def test_weights_that_look_like_a_file(weights):
    with pytest.raises(ValueError) as info:
        build_model("matchdistill.models:small_resnet", weights=weights, width=4)
    assert one_line(info) == f"weights {weights}: there is no such file"


def test_folders_in_the_place_of_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pretrained", "run.pt"):
        (tmp_path / name).mkdir()
    for weights in ("./pretrained", str(tmp_path / "pretrained"), "run.pt", "matchdistill:models"):
        with pytest.raises(ValueError) as info:
            build_model("matchdistill.models:small_resnet", weights=weights, width=4)
        said = "it is a folder without a finished run: finish the run with --resume, or name a file of weights"
        assert one_line(info) == f"weights {weights}: {said}"
    assert weights_file("pretrained") is None


def test_weights_from_a_file(tmp_path):
    source = build_model("matchdistill.models:small_resnet", num_classes=3, width=4)
    torch.save(source.state_dict(), tmp_path / "best")  # no suffix, but it exists
    model = build_model("matchdistill.models:small_resnet", num_classes=3, weights=tmp_path / "best", width=4)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="weights are for 3 classes, the model has 10") as info:
        build_model("matchdistill.models:small_resnet", weights=tmp_path / "best", width=4)
    assert "num_classes=3" in one_line(info)
    assert isinstance(model, nn.Module)


def test_weights_of_an_installed_package(tmp_path, monkeypatch):
    source = build_model("matchdistill.models:small_resnet", num_classes=3, width=4)
    (tmp_path / "some_weights" / "models").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('it is only looked for')")
    torch.save(source.state_dict(), tmp_path / "some_weights" / "models" / "best.pth")
    monkeypatch.syspath_prepend(tmp_path)
    name = "some_weights:models/best.pth"
    model = build_model("matchdistill.models:small_resnet", num_classes=3, weights=name, width=4)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    (tmp_path / "around").mkdir()
    (tmp_path / "some_weights").rename(tmp_path / "around" / "some_weights")
    name = f"around.{name}"
    model = build_model("matchdistill.models:small_resnet", 7, name, fresh_head=True, width=4)
    assert torch.equal(model.stem[0].weight, source.stem[0].weight)
    assert model.fc.out_features == 7
    for wrong, part in (
        ("around.some_weights:none.pth", "there is no such file"),
        ("no_weights:a.pth", "no package 'no_weights': install it"),
        ("no_weights.large:a.pth", "no package 'no_weights.large': install it"),
        ("around.some_weights.large:a.pth", "no package 'around.some_weights.large': install it"),
        ("__main__:a.pth", "no package '__main__'"),
    ):
        with pytest.raises(ValueError, match=part) as info:
            build_model("matchdistill.models:small_resnet", weights=wrong, width=4)
        assert wrong in one_line(info)


def test_a_method_of_a_class_builds_a_model(tmp_path, monkeypatch):
    (tmp_path / "method_of_class.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    @classmethod\n"
        "    def of(cls, width, **options):\n"
        "        return cls(width, options['num_classes'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build_model("method_of_class:Net.of", num_classes=3, width=5)
    assert (model.in_features, model.out_features) == (5, 3)
    with pytest.raises(ValueError, match=r"no function 'Net.off'"):
        build_model("method_of_class:Net.off")


def test_a_source_is_added_by_one_function_and_one_line(tmp_path, monkeypatch):
    def linear(name, weights, options):
        if weights not in (None, "zeros"):
            raise ValueError(f"model 'toy:{name}' has no weights {weights!r}")
        model = nn.Linear(int(name.removeprefix("linear")), options["num_classes"], bias=options.get("bias", True))
        return model if weights is None else model.requires_grad_(False)

    monkeypatch.setitem(SOURCES, "toy", Source(lambda: ["linear3", "linear5"], linear, reads=("file",)))
    model = build_model("toy:linear5", 2, "zeros", bias=False)
    assert (model.weight.shape, model.bias, model.weight.requires_grad) == ((2, 5), None, False)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "toy.pt")
    assert build_model("toy:linear3", 2, tmp_path / "toy.pt").weight.requires_grad
    with pytest.raises(ValueError, match="has no weights 'ones'"):
        build_model("toy:linear5", 2, "ones")
    with pytest.raises(ValueError, match=r"'toy:NAME' or .*; did you mean 'toy:linear5'\?"):
        build_model("linear5")
    with pytest.raises(ValueError, match=r"no library or module 'toys'; did you mean 'toy'"):
        build_model("toys:linear5")
    check_trusted(tmp_path, ("toy:linear3", {"bias": False}))
    with pytest.raises(
        ValueError, match=r"the option file, which makes toy read other files.*torchvision, timm, .*toy and"
    ):
        check_trusted(tmp_path, ("toy:linear3", {"file": "x"}))
