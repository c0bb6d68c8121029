"""Runs that start from the student of another run, by its folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import folder_arguments, write_images

from matchdistill.models.weights import STUDENTS
from matchdistill.runs.best import BEST
from matchdistill.runs.build import build_module
from matchdistill.runs.store import WEIGHTS
from matchdistill.runs.train import fit

ALONE = ("--distillation.method=none", "--training.epochs=1")


@pytest.fixture
def other(tiny, tmp_path):
    """A finished run of ten classes."""
    fit(tiny(*ALONE, "--training.keep_best=true"), tmp_path / "other", quiet=True)
    state = load_file(tmp_path / "other" / BEST)
    save_file({name: value + 1 for name, value in state.items()}, tmp_path / "other" / BEST)  # not the last one
    return tmp_path / "other"


def students(*recipes):
    return [build_module(recipe).network().state_dict() for recipe in recipes]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_stands_for_its_best_student_and_is_as_good_as_the_file(tiny, other, tmp_path):
    assert (BEST, WEIGHTS) == STUDENTS
    folder, file = (tiny(*ALONE, f"--student.weights={path}") for path in (other, other / BEST))
    first, second = students(folder, file)
    assert same(first, second)
    assert same(first, load_file(other / BEST))
    fit(folder, tmp_path / "folder", quiet=True)
    fit(file, tmp_path / "file", quiet=True)
    assert same(*(load_file(tmp_path / name / WEIGHTS) for name in ("folder", "file")))
    (other / BEST).unlink()
    assert same(*students(tiny(*ALONE, f"--student.weights={other}")), load_file(other / WEIGHTS))


def test_a_run_of_other_classes_gives_all_but_the_head(tiny, other, tmp_path):
    root = write_images(tmp_path / "insects")
    arguments = (*folder_arguments(root), *ALONE)
    with pytest.warns(UserWarning, match=r"had other classes: .* starts untrained \(fc.weight, fc.bias\)"):
        (found,) = students(tiny(*arguments, f"--student.weights={other}"))
    (fresh,) = students(tiny(*arguments))
    known = load_file(other / BEST)
    for name, value in found.items():
        assert torch.equal(value, fresh[name] if name.startswith("fc") else known[name]), name
    assert fresh["fc.weight"].shape[0] == 2


def test_as_many_other_classes_get_a_fresh_head_too(tiny, other, tmp_path):
    root = write_images(tmp_path / "insects", classes=[f"insect {number}" for number in range(10)], per_class=2)
    arguments = (*folder_arguments(root), *ALONE)
    with pytest.warns(UserWarning, match="had other classes"):
        (found,) = students(tiny(*arguments, f"--student.weights={other}"))
    (fresh,) = students(tiny(*arguments))
    known = load_file(other / BEST)
    assert torch.equal(found["fc.weight"], fresh["fc.weight"])
    assert not torch.equal(found["fc.weight"], known["fc.weight"])
    assert torch.equal(found["layer2.conv1.weight"], known["layer2.conv1.weight"])


def test_a_teacher_starts_from_a_run_too(tiny, other, tmp_path):
    same_network = ("--teacher.options={width: 2}", f"--teacher.weights={other}", "--distillation.method=kd")
    assert same(build_module(tiny(*same_network)).teacher.state_dict(), load_file(other / BEST))
    insects = (*folder_arguments(write_images(tmp_path / "insects")), *same_network)
    with pytest.raises(ValueError, match="its student has no head for these classes, and a head that nobody trains"):
        build_module(tiny(*insects))
    with pytest.warns(UserWarning, match="had other classes"):
        build_module(tiny(*insects, "--distillation.method=mgd-amp"))


def test_a_detector_starts_from_a_run(small, tmp_path):
    alone = ("--distillation.method=none", "--training.epochs=1")
    fit(small(*alone), tmp_path / "other", quiet=True)
    known = load_file(tmp_path / "other" / WEIGHTS)
    recipe = small(*alone, f"--student.weights={tmp_path / 'other'}")
    assert same(*students(recipe), known)
    described = json.loads((tmp_path / "other" / "model.json").read_text())
    described["class_names"][-1] = "another"
    (tmp_path / "other" / "model.json").write_text(json.dumps(described))
    with pytest.warns(UserWarning, match="had other classes"):
        (found,) = students(recipe)
    changed = {name for name, value in found.items() if not torch.equal(value, known[name])}
    assert changed
    assert all("head" in name or "predictor" in name for name in changed), changed


def test_what_is_refused(tiny, other, tmp_path):
    def refused(said, *arguments):
        with pytest.raises(ValueError, match=said) as info:
            build_module(tiny(*ALONE, *arguments))
        assert "\n" not in str(info.value)

    refused("its student is matchdistill.models:small_resnet, not timm:resnet10t", "--student.name=timm:resnet10t",
            "--student.options={}", f"--student.weights={other}")  # fmt: skip
    refused(r"its student has the options \{'width': 2\}, not \{'width': 4\}: give the same, or name the file",
            "--student.options={width: 4}", f"--student.weights={other}")  # fmt: skip
    shutil.copytree(other, tmp_path / "begun")
    (tmp_path / "begun" / WEIGHTS).unlink()
    refused("it is a folder without a finished run",
            f"--student.weights={tmp_path / 'begun'}")  # fmt: skip
    (other / "model.json").unlink()
    refused("holds no finished run: expected model.json", f"--student.weights={other}")
