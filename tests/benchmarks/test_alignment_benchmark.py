"""What the benchmark of alignment writes of runs, and of the other methods' runs, that are there."""

import pytest

from benchmarks import alignment
from matchdistill.files import read_json, write_json
from matchdistill.runs.metrics import RunMetrics
from matchdistill.runs.store import WEIGHTS


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The transfer benchmark's runs, and trainings that only say what they would have found."""
    runs = [
        {"method": method, "seed": seed, "student": {"top1": base + seed / 100}}
        for method, base in (("none", 0.7), ("mgd-amp", 0.8), ("fitnets", 0.82), ("ofd", 0.9))
        for seed in range(3)
    ]
    write_json(tmp_path / "transfer.json", {"students": {"pretrained": {"teacher": 0.95, "runs": runs}}})
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / WEIGHTS).touch()
    monkeypatch.setattr(alignment, "RESULTS", tmp_path)

    def fit(recipe, folder, **options):
        assert recipe.distillation.method == "mgd-align" or folder.name == "teacher"
        found = {"top1": 0.85 + recipe.seed / 50}
        return RunMetrics("classification", "mgd-align", recipe.seed, 7, found, {"top1": 0.95}, {}, [], 1.0)

    monkeypatch.setattr(alignment, "fit", fit)
    return tmp_path


def test_differences_are_paired_by_seed_with_the_other_methods_runs(trained, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    alignment.run(trained, seeds=2, students=["pretrained"])
    found = read_json(trained / "alignment.json")["students"]["pretrained"]
    assert found["mgd-align"] == {"0": 0.85, "1": 0.87}
    rows = {line.split(" | ")[0].strip("| "): line for line in (trained / "alignment.md").read_text().splitlines()}
    assert "| 80.50 ± 6.35 | +5.50 ± 6.35 |" in rows["mgd-amp"]
    assert "| 90.50 ± 6.35 | -4.50 ± 6.35 |" in rows["ofd"]
    assert "2 seeds; teacher: 95.00." in rows
    assert "another one" not in capsys.readouterr().out


def test_a_teacher_that_the_other_methods_had_not_is_told(trained, capsys):
    pytest.importorskip("efficientnet_lite_pytorch")
    path = trained / "transfer.json"
    before = read_json(path)
    before["students"]["pretrained"]["teacher"] = 0.94
    write_json(path, before)
    alignment.run(trained, seeds=2, students=["pretrained"])
    assert "the teacher is another one" in capsys.readouterr().out
