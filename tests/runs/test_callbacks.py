"""Callbacks of the user's own, by class path."""

import json
import sys

import pytest

from matchdistill import cli
from matchdistill.runs.train import fit

OWN = """
from pathlib import Path
from pytorch_lightning import Callback

class Steps(Callback):
    "Counts the steps of a run over its resumes, and ends it after so many epochs."

    def __init__(self, path, epochs=None):
        self.path, self.epochs, self.count = Path(path), epochs, 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True

    def on_fit_end(self, trainer, pl_module):
        self.path.write_text(f"{self.count} steps, {sorted(pl_module.result)}")

class Stops(Steps):
    "Fails once, in the second epoch."

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and not self.path.exists():
            self.path.touch()
            raise RuntimeError("this once")

def function():
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps17.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("steps17", None)


def callback(name, **arguments):
    return (
        f"--trainer.callbacks={json.dumps([{'class_path': name, **({'init_args': arguments} if arguments else {})}])}"
    )


ALONE = "--distillation.method=none"


def test_a_callback_of_ones_own_runs_beside_the_others_and_its_state_is_kept(tiny, own):
    fit(tiny(ALONE), own / "plain", quiet=True)
    recipe = tiny(ALONE, callback("steps17.Stops", path="found.txt"))
    said = (
        r"trainer.callbacks: steps17.Stops failed in on_train_epoch_start \(RuntimeError: this once, .*steps17.py:\d+\)"
    )
    with pytest.raises(ValueError, match=said):
        fit(recipe, own / "run", quiet=True)
    fit(recipe, own / "run", resume=True, quiet=True)
    assert (own / "found.txt").read_text() == "6 steps, ['top1', 'top5']"
    first, second = ((own / name / "student.safetensors").read_bytes() for name in ("plain", "run"))
    assert first == second


def test_a_callback_may_end_the_training(tiny, own):
    metrics = fit(tiny(ALONE, callback("steps17.Steps", path="found.txt", epochs=1)), own / "run", quiet=True)
    assert metrics.epochs == 1
    assert (own / "found.txt").read_text().startswith("3 steps")


def test_a_callback_of_lightning(tiny, own):
    name = "pytorch_lightning.callbacks.LearningRateMonitor"
    fit(tiny(ALONE, callback(name, logging_interval="epoch")), own / "run", quiet=True)
    assert "lr-SGD" in next((own / "run" / "logs").rglob("metrics.csv")).read_text()


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("nowhere17.Steps", {}, "trainer.callbacks 'nowhere17:Steps': there is no library or module 'nowhere17'"),
        ("steps17.Step", {}, "module 'steps17' has no class 'Step'; did you mean 'Steps'"),
        ("steps17.function", {}, "steps17.function is not a pytorch_lightning.Callback"),
        ("steps17.Path", {}, "steps17.Path is not a pytorch_lightning.Callback"),
        ("steps17.Steps", {"way": 1}, r"steps17.Steps cannot be built with these init_args \(.*unexpected keyword"),
    ],
)
def test_what_is_refused_before_anything_is_written(tiny, own, name, arguments, said):
    with pytest.raises(ValueError, match=said) as info:
        fit(tiny(ALONE, callback(name, **arguments)), own / "run", quiet=True)
    assert "\n" not in str(info.value)
    assert not (own / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    "value", ["[{}]", "[{class_path: Steps}]", "[{class_path: a.B, args: {}}]", "[{class_path: 3.5}]"]
)
def test_what_is_none(tiny, value):
    with pytest.raises(ValueError, match=r"trainer.callbacks has .*: expected \{class_path: package.module.Class"):
        tiny(f"--trainer.callbacks={value}")


def test_commands_that_only_look_at_a_run_import_no_callback_of_its_recipe(tiny, own, tmp_path, capsys):
    fit(tiny(ALONE, callback("steps17.Steps", path="found.txt")), own / "run", quiet=True)
    sys.modules.pop("steps17")
    (own / "steps17.py").write_text("raise SystemExit('code of somebody else')")
    for command in (["validate", "run"], ["export", "run"], ["report", "run"]):
        assert cli.main(command) == 0, capsys.readouterr()
    assert "steps17" not in sys.modules
