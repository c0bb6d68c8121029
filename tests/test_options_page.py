"""The page of all options has each of them, and the tables beside the settings name none that is not there."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from matchdistill.cli import COMMANDS
from matchdistill.models import Preparation
from matchdistill.runs.recipe import SECTIONS, recipe_parser
from matchdistill.runs.settings import Machine, Teacher
from matchdistill.runs.store import INDIFFERENT
from matchdistill.tasks import TASKS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def hooks():
    sys.path.insert(0, str(DOCS))
    pytest.importorskip("mkdocs")
    import hooks

    yield hooks
    sys.path.remove(str(DOCS))


@pytest.mark.parametrize("task", TASKS)
def test_every_setting_has_a_row_with_its_default_and_source(hooks, task):
    page = hooks.option_tables()
    rows = {
        cells[0]: cells[1:]
        for line in page.splitlines()
        if line.startswith("| `") and (cells := re.split(r"(?<!\\) ?(?<!\\)\| ", line.strip("| ")))
    }
    for action in recipe_parser(task=task)._actions:
        name = action.dest
        if "." not in name or name.startswith("teacher.training."):
            continue
        assert f"`{name}`" in rows, name
        what, default, source = rows[f"`{name}`"]
        assert what, name
        assert source, name
        assert default or name == "teacher.training", name
    for field in dataclasses.fields(Preparation):
        assert all(rows[f"`preparation.{field.name}`"]), field.name
    assert rows["`preparation.crop_pct`"][1] == "`0.875`, or as its weights want it"
    assert rows["`training.mixup`"][1:] == ["`0.0`", "timm"]
    assert rows["`trainer.precision`"][1:] == ["`32-true`", "Lightning"]
    assert rows["`data.random_erasing`"][2] == "torchvision"
    assert rows["`distillation.hysteresis`"][2] == "matchdistill"


def test_the_page_of_commands_has_each_option_once(hooks):
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", hooks.all_commands(), re.M | re.S))
    assert list(parts) == list(COMMANDS)
    page = (DOCS / "reference/command-line.md").read_text()
    usual = re.findall(r"^\| `--([\w.]+)", page, re.M)
    assert len(usual) == len(set(usual)) == 10
    assert set(usual) - {"distillation.weights.mgd"} <= {action.dest for action in recipe_parser()._actions}
    for text in parts.values():
        options = re.findall(r"^\| `--([\w.]+)`", text, re.M)
        assert len(options) == len(set(options))
        assert not [name for name in options if "." in name and name.partition(".")[0] in SECTIONS]  # on their own page
    assert {"resume", "out", "open"} <= set(re.findall(r"^\| `--(\w+)`", parts["fit"], re.M))
    assert "`RUN`" in parts["predict"]
    assert "--print_shtab" not in str(parts)


def test_what_is_said_of_settings_is_said_of_ones_that_there_are(hooks):
    kinds = [*hooks.SECTION_TYPES.values(), *(task.data.options_type for task in TASKS.values())]
    for kind in kinds:
        fields = {field.name for field in dataclasses.fields(kind)}
        named = [name for names in getattr(kind, "sources", {}).values() for name in names]
        assert set(named) <= fields, kind
        assert len(set(named)) == len(named), kind
        assert getattr(kind, "indifferent", set()) <= fields, kind
    assert {*hooks.SECTION_TYPES, "data", "task", "seed", "objective"} == set(SECTIONS)


def test_a_place_of_data_may_change_on_resume():
    for task in TASKS.values():
        options = task.data.options_type
        places = {field.name for field in dataclasses.fields(options) if "Path" in str(field.type)}
        assert places <= options.indifferent, task.name
    assert {"compare", "data.root", "data.workers", "data.val_annotations", "trainer.loggers"} <= INDIFFERENT
    assert Teacher.indifferent == {"allow_weak", "cache_folder", "cache_gib"}
    assert Machine.indifferent == {"loggers", "log_every"}
