"""The benchmark of MoCo-v2 alone and with MGD, at the size of seconds."""

import pytest

from benchmarks import moco
from matchdistill.files import read_json

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*LeafSpec")]


@pytest.fixture
def small(tmp_path, monkeypatch):
    tiny = {
        "data.name": "digits",
        "data.train_part": [200, 300],
        "teacher.train_part": [0, 100],
        "data.val_limit": 40,
        "data.batch_size": 32,
        "objective.queue": 64,
        "student.options": {"width": 2},
        "teacher.options": {"width": 4},
        "distillation.refresh_images": 40,
    }
    monkeypatch.setattr(moco, "CHANGED", {**moco.CHANGED, **tiny})
    monkeypatch.setattr(moco, "TRAINING", {**moco.TRAINING, "epochs": 1, "validate_every": 1})
    monkeypatch.setattr(moco, "RESULTS", tmp_path)


def test_the_table_is_that_of_the_runs_and_is_made_again_without_running(small, tmp_path, monkeypatch):
    moco.run(tmp_path / "runs", seeds=2)
    results = read_json(tmp_path / "moco.json")
    runs = {(run["method"], run["seed"]): run["student"] for run in results["runs"]}
    assert runs.keys() == {(method, seed) for method in ("none", "mgd-amp") for seed in (0, 1)}
    alone, mgd = ([runs[method, seed]["knn"] for seed in (0, 1)] for method in ("none", "mgd-amp"))
    table = (tmp_path / "moco.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line.startswith("|")}
    assert f"| {100 * sum(alone) / 2:.2f} ±" in rows["none"]
    assert f"{50 * (sum(mgd) - sum(alone)):+.2f} ±" in rows["mgd-amp"]
    assert f"{results['teacher']['probe']:.2%}" in rows["teacher"]
    assert len({line.count("|") for line in rows.values()}) == 1
    monkeypatch.setattr("matchdistill.runs.train._train", None)
    moco.run(tmp_path / "runs", seeds=2)
    assert (tmp_path / "moco.md").read_text() == table


def test_the_weight_equals_the_papers_for_resnet18_at_224_px():
    elements = [64 * 56**2, 128 * 28**2, 256 * 14**2, 512 * 7**2]
    for place, count in enumerate(elements):
        assert count / (1e4 * 2 ** (3 - place)) == pytest.approx(moco.CHANGED["distillation.weights"]["mgd"], rel=0.01)
