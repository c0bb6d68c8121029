"""Runs whose teacher's features are kept on disk."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from matchdistill.runs import build
from matchdistill.runs.build import build_module
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.module import ClassificationModule

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


@pytest.fixture
def cached(tiny, tmp_path):
    """The tiny recipe with the cache: 70 images, of which an epoch leaves 10 out, in two views."""

    def recipe(*arguments, folder="cache"):
        return tiny(
            "--data.train_limit=70",
            "--teacher.cache=disk",
            f"--teacher.cache_folder={tmp_path / folder}",
            "--teacher.cache_views=2",
            "--training.epochs=4",
            *arguments,
        )

    return recipe


@pytest.fixture
def watched(monkeypatch):
    """The losses of all steps, and how often the teacher had run for views by the end of each."""
    seen = {}
    step = ClassificationModule.training_step

    def training_step(self, batch, number):
        loss = step(self, batch, number)
        seen["losses"].append(loss.item())
        seen["runs"].append(0 if self.cache is None else self.cache.runs)
        return loss

    monkeypatch.setattr(ClassificationModule, "training_step", training_step)
    return seen


def losses_of(recipe, out, watched):
    watched["losses"], watched["runs"] = [], []
    fit(recipe, out, quiet=True)
    return watched["losses"]


@pytest.mark.parametrize(
    "method",
    ["mgd-amp+kd", pytest.param("kd", marks=pytest.mark.slow), pytest.param("fitnets", marks=pytest.mark.slow)],
)
def test_losses_are_those_of_the_teacher_on_the_same_views(cached, watched, tmp_path, monkeypatch, method):
    given = (f"--distillation.method={method}",)
    found = losses_of(cached("--teacher.cache_dtype=float32", *given), tmp_path / "exact", watched)
    runs = watched["runs"]
    assert runs[5] > 0
    assert runs[6:] == [runs[6]] * 6  # with the images that an epoch leaves out: no teacher runs after the second one
    half = losses_of(cached(*given), tmp_path / "half", watched)
    with monkeypatch.context() as patch:
        patch.setattr(build, "cache_for", lambda recipe, module: None)
        expected = losses_of(cached(*given), tmp_path / "none", watched)
    assert len(expected) == 12
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    assert half[0] == pytest.approx(expected[0], rel=1e-3)
    assert half[0] != found[0]


def test_a_second_run_runs_no_teacher_and_is_the_same(cached, watched, tmp_path):
    first = losses_of(cached(), tmp_path / "first", watched)
    assert losses_of(cached(), tmp_path / "second", watched) == first
    assert watched["runs"] == [0] * 12
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
def test_a_run_that_was_cut_ends_as_an_uncut_one(cached, tmp_path, monkeypatch):
    fit(cached(folder="whole"), tmp_path / "whole-run", quiet=True)
    for moment in (4, 8):  # in the second epoch, whose views are half there then, and in the third
        step, calls = ClassificationModule.training_step, []

        def cut(self, batch, number, step=step, calls=calls, moment=moment):
            calls.append(number)
            if len(calls) == moment:
                raise RuntimeError("cut")
            return step(self, batch, number)

        out = tmp_path / f"cut-run{moment}"
        with monkeypatch.context() as patch:
            patch.setattr(ClassificationModule, "training_step", cut)
            with pytest.raises(RuntimeError, match="cut"):
                fit(cached(folder=f"cut{moment}"), out, quiet=True)
        fit(cached(folder=f"cut{moment}"), out, resume=True, quiet=True)
        expected = load_file(tmp_path / "whole-run" / "student.safetensors")
        found = load_file(out / "student.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_folder_and_the_bound_may_change_on_resume_and_the_views_may_not(cached, tmp_path):
    fit(cached("--training.epochs=1"), tmp_path / "run", quiet=True)
    fit(
        cached("--training.epochs=1", "--teacher.cache_gib=3", folder="other"),
        tmp_path / "run",
        resume=True,
        quiet=True,
    )
    with pytest.raises(ValueError, match="differs in teacher"):
        fit(cached("--training.epochs=1", "--teacher.cache_views=3"), tmp_path / "run", resume=True, quiet=True)


def test_what_is_kept_is_for_these_settings_alone(cached, tmp_path):
    def name(*arguments):
        return build_module(cached(*arguments)).cache.name

    changes = [
        [],
        ["--data.image_size=24"],
        ["--data.color_jitter=0.3"],
        ["--distillation.taps=[[layer2.relu2:input,layer2.relu2:input]]"],
        ["--teacher.preparation={mean: [0.5, 0.5, 0.5]}"],
        ["--student.preparation={mean: [0.5, 0.5, 0.5]}"],
        ["--teacher.cache_views=3"],
        ["--trainer.precision=bf16-mixed"],
        ["--seed=1"],  # by which data.train_limit chooses
    ]
    names = [name(*each) for each in changes]
    assert len(set(names)) == len(names)
    assert name("--data.batch_size=10", "--training.lr=0.3", "--teacher.cache_gib=3", "--data.workers=1") == names[0]


def test_how_much_it_needs_is_told_and_too_much_is_refused(cached, tmp_path):
    made = build_module(cached()).cache
    elements = 4 * 16 * 16 + 8 * 8 * 8 + 16 * 4 * 4
    assert made.layout.nbytes == 2 * 70 * (64 + 2 * elements)
    assert str(made) == f"the teacher's features take 0.00048 GiB in {tmp_path / 'cache'} (teacher.cache)"
    with pytest.raises(ValueError, match=r"needs 0\.00048 GiB, more than the 0\.0001 GiB of teacher\.cache_gib"):
        build_module(cached("--teacher.cache_gib=0.0001"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("--training.mixup=0.2", "training.mixup mixes the images of each batch anew"),
        ("--training.cutmix=1", "training.cutmix mixes the images of each batch anew"),
        ("--training.repeated_augmentation=3", "training.repeated_augmentation varies it several times"),
        ("--trainer.num_nodes=2", r"trainer\.num_nodes is 2"),
        ("--teacher.cache_views=0", r"teacher\.cache_views"),
        ("--teacher.cache_gib=0", r"teacher\.cache_gib"),
        ("--teacher.cache_folder=", r"teacher\.cache_folder"),
    ],
)
def test_what_cannot_be_cached_is_refused(cached, argument, problem):
    with pytest.raises(ValueError, match=problem):
        cached(argument)


def test_students_without_a_teacher_see_images_varied_anew(cached):
    recipe = cached("--distillation.method=none")
    assert recipe.data.views == 0
    assert build_module(recipe).cache is None


@pytest.mark.slow
def test_two_processes_share_what_they_keep(cached, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(cached("--trainer.devices=2", "--trainer.strategy=ddp").config))
    told = tmp_path / "runner.py"
    told.write_text(
        "import json, os, sys, torch\n"
        "from matchdistill import cli\n"
        "from matchdistill.tasks.classification.module import ClassificationModule as Module\n"
        "torch.set_num_threads(1)\n"
        "step, runs = Module.training_step, []\n"
        "def counted(self, batch, number):\n"
        "    loss = step(self, batch, number)\n"
        "    runs.append(self.cache.runs)\n"
        "    return loss\n"
        "Module.training_step = counted\n"
        "code = cli.main(sys.argv[1:])\n"
        "json.dump(runs, open(f\"runs{os.environ.get('LOCAL_RANK', 0)}.json\", 'w'))\n"
        "sys.exit(code)\n"
    )
    subprocess.run(
        [sys.executable, str(told), "fit", str(recipe), "--out", str(tmp_path / "run")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    for rank in range(2):
        runs = json.loads((tmp_path / f"runs{rank}.json").read_text())
        assert len(runs) == 4  # epochs of one batch of 20 of the 35 images of each
        assert runs[1] > 0
        assert runs[2:] == [runs[2]] * 2
