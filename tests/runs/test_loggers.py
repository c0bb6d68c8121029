"""Loggers by name."""

from importlib.util import find_spec

import pytest
from test_train_resume import assert_same_end

from matchdistill.runs import loggers, settings
from matchdistill.runs.train import fit

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")

TRAINED = ("--teacher.weights=null", "--teacher.training.epochs=1", "--distillation.method=kd")


def logged(out):
    """What lies in the folder of the logs."""
    return {path.name for path in (out / "logs").iterdir()} if (out / "logs").exists() else set()


@pytest.mark.parametrize(
    ("names", "expected"),
    [("[csv]", {"version_0"}), ("[tensorboard]", {"tensorboard"}), ("[]", set())],
)
def test_those_that_are_named_write_and_change_nothing(tiny, tmp_path, names, expected):
    fit(tiny(*TRAINED), tmp_path / "whole", quiet=True)
    fit(tiny(*TRAINED, f"--trainer.loggers={names}"), tmp_path / "run", quiet=True)
    assert logged(tmp_path / "whole") == {"version_0", "tensorboard"}
    assert logged(tmp_path / "run") == logged(tmp_path / "run/teacher") == expected
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    again = fit(tiny(*TRAINED), tmp_path / "run", resume=True, quiet=True)  # others may be named then
    assert again.epochs == 2


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_writes_offline_runs(tiny, tmp_path):
    fit(tiny(*TRAINED, "--trainer.loggers=[wandb]"), tmp_path / "run", quiet=True)
    for out in (tmp_path / "run", tmp_path / "run/teacher"):  # two trainings of one process
        (run,) = (out / "logs/wandb").glob("offline-run-*/run-*.wandb")
        assert b"val/top1" in run.read_bytes()


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_writes_a_store_of_files(tiny, tmp_path):
    metrics = fit(tiny(*TRAINED, "--trainer.loggers=[mlflow]"), tmp_path / "run", quiet=True)
    (values,) = (tmp_path / "run/logs/mlflow").glob("*/*/metrics/val/top1")
    assert float(values.read_text().splitlines()[-1].split()[1]) == pytest.approx(metrics.student["top1"])
    assert len(list((tmp_path / "run/teacher/logs/mlflow").glob("*/*/metrics/val/top1"))) == 1


def test_what_is_not_installed_is_one_line(tiny, monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == "mlflow" else name)
    with pytest.raises(ValueError, match=r"^trainer\.loggers has 'mlflow', which needs a package: pip install mlflow$"):
        tiny("--trainer.loggers=[csv,mlflow]")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[tensorbord]", "'tensorbord'; did you mean 'tensorboard'?: expected tensorboard, csv, wandb, mlflow"),
        ("[csv,csv]", "'csv' more than once"),
    ],
)
def test_wrong_names(tiny, names, message):
    with pytest.raises(ValueError) as info:
        tiny(f"--trainer.loggers={names}")
    assert str(info.value) == f"trainer.loggers has {message}"


def test_a_package_that_fails_is_one_line(tiny, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("no store\nhere")

    monkeypatch.setattr(settings, "find_spec", lambda name: name)
    monkeypatch.setattr(loggers, "MLFlowLogger", fail)
    with pytest.raises(
        ValueError, match=r"^trainer\.loggers: mlflow does not begin to log here \(OSError: no store\)$"
    ):
        fit(tiny("--trainer.loggers=[mlflow]"), tmp_path / "run", quiet=True)
