"""Runs of networks that want their images otherwise than ImageNet's: each sees the same pixels its own way, everywhere."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from timm.models import _registry
from torch import nn
from torch._subclasses import FakeTensor

from matchdistill import Predictor, cli
from matchdistill.data import ImageData
from matchdistill.models import Preparation
from matchdistill.models.preparation import IMAGENET
from matchdistill.runs.build import build_module
from matchdistill.runs.recipe import Recipe, load_recipe
from matchdistill.runs.train import fit
from records import TINY

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*LeafSpec")]

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5,) * 3, (0.5,) * 3)
USUAL = (IMAGENET.mean, IMAGENET.std)
SIZE = 48


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """Has timm find weights of a tiny network on the disk, which want images as the caller says."""

    def make(name, values, **wants):
        tagged = timm.get_pretrained_cfg(name).architecture + "." + timm.get_pretrained_cfg(name).tag
        torch.manual_seed(0)
        torch.save(timm.create_model(name, num_classes=2).state_dict(), tmp_path / f"{name}.pth")
        mean, std = values
        known = _registry._model_pretrained_cfgs
        source = {"file": str(tmp_path / f"{name}.pth"), "num_classes": 2}
        changed = dataclasses.replace(known[tagged], **source, mean=mean, std=std, **wants)
        monkeypatch.setitem(known, tagged, changed)
        monkeypatch.setitem(known, name, changed)
        return f"timm:{name}"

    return make


@pytest.fixture
def pictures(tmp_path):
    """A folder of noise, brighter in one class than in the other."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 10)):
        for label in range(2):
            folder = tmp_path / "pictures" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = chance.integers(60 * label, 160 + 60 * label, (70, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def of_folder(tmp_path, pictures):
    """The tiny recipe on the folder, of other networks unless the arguments name some."""
    small = {"name": "matchdistill.models:small_resnet"}
    data = {"name": "folder", "root": str(pictures), "batch_size": 4}
    values = {**TINY, "data": data, "teacher": small, "student": small, "training": {"epochs": 1, "lr": 0.02}}
    (tmp_path / "folder.yaml").write_text(yaml.safe_dump(values))

    def make(*arguments, size=SIZE):
        sized = () if size is None else (f"--data.image_size={size}",)
        return load_recipe(tmp_path / "folder.yaml", *sized, *arguments)

    return make


def first_inputs(network):
    """A list that gets every input of the first convolution of a network."""
    seen = []
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


def oracle(path, values, size, share, interpolation="bilinear"):
    """An image file as torchvision prepares it."""
    from torchvision import transforms as t

    by = t.InterpolationMode(interpolation)
    steps = [t.Resize(int(size / share), by), t.CenterCrop(size), t.ToTensor(), t.Normalize(*values)]
    return t.Compose(steps)(Image.open(path))


NETWORKS = (
    "--student.name=timm:test_resnet",
    "--student.weights=pretrained",
    "--teacher.name=timm:test_efficientnet",
    "--teacher.weights=pretrained",
)


@pytest.mark.parametrize(("student", "teacher"), [(CLIP, HALF), (USUAL, HALF), (HALF, USUAL)])
def test_each_sees_its_own_values_of_the_same_pixels(of_folder, pretrained, student, teacher):
    pretrained("test_resnet", student, interpolation="bicubic", crop_pct=0.8)
    pretrained("test_efficientnet", teacher)
    recipe = of_folder(*NETWORKS, "--distillation.method=mgd-amp")
    module = build_module(recipe).eval()
    seen = [first_inputs(network) for network in (module.network(), module.teacher)]
    images, _ = next(iter(recipe.data.val_dataloader()))
    with torch.no_grad():
        module.network()(images)
        module.teacher(images)
    paths = recipe.data.val_set.paths[: len(images)]
    for (found,), values in zip(seen, (student, teacher), strict=True):
        expected = torch.stack([oracle(path, values, SIZE, 0.8, "bicubic") for path in paths])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("kd", None),
        ("mgd-amp", None),
        ("fitnets", None),
        ("kd", "prepare_teacher"),
        ("mgd-rd+kd", "prepare_teacher"),
        ("mgd-amp+kd", "channels_last"),
    ],
)
def test_a_run_feeds_the_teacher_the_students_pixels(of_folder, pretrained, tmp_path, monkeypatch, method, option):
    pretrained("test_resnet", CLIP)
    pretrained("test_efficientnet", HALF)
    seen = {"student": [], "teacher": []}

    def noted(role):
        def note(_, args):
            if not isinstance(args[0], FakeTensor):  # of a trace
                seen[role].append(args[0].detach().clone())

        return note

    real = timm.create_model

    def watched(name, **options):
        network = real(name, **options)
        role = "student" if "resnet" in name else "teacher"
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_pre_hook(noted(role))
        return network

    monkeypatch.setattr(timm, "create_model", watched)
    monkeypatch.setattr("matchdistill.runs.weak.TeacherCheck.found", lambda *_: None)  # the student sees other batches
    # How many images it tries depends on the time that they take.
    monkeypatch.setattr("matchdistill.runs.looking.best_batch", lambda *_: {"batch": 1.0, "latency": 1.0})
    trainer = () if option is None else (f"--trainer.{option}=true",)
    fit(of_folder(*NETWORKS, f"--distillation.method={method}", *trainer), tmp_path / "run", quiet=True)
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(each)[:, None, None] for each in values] for values in (CLIP, HALF)
    )
    of_student = [images for images in seen["student"] if images.abs().sum() > 0 and len(images) == 4]
    of_teacher = [images for images in seen["teacher"] if images.abs().sum() > 0 and len(images) == 4]
    assert len(of_teacher) >= 3
    for found in of_teacher:  # in steps, refreshes and the validation
        expected = [(images * std + mean - own_mean) / own_std for images in of_student]
        assert min((found - each).abs().max() for each in expected) < 1e-5


