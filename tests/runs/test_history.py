import json

import pytest
import torch
from PIL import Image
from test_train import folder_arguments, write_images
from test_train_resume import checkpoint, killed

from matchdistill.report.runs import Run
from matchdistill.runs.history import HISTORY
from matchdistill.runs.train import fit

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")

EPOCHS = ("--training.epochs=5", "--training.validate_every=2", "--distillation.method=mgd-amp")


def without_seconds(epochs):
    return [{name: value for name, value in each.items() if "seconds" not in name} for each in epochs]


def test_a_resumed_run_knows_all_of_its_epochs(tiny, tmp_path):
    """Its logs do not: of a killed process the last lines are lost."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    fit(tiny(*EPOCHS), whole, quiet=True)
    killed("step", 8, tiny(*EPOCHS), out)
    assert len(checkpoint(out)[HISTORY]["epochs"]) == 2
    killed("step", 5, tiny(*EPOCHS), out, resume=True)
    before = checkpoint(out)[HISTORY]
    assert [each["epoch"] for each in before["epochs"]] == [0, 1, 2]
    metrics = fit(tiny(*EPOCHS), out, resume=True, quiet=True)

    found, expected = (json.loads((each / "evidence/epochs.json").read_text())["epochs"] for each in (out, whole))
    assert without_seconds(found) == without_seconds(expected)
    assert [each["epoch"] for each in found] == [0, 1, 2, 3, 4]
    assert [each["step"] for each in found] == [3, 6, 9, 12, 15]
    assert ["val/top1" in each for each in found] == [False, True, False, True, True]
    assert found[-1]["val/top1"] == pytest.approx(metrics.student["top1"])
    assert found == checkpoint(out)[HISTORY]["epochs"]
    curves = Run.of(out).curves
    assert [point.value for point in curves["train/loss"]] == [each["train/loss"] for each in found]
    assert len(curves["seconds/epoch"]) == 5
    # The seconds of the processes add up, but for what they did after their last checkpoints.
    assert metrics.seconds >= round(before["seconds"], 1)
    assert metrics.seconds >= round(sum(each["seconds/epoch"] for each in found), 1)
    environment = json.loads((out / "evidence/environment.json").read_text())
    assert len(environment["resumed"]) == 2
    assert environment["begun"] <= environment["resumed"][0]


def test_seconds_are_the_teachers_too_whenever_it_was_trained(tiny, tmp_path):
    out = tmp_path / "run"
    arguments = ("--teacher.weights=null", "--teacher.training.epochs=3", "--teacher.train_limit=60")
    arguments += ("--distillation.method=kd",)
    killed("step", 3 * 3 + 2, tiny(*arguments), out)
    path = out / "teacher" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1000.0}))
    assert 1000 < fit(tiny(*arguments), out, resume=True, quiet=True).seconds < 1200


def test_a_checkpoint_of_an_older_version(tiny, tmp_path):
    out = tmp_path / "run"
    killed("saved", 2, tiny(*EPOCHS), out)
    content = checkpoint(out)
    del content[HISTORY]
    torch.save(content, out / "last.ckpt")
    fit(tiny(*EPOCHS), out, resume=True, quiet=True)
    epochs = json.loads((out / "evidence/epochs.json").read_text())["epochs"]
    assert [each["epoch"] for each in epochs] == [2, 3, 4]


@pytest.mark.filterwarnings("ignore:image .* cannot be read")
def test_corrupt_images_of_all_processes_of_a_run(tiny, tmp_path):
    root = write_images(tmp_path / "insects")
    damaged = [root / "train" / "wasp" / "3.png", root / "val" / "bee" / "1.png"]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:50])
    arguments = (*folder_arguments(root), "--data.skip_corrupt=true", "--training.epochs=2")
    recipe = tiny(*arguments, "--distillation.method=none")
    killed("saved", 1, recipe, tmp_path / "run")
    # Repaired, on another disk: what the run began with it goes on with.
    elsewhere = tmp_path / "elsewhere"
    root.rename(elsewhere)
    for path in damaged:
        Image.new("RGB", (20, 20)).save(elsewhere / path.relative_to(root))
    moved = (*folder_arguments(elsewhere), *arguments[len(folder_arguments(root)) :])
    metrics = fit(tiny(*moved, "--distillation.method=none"), tmp_path / "run", resume=True, quiet=True)
    assert metrics.corrupt_images == sorted(str(elsewhere / path.relative_to(root)) for path in damaged)
