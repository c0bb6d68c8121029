import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from matchdistill.models import small_resnet
from matchdistill.runs.train import fit
from matchdistill.runs.validate import validate
from matchdistill.tasks.classification.export import ExportedClassifier, export_classifier

# Enough to do better than chance, or every student would measure alike.
LEARNING = (
    "--student.options={width: 4}",
    "--data.train_limit=300",
    "--training.epochs=4",
    "--training.lr=0.1",
    "--distillation.weights.mgd=0.5",
)

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


def accuracies(out):
    metrics = json.loads((out / "metrics.json").read_text())
    return {role: pytest.approx(metrics[role]) for role in ("student", "teacher")}


@pytest.mark.parametrize("method", ["none", "kd", "mgd-amp", "mgd-rd+kd"])
def test_every_file_of_a_run_measures_as_its_metrics(tiny, tmp_path, method):
    out = tmp_path / "run"
    recipe = tiny(f"--distillation.method={method}", *LEARNING)
    assert fit(recipe, out).student["top1"] > 0.2
    save_file(load_file(out / "student.safetensors"), out / "exported.safetensors")
    torch.save(load_file(out / "student.safetensors"), out / "exported.pt")
    expected = accuracies(out)
    for weights in (None, "last.ckpt", "student.safetensors", "exported.safetensors", "exported.pt"):
        measured = validate(tiny(f"--distillation.method={method}", *LEARNING), out, weights and out / weights)
        assert measured["student"] == expected["student"]
        if method != "none":
            assert measured["teacher"] == expected["teacher"]
    torch.manual_seed(7)
    torch.save(small_resnet(width=4).state_dict(), out / "other.pt")
    assert validate(recipe, out, out / "other.pt")["student"] != expected["student"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_an_exported_program_measures_what_it_computes(tiny, tmp_path, kind):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(3)
    other = small_resnet(width=8).eval()  # neither the recipe's student nor that of the run
    recipe = tiny("--distillation.method=kd")
    export_classifier(other, torch.zeros(2, 3, 16, 16), tmp_path / f"student.{kind}", kind)
    images, labels = map(torch.cat, zip(*recipe.data.val_dataloader(), strict=True))
    with torch.no_grad():
        logits = other(images)
    hits = logits.argsort(1, descending=True) == labels[:, None]
    (tmp_path / f"student.{kind}").rename(tmp_path / f"student.{kind.upper()}")
    measured = validate(recipe, tmp_path, tmp_path / f"student.{kind.upper()}", trust=True)
    assert measured["student"] == {
        "top1": pytest.approx(hits[:, 0].float().mean().item()),
        "top5": pytest.approx(hits[:, :5].any(1).float().mean().item()),
    }
    assert measured["teacher"].keys() == {"top1", "top5"}
    # In its own precision and layout of memory, whatever the trainer's.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        computed = ExportedClassifier(tmp_path / f"student.{kind.upper()}")(
            images.to(memory_format=torch.channels_last)
        )
        assert ExportedClassifier(tmp_path / f"student.{kind.upper()}")(images.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(computed, logits)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_programs_that_are_damaged_or_for_other_images(tiny, tmp_path, kind):
    pytest.importorskip("onnxruntime")
    path = tmp_path / f"student.{kind}"
    export_classifier(small_resnet(width=2), torch.zeros(2, 3, 16, 16), path, kind)
    with pytest.raises(ValueError, match=r"the student does not take images of shape \(3, 8, 8\)"):
        validate(tiny("--data.image_size=8"), tmp_path, path, trust=True)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"student.{kind}: not an exported model, or a damaged one \(") as info:
        validate(tiny(), tmp_path, path, trust=True)
    assert "\n" not in str(info.value)


def test_a_program_without_its_package(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"ONNX needs onnxruntime: pip install 'matchdistill\[onnx\]'"):
        validate(tiny(), tmp_path, tmp_path / "student.onnx")


def test_a_teacher_that_was_trained_in_the_run(tiny, tmp_path):
    arguments = ("--teacher.weights=null", "--teacher.training.epochs=5", "--teacher.train_limit=300")
    arguments = (*arguments, "--teacher.options={width: 8}", "--distillation.method=kd")
    out = tmp_path / "run"
    assert fit(tiny(*arguments), out).teacher["top1"] > 0.2
    assert validate(tiny(*arguments), out) == accuracies(out)
    metrics = json.loads((out / "teacher" / "metrics.json").read_text())
    alone = validate(tiny(*arguments).for_teacher(), out / "teacher")
    assert alone == {"student": pytest.approx(metrics["student"]), "teacher": {}}
    (out / "teacher" / "student.safetensors").unlink()
    assert validate(tiny(*arguments), out)["teacher"] == {}


def test_other_images(tiny, tmp_path):
    fit(tiny("--distillation.method=none"), tmp_path / "run")
    first = validate(tiny("--distillation.method=none", "--data.val_limit=10"), tmp_path / "run")
    assert first["student"]["top1"] * 10 == pytest.approx(round(first["student"]["top1"] * 10))


def test_nothing_is_written(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    fit(tiny(), out, quiet=True)
    before = sorted(path for path in tmp_path.rglob("*"))
    capsys.readouterr()
    validate(tiny(), out)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert capsys.readouterr() == ("", "")


def test_weights_that_are_missing_or_do_not_fit(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"student.safetensors: there is no such file"):
        validate(tiny(), tmp_path)
    torch.save(small_resnet(width=3).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"wide.pt does not fit SmallResNet"):
        validate(tiny(), tmp_path, tmp_path / "wide.pt")
    torch.save(small_resnet(num_classes=7, width=2).state_dict(), tmp_path / "seven.pt")
    with pytest.raises(ValueError, match="these weights are for 7 classes, the model has 10"):
        validate(tiny(), tmp_path, tmp_path / "seven.pt")


def test_a_student_that_computes_nonsense_is_measured_all_the_same(tiny, tmp_path):
    model = small_resnet(width=2)
    torch.nn.init.constant_(model.layer3.bn2.bias, 1e10)
    torch.nn.init.constant_(model.fc.weight, 3e38)
    with torch.no_grad():
        model.fc.weight[:, ::2] *= -1  # infinity less infinity
    assert model.eval()(torch.rand(2, 3, 16, 16)).isnan().all()
    torch.save(model.state_dict(), tmp_path / "huge.pt")
    assert 0 <= validate(tiny(), tmp_path, tmp_path / "huge.pt")["student"]["top1"] <= 1
