import builtins
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from detectors import DETECTOR, FEW, as_found
from matchdistill.data import DetectionData
from matchdistill.models import detector, small_resnet
from matchdistill.tasks.classification.export import export_classifier
from matchdistill.tasks.detection.export import export_detector
from matchdistill.tasks.exporting import write_checked

onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore::FutureWarning"),
]


@pytest.fixture
def student():
    """A student whose running statistics are not the initial ones."""
    torch.manual_seed(0)
    model = small_resnet(width=2)
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16))
    return model.eval()


IMAGES = torch.zeros(2, 3, 16, 16)


def in_onnx(path, images):
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def in_torch(path, images):
    with torch.no_grad():
        return torch.export.load(path).module()(images)


def test_safetensors_is_the_plain_state_dict(student, tmp_path):
    path = tmp_path / "deep" / "student.safetensors"
    assert export_classifier(student, IMAGES, path, "safetensors", small_resnet(width=2)) == 0
    plain = small_resnet(width=2)
    plain.load_state_dict(load_file(path), strict=True)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), student(images))
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("kind", "run"), [("onnx", in_onnx), ("pt2", in_torch)])
def test_graphs_compute_the_same_for_any_number_of_images(student, tmp_path, kind, run):
    path = tmp_path / f"student.{kind}"
    difference = export_classifier(student.train(), IMAGES, path, kind)
    assert 0 <= difference < 1e-4
    for count in (1, 2, 5, 64):
        images = torch.randn(count, 3, 16, 16)
        with torch.no_grad():
            expected = student(images)
        np.testing.assert_allclose(run(path, images), expected, atol=1e-4)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert not student.training


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 1e-4), (1.0, 1e-4), (2e5, 5e-10)])
def test_differences_are_relative_to_large_outputs(tmp_path, scale, expected):
    values = torch.tensor([scale, -scale / 2], dtype=torch.float64)
    found = write_checked(tmp_path / "f", lambda path: path.write_bytes(b""), lambda _: values + 1e-4, values)
    assert found == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="outputs differ by"):
        write_checked(tmp_path / "g", lambda path: path.write_bytes(b""), lambda _: values * 1.1 + 0.1, values)


def test_onnx_names(student, tmp_path):
    export_classifier(student, IMAGES, tmp_path / "s.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, returned.name) == ("images", "logits")
    assert given.shape[1:] == [3, 16, 16]
    assert isinstance(given.shape[0], str)


class Branching(nn.Module):
    """What it computes depends on values, which no graph can follow."""

    def forward(self, images):
        return images.flatten(1).cumsum(1) if images.sum().item() > 0.5 else images.flatten(1)


class Another(nn.Module):
    """Computes something else once it is exported."""

    def forward(self, images):
        return images.flatten(1) + (1.0 if torch.compiler.is_exporting() else 0.0)


class FixedBatch(nn.Module):
    def forward(self, images):
        return images.reshape(2, -1)[: len(images), :10]


def refusal(model, path, kind, rebuilt=None):
    with pytest.raises(ValueError) as info:
        export_classifier(model, IMAGES, path, kind, rebuilt)
    assert "\n" not in str(info.value)
    assert list(path.parent.iterdir()) == []
    return str(info.value)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_models_that_cannot_be_exported(tmp_path, kind):
    message = refusal(Branching(), tmp_path / f"s.{kind}", kind)
    assert message.startswith(("torch.onnx cannot take the model", "torch.export cannot take the model"))


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_models_that_differ_once_exported(tmp_path, kind):
    message = refusal(Another(), tmp_path / f"s.{kind}", kind)
    assert "the exported model's outputs differ by" in message
    assert f"{tmp_path / f's.{kind}'} was not written" in message


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_models_that_take_one_number_of_images(tmp_path, kind):
    refusal(FixedBatch(), tmp_path / f"s.{kind}", kind)


def test_an_export_that_differs_keeps_the_old_file(tmp_path):
    path = tmp_path / "s.pt2"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="differ"):
        export_classifier(Another(), IMAGES, path, "pt2")
    assert path.read_bytes() == b"old"


