"""The package stays readable: sizes of files, functions and constructors; only the folder of a task knows its name."""

import ast
import re
from pathlib import Path

import pytest

import matchdistill
from matchdistill.tasks import TASKS

PACKAGE = Path(matchdistill.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 400, 60, 8


def name_of(path):
    return str(path.relative_to(PACKAGE))


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path):
    assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES
    for function in functions(path):
        assert function.end_lineno - function.lineno < MOST_LINES_OF_A_FUNCTION, function.name
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        if function.name == "__init__":
            assert len(parameters) - 1 <= MOST_PARAMETERS, f"line {function.lineno}"


def test_no_two_files_of_tests_have_one_name():
    # pytest imports a file by its name without its folder: two of one name stop a run over all of them.
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


# Names of tasks that stand for other things too: a loss, a part of torchvision's networks; a key of COCO's files.
WORDS = {"features", "segmentation"}


def decisive(path):
    """The text of every string that a file compares with, matches or subscripts by."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    deciding = [
        part
        for node in nodes
        for part in (
            [node]
            if isinstance(node, ast.Compare | ast.MatchValue)
            else [node.slice]
            if isinstance(node, ast.Subscript) and "TASKS" in ast.unparse(node.value)
            else []
        )
    ]
    return [inside.value for part in deciding for inside in ast.walk(part) if isinstance(inside, ast.Constant)]


def strings(path):
    """The text of every string of a file that is no docstring."""
    tree = ast.parse(path.read_text("utf-8"))
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said
    ]


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.parent != PACKAGE / "tasks"], ids=name_of)
def test_no_file_outside_of_its_folder_names_a_task(path):
    assert [text for text in strings(path) if text in TASKS.keys() - WORDS] == []
    assert [text for text in decisive(path) if text in WORDS] == []


def test_a_word_that_decides_is_found(tmp_path):
    (tmp_path / "one.py").write_text("a = {'features': 1}\nif task == 'features' or TASKS['features']:\n    pass\n")
    assert decisive(tmp_path / "one.py") == ["features", "features"]


def test_the_folders_of_tasks():
    folders = {path.name for path in (PACKAGE / "tasks").iterdir() if (path / "task.py").is_file()}
    assert folders == set(TASKS)


def test_names_of_metrics_are_known_to_their_tasks_alone():
    names = {metric.name for task in TASKS.values() for metric in task.metrics}
    outside = [path for path in FILES if PACKAGE / "tasks" not in path.parents and "integrations" not in path.parts]
    found = {name_of(path): sorted(names & set(strings(path))) for path in outside}
    assert {path: used for path, used in found.items() if used} == {}
    assert not any(re.search(r"startswith\(.top", path.read_text("utf-8")) for path in outside)