def test_what_is_settled_is_kept_and_resumed(of_folder, pretrained, tmp_path, capsys):
    pretrained("test_resnet", CLIP, interpolation="bicubic", crop_pct=0.9)
    pretrained("test_vit", HALF)
    networks = [argument.replace("test_efficientnet", "test_vit") for argument in NETWORKS]
    recipe = of_folder(*networks, "--distillation.method=kd", size=None)
    assert Recipe.of(recipe.config, distillation__method="none").config["student"] == recipe.config["student"]
    out = tmp_path / "run"
    fit(recipe, out)
    told = capsys.readouterr().out
    assert "images as timm:test_resnet wants them: mean 0.4815, 0.4578, 0.4082, deviation 0.2686" in told
    assert "the teacher sees the same images by mean 0.5, 0.5, 0.5" in told
    assert "resized to" not in told  # both are made for 160 px
    config = yaml.safe_load((out / "recipe.yaml").read_text())
    assert config["student"]["preparation"] == {
        "mean": list(CLIP[0]),
        "std": list(CLIP[1]),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "size": 160,
    }
    assert config["teacher"]["preparation"]["size"] == 160
    described = json.loads((out / "model.json").read_text())
    assert (described["image_size"], described["preparation"]["mean"]) == (160, list(CLIP[0]))
    before = (out / "metrics.json").read_bytes()
    fit(of_folder(*networks, "--distillation.method=kd", size=None), out, resume=True)
    assert (out / "metrics.json").read_bytes() == before
    given = f"--student.preparation={json.dumps(config['student']['preparation'])}"
    fit(of_folder(*networks, "--distillation.method=kd", given, size=None), out, resume=True)  # the same, given
    other = of_folder(*networks, "--distillation.method=kd", "--student.preparation={mean: [0.1, 0.1, 0.1]}", size=None)
    with pytest.raises(ValueError, match=r"differs in student: resume with the same values"):
        fit(other, out, resume=True)


def test_a_cut_run_ends_as_an_uncut_one(of_folder, pretrained, tmp_path):
    pretrained("test_resnet", CLIP)
    pretrained("test_efficientnet", HALF)
    states = []
    for name in ("whole", "cut"):
        recipe = of_folder(*NETWORKS, "--distillation.method=mgd-amp+kd", "--training.epochs=2")
        if name == "cut":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("matchdistill.runs.train.save_student", _killed)
                with pytest.raises(KeyboardInterrupt):
                    fit(recipe, tmp_path / name, quiet=True)
        fit(recipe, tmp_path / name, resume=name == "cut", quiet=True)
        states.append((tmp_path / name / "student.safetensors").read_bytes())
    assert states[0] == states[1]