def test_weights_that_do_not_fit_the_rebuilt_model(student, tmp_path):
    assert "does not fit" in refusal(student, tmp_path / "s.safetensors", "safetensors", small_resnet(width=3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = small_resnet(width=2)
        self.again = self.network.fc

    def forward(self, images):
        return self.network(images)


@pytest.mark.parametrize("kind", ["safetensors", "onnx", "pt2"])
def test_tied_weights(tmp_path, kind):
    assert export_classifier(Tied(), IMAGES, tmp_path / f"s.{kind}", kind, Tied()) < 1e-4


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_missing_packages(student, tmp_path, monkeypatch, package):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    message = refusal(student, tmp_path / "s.onnx", "onnx")
    assert message == f"ONNX needs {package}: pip install 'matchdistill[onnx]'"


def test_unknown_format(student, tmp_path):
    assert "unknown format 'tflite': expected one of safetensors, onnx, pt2" in refusal(
        student, tmp_path / "s", "tflite"
    )


@pytest.mark.parametrize("name", ["student", "student.bin"])
@pytest.mark.parametrize(("kind", "run"), [("onnx", in_onnx), ("pt2", in_torch)])
def test_other_file_names(student, tmp_path, monkeypatch, name, kind, run):
    monkeypatch.chdir(tmp_path)
    export_classifier(student, IMAGES, Path(name), kind)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        np.testing.assert_allclose(run(Path(name), images), student(images), atol=1e-4)


def decided(architecture):
    """A detector that finds something, with scores that differ."""
    torch.manual_seed(0)
    options = {
        **DETECTOR,
        "architecture": architecture,
        "pyramid_channels": 32,
        "min_size": [160, 256],
        "max_size": 384,
    }
    model = as_found(detector(3, **options, **(FEW if "rcnn" in architecture else {}))).eval()
    head = model.roi_heads.box_predictor if "rcnn" in architecture else model.head.classification_head
    for name, parameter in head.named_parameters():
        if name.endswith("weight") and parameter.ndim > 1 and "bbox" not in name:
            torch.nn.init.kaiming_normal_(parameter)
    return model


@pytest.mark.parametrize(
    "architecture",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("retinanet", "fcos", "faster_rcnn")), "mask_rcnn"],
)
def test_detectors_find_the_same_in_images_of_any_size(architecture, coco, tmp_path):
    model = decided(architecture)
    path = tmp_path / "s.onnx"
    assert 0 <= export_detector(model, path, "onnx", model) < 1e-4
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    session = onnxruntime.InferenceSession(path)
    names = ["boxes", "scores", "labels", *(["masks"] if architecture == "mask_rcnn" else [])]
    assert [output.name for output in session.get_outputs()] == names
    data = DetectionData(coco)
    data.setup()
    images = [image for batch, _ in data.val_dataloader() for image in batch]
    assert len({image.shape for image in images}) == 3
    for image in images:
        with torch.no_grad():
            (expected,) = model([image])
        assert len(expected["scores"]) > 3
        for name, values in zip(names, session.run(None, {"image": image.numpy()}), strict=True):
            np.testing.assert_allclose(values, expected[name], atol=1e-3, err_msg=name)


def test_a_detector_that_finds_something_else_once_exported(tmp_path, monkeypatch):
    path = tmp_path / "s.onnx"
    model = decided("retinanet")
    original = model.postprocess_detections

    def changed(*arguments):
        found = original(*arguments)
        return [{**own, "labels": own["labels"] + int(torch.onnx.is_in_onnx_export())} for own in found]

    monkeypatch.setattr(model, "postprocess_detections", changed)
    with pytest.raises(ValueError, match=r"the exported model's outputs differ by inf .*: .* was not written"):
        export_detector(model, path, "onnx", model)
    assert list(tmp_path.iterdir()) == []
