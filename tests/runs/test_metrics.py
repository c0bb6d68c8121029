import json

import pytest
import yaml

from matchdistill import cli
from matchdistill.runs.metrics import SCHEMA, comparing, read_metrics, write_metrics
from matchdistill.runs.train import fit
from matchdistill.tasks import TASKS
from records import run_of


def test_what_is_written_is_read(tmp_path):
    metrics = run_of("kd", 3, {"top1": 0.25, "top5": 1.0}, {"top1": 0.5})
    assert read_metrics(tmp_path) is None
    write_metrics(tmp_path, metrics)
    assert read_metrics(tmp_path) == metrics
    assert json.loads((tmp_path / "metrics.json").read_text())["schema"] == SCHEMA
    assert [metric.label for metric in metrics.measured] == ["top-1", "top-5"]
    assert (metrics.of("teacher"), comparing([metrics]).name, comparing([])) == ({"top1": 0.5}, "top1", None)


def test_what_is_measured_comes_in_the_order_of_the_task():
    metrics = run_of(student={"top5": 1.0, "top1": 0.25, "own": 3.0})
    assert [metric.name for metric in metrics.measured] == ["top1", "top5"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, r"metrics\.json is of schema 1, this version of matchdistill reads schema 2: look at it with"),
        ({"schema": None}, r"metrics\.json is without a schema, this version"),
        (
            {"task": "cooking"},
            r"is of the task 'cooking', which is not known here: expected classification, multilabel, detection",
        ),
        ({"student": {}}, r"is damaged: it lacks metrics of the student"),
        ({"student": {"top5": 1.0}}, r"is damaged: it lacks metrics of the student"),
        ({"teacher": {"top1": 1.0}, "parameters": {"student": 1, "teacher": None}}, r"or parameters of the teacher"),
        ({"seconds": "long"}, r"seconds is missing or has an unexpected type"),
    ],
)
def test_files_of_another_version_and_damaged_ones(tmp_path, change, message):
    (tmp_path / "metrics.json").write_text(json.dumps({**run_of().plain(), **change}))
    with pytest.raises(ValueError, match=message) as info:
        read_metrics(tmp_path)
    assert "\n" not in str(info.value)


def test_a_task_that_measures_nothing_lacks_nothing(tmp_path, monkeypatch):
    task = TASKS["classification"]
    monkeypatch.setattr(type(task), "metrics", ())
    write_metrics(tmp_path, run_of(student={}))
    assert comparing([read_metrics(tmp_path)]) is None


@pytest.mark.parametrize("command", ["fit", "validate", "export", "report"])
def test_the_folder_of_another_version_is_one_sentence_to_every_command(tiny, tiny_file, tmp_path, capsys, command):
    """Its recipe, whose settings may have other names now, is not what the user is told of."""
    out = tmp_path / "run"
    fit(tiny("--training.epochs=1"), out, quiet=True)
    (out / "metrics.json").write_text(json.dumps({**read_metrics(out).plain(), "schema": 1}))
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["distillation"]["loss_weight"] = recipe["distillation"].pop("weights")["mgd"]
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["fit", str(tiny_file), f"--out={out}", "--resume"] if command == "fit" else [command, str(out)]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert "metrics.json is of schema 1, this version of matchdistill reads schema 2: look at it with" in said
    assert "loss_weight" not in said
    assert said.count("\n") == 1