def _killed(*_):
    raise KeyboardInterrupt


def test_nothing_is_settled_for_networks_that_are_not_pretrained(tiny, tmp_path):
    out = tmp_path / "run"
    fit(tiny("--distillation.method=kd"), out, quiet=True)
    config = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (config["student"]["preparation"], config["teacher"]["preparation"]) == (None, None)
    assert json.loads((out / "model.json").read_text())["preparation"]["mean"] == list(IMAGENET.mean)
    teacher = build_module(tiny("--distillation.method=kd")).teacher
    assert not any(type(hook).__name__ == "_Converting" for hook in teacher._forward_pre_hooks.values())


@pytest.mark.parametrize("values", [HALF, CLIP, USUAL])
def test_timm_measures_an_exported_student_as_we_do(of_folder, pretrained, pictures, tmp_path, values):
    """Through timm alone: its loader, its transform of the exported config.json, PIL's images."""
    pretrained("test_resnet", values, interpolation="bicubic", crop_pct=0.85, input_size=(3, 64, 64))
    out = tmp_path / "run"
    arguments = ("--distillation.method=none", "--student.weights=pretrained")
    metrics = fit(of_folder("--student.name=timm:test_resnet", *arguments, size=None), out, quiet=True)
    assert cli.main(["export", str(out)]) == 0
    config = json.loads((out / "export" / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["std"], config["input_size"]) == (list(values[0]), list(values[1]), [3, 64, 64])
    model = timm.create_model(f"local-dir:{out}/export", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = ["class0", "class1"]
    paths = sorted((pictures / "val").glob("*/*.png"))
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        logits = model(images)
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    hits = (logits.argmax(1) == labels).float().mean().item()
    assert hits == pytest.approx(metrics.student["top1"])
    data = of_folder("--student.name=timm:test_resnet", *arguments, size=None).data
    ours = torch.cat([images for images, _ in data.val_dataloader()])
    torch.testing.assert_close(ours, images, rtol=0, atol=1e-5)
    for source in (out, out / "export"):
        found = Predictor(source, device="cpu")(paths)
        assert [each.label for each in found] == [names[label] for label in logits.argmax(1)]
        scores = logits.softmax(1).max(1).values
        assert [each.score for each in found] == pytest.approx(scores.tolist(), abs=1e-4)
    card = (out / "export" / "model_card.md").read_text()
    assert f"by mean {list(values[0])} and deviation {list(values[1])}" in card
    assert "resized to 75 px (the shorter side, bicubic), of which the middle 64 px are taken" in card


def test_a_program_says_how_it_wants_images(of_folder, pictures, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "run"
    fit(of_folder("--student.preparation={mean: [0.5, 0.5, 0.5]}", "--distillation.method=none"), out, quiet=True)
    assert cli.main(["export", str(out), "--format=onnx", "--trust"]) == 0
    said = onnxruntime.InferenceSession(out / "export" / "model.onnx").get_modelmeta().custom_metadata_map
    config = json.loads((out / "export" / "config.json").read_text())
    words = ("mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode")
    assert {name: json.loads(said[name]) for name in words} == {name: config[name] for name in words}
    assert config["mean"] == [0.5, 0.5, 0.5]
    paths = sorted((pictures / "val").glob("*/*.png"))
    found, expected = (Predictor(source, trust=True)(paths) for source in (out / "export" / "model.onnx", out))
    assert [each.score for each in found] == pytest.approx([each.score for each in expected], abs=1e-4)


def test_validate_sees_what_the_run_saw(of_folder, pretrained, tmp_path, capsys):
    pretrained("test_resnet", CLIP)
    pretrained("test_efficientnet", HALF)
    out = tmp_path / "run"
    metrics = fit(of_folder(*NETWORKS, "--distillation.method=kd"), out, quiet=True)
    capsys.readouterr()
    assert cli.main(["validate", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"{1 - metrics.student['top1']:.2%}" in told or f"{metrics.student['top1']:.2%}" in told


def test_small_gray_images_get_the_networks_values(tiny, tmp_path):
    given = "--student.preparation={mean: [0.5, 0.4, 0.3], std: [0.2, 0.3, 0.4], crop_pct: 0.5, size: 64}"
    out = tmp_path / "run"
    recipe = tiny(given, "--distillation.method=kd", "--training.epochs=1")
    assert recipe.data.image_size == 16
    fit(recipe, out, quiet=True)
    images, _ = next(iter(recipe.data.val_dataloader()))
    plain = ImageData(val_limit=50, batch_size=20, seed=0)
    usual, _ = next(iter(plain.val_dataloader()))
    pixels = usual * torch.tensor(IMAGENET.std)[:, None, None] + torch.tensor(IMAGENET.mean)[:, None, None]
    expected = torchvision.transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(pixels)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    assert cli.main(["export", str(out), "--trust"]) == 0
    config = json.loads((out / "export" / "config.json").read_text())
    assert (config["mean"], config["crop_pct"], config["gray"]) == ([0.5, 0.4, 0.3], 1.0, True)
    Image.fromarray((pixels[3, 0] * 255).round().byte().numpy()).save(tmp_path / "digit.png")
    predictor = Predictor(out / "export", trust=True)
    seen = predictor.predicting.prepare(Image.open(tmp_path / "digit.png").convert("RGB"))
    torch.testing.assert_close(seen, images[3], rtol=0, atol=1e-5)


def test_a_student_starts_as_the_one_before_it_saw(of_folder, tmp_path):
    wants = "--student.preparation={mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], crop_pct: 0.9}"
    fit(of_folder(wants, "--distillation.method=none"), tmp_path / "run", quiet=True)
    assert cli.main(["export", str(tmp_path / "run"), "--trust"]) == 0
    for weights in ("student.safetensors", "export/model.safetensors"):
        recipe = of_folder(f"--student.weights={tmp_path}/run/{weights}", "--distillation.method=none")
        found = recipe.student.prepared
        assert (found.mean, found.crop_pct, found.size) == ((0.5,) * 3, 0.9, None)
        given = of_folder(f"--student.weights={tmp_path}/run/{weights}", "--student.preparation={crop_pct: 1.0}")
        assert (given.student.prepared.mean, given.student.prepared.crop_pct) == ((0.5,) * 3, 1.0)
    path = tmp_path / "run" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "preparation": {"mean": [1], "std": [1]}}))
    with pytest.raises(ValueError, match=r"model.json.mean is \[1\]: expected three numbers") as info:
        of_folder(f"--student.weights={tmp_path}/run/student.safetensors")
    assert "\n" not in str(info.value)


def test_a_teacher_is_trained_first_as_it_wants_its_images(of_folder, pretrained, tmp_path):
    pretrained("test_resnet", CLIP)
    pretrained("test_vit", HALF)
    networks = [argument.replace("test_efficientnet", "test_vit") for argument in NETWORKS]
    recipe = of_folder(*networks, "--distillation.method=mgd-amp+kd", "--teacher.training.epochs=1")
    alone = recipe.for_teacher()
    assert (alone.data.preparation.mean, alone.data.image_size) == (HALF[0], 160)  # it takes no other size
    assert recipe.data.image_size == SIZE
    fit(recipe, tmp_path / "run", quiet=True)
    described = json.loads((tmp_path / "run" / "teacher" / "model.json").read_text())
    assert (described["preparation"]["mean"], described["image_size"]) == (list(HALF[0]), 160)


def test_a_teacher_without_a_size_of_its_own_is_trained_at_the_students(of_folder, pretrained):
    pretrained("test_resnet", CLIP, input_size=(3, 96, 96))
    student = ("--student.name=timm:test_resnet", "--student.weights=pretrained", "--teacher.training.epochs=1")
    recipe = of_folder(*student, "--distillation.method=kd", size=None)
    alone = recipe.for_teacher()
    assert (recipe.data.image_size, alone.data.image_size) == (96, 96)
    assert dataclasses.replace(alone.student.prepared, size=None) == IMAGENET
    assert dataclasses.replace(recipe.for_teacher().data.preparation, size=None) == IMAGENET


def test_a_teacher_of_one_size(of_folder, pretrained):
    pretrained("test_vit", HALF)
    teacher = ("--teacher.name=timm:test_vit", "--teacher.weights=pretrained", "--distillation.method=mgd-amp+kd")
    module = build_module(of_folder(*teacher))
    seen = first_inputs(module.teacher)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        module.teacher(images)
    mean, std = (torch.tensor(values)[:, None, None] for values in USUAL)
    resized = torchvision.transforms.v2.functional.resize(images, [160, 160], interpolation=3, antialias=True)
    torch.testing.assert_close(seen[0], (resized * std + mean - 0.5) / 0.5, rtol=0, atol=1e-5)


def test_a_teacher_of_another_size_that_nobody_knows(of_folder):
    options = "--teacher.options={dynamic_img_size: false}"
    teacher = ("--teacher.name=timm:test_vit", options, "--distillation.method=mgd-amp", "--teacher.training.epochs=1")
    with pytest.raises(ValueError, match=r"give that as teacher.preparation.size") as info:
        build_module(of_folder(*teacher))
    assert "\n" not in str(info.value)
    module = build_module(of_folder(*teacher, "--teacher.preparation={size: 160}"))
    with torch.no_grad():
        assert module.teacher(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, 2)


def test_prepared_tensors_go_to_both_as_they_are(tiny, pretrained, tmp_path, monkeypatch):
    (tmp_path / "preparedset.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def squares():\n    images = torch.rand(8, 3, 32, 32)\n"
        "    return TensorDataset(images, torch.arange(8) % 2), TensorDataset(images, torch.arange(8) % 2), ['a', 'b']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pretrained("test_resnet", CLIP)
    pretrained("test_efficientnet", HALF)
    data = ("--data.name=preparedset:squares", "--data.prepared=true", "--data.image_size=32")
    limits = ("--data.train_limit=null", "--data.val_limit=null", "--data.batch_size=4")
    recipe = tiny(*NETWORKS, *data, *limits, "--distillation.method=mgd-amp")
    assert (recipe.student.preparation, recipe.teacher.preparation) == (None, None)
    assert dataclasses.replace(recipe.data.preparation, size=None) == IMAGENET


def test_detectors_prepare_images_themselves(small):
    for role in ("student", "teacher"):
        with pytest.raises(ValueError, match=f"{role}.preparation is not for detection") as info:
            small(f"--{role}.preparation={{mean: [0.5, 0.5, 0.5]}}")
        assert "\n" not in str(info.value)


def test_the_gallery_shows_the_pictures(of_folder, pretrained):
    pretrained("test_resnet", CLIP)
    recipe = of_folder("--student.name=timm:test_resnet", "--student.weights=pretrained", "--distillation.method=none")
    module = build_module(recipe).eval()
    images, labels = next(iter(recipe.data.val_dataloader()))
    with torch.no_grad():
        shown, _ = module.gallery((images, labels), recipe.data.class_names)
    mean, std = (torch.tensor(values)[:, None, None] for values in CLIP)
    torch.testing.assert_close(torch.stack(shown), images * std + mean)
    assert torch.stack(shown).min() >= 0
    assert torch.stack(shown).max() <= 1


def test_the_data_module_alone():
    data = ImageData(val_limit=4, batch_size=4)
    data.prepare_as(Preparation(mean=(0.0,) * 3, std=(1.0,) * 3))
    images, _ = next(iter(data.val_dataloader()))
    assert (images.min(), images.max()) == (0, 1)
    with pytest.raises(ValueError, match="call prepare_as before setup"):
        data.prepare_as(Preparation())


def test_taps_says_how_pretrained_networks_see_images(capsys):
    networks = ("timm:test_vit", "torchvision:resnet18")
    assert cli.main(["taps", *networks, "--image_size=160"]) == 0
    told = capsys.readouterr().out
    assert "timm:test_vit, with its pretrained weights, sees images by mean 0.5, 0.5, 0.5" in told
    assert "torchvision:resnet18, with" not in told
