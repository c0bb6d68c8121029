"""What a user meets in a terminal of 80 columns: help, versions, tables."""

from importlib import metadata

import pytest

from matchdistill import cli
from matchdistill.commands.options import print_metrics
from matchdistill.runs.recipe import Recipe, plain_config, recipe_parser, resolve_recipe
from matchdistill.tasks import TASKS


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The width of a terminal where none says its own."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.mark.parametrize(
    "asked", [["help"], ["--help"], ["help", "fit"], ["help", "recipes"], ["recipes", "show", "--help"]]
)
def test_help_is_had_in_every_way(asked, capsys):
    assert cli.main(asked) == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: matchdistill")
    assert [line for line in told.splitlines() if len(line) > 80] == []


def test_the_version(capsys):
    told = [cli.main([asked]) == 0 and capsys.readouterr().out for asked in ("version", "--version")]
    assert told == [f"{metadata.version('matchdistill')}\n"] * 2
    assert cli.main(["verison"]) == 2
    assert "unknown command 'verison'; did you mean 'version'?" in capsys.readouterr().err


def test_options_with_a_mistake_name_the_nearest(capsys):
    for option, value, told in (
        ("--training.lrr", "0.1", "did you mean '--training.lr'?"),
        ("--training.lr", "abc", "training.lr is 'abc': expected a number or null"),
        ("--allow-weak-techer", "", "did you mean '--allow-weak-teacher'"),
    ):
        assert cli.main(["fit", "quickstart", *([option, value] if value else [option])]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "network"), [("classification", "timm:"), ("detection", "retinanet"), ("segmentation", "lraspp")]
)
def test_the_example_of_a_missing_name_fits_the_task(task, network):
    values = {"task": task, "data": {"name": "digits"} if task == "classification" else {"root": "nowhere"}}
    with pytest.raises(ValueError, match=rf"student\.name is missing.*{network}"):
        Recipe.of(plain_config(resolve_recipe(values, recipe_parser(task=task))))


def test_a_table_of_networks_fits_a_terminal_and_leaves_paths_whole(capsys):
    metrics = TASKS["detection"].metrics
    found = {metric.name: 0.12345 for metric in metrics}
    path = "/a/long/path/" + "folder/" * 20
    print_metrics(metrics, {"teacher": found, "student": found}, path, {"teacher": 12345678, "student": 1234567})
    told = capsys.readouterr().out.splitlines()
    assert told[0] == path
    assert len(told) > len(metrics)  # each has a row
    assert [line for line in told[1:] if len(line) > 80] == []
