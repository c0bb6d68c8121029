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
        method = recipe.distillation.method
        if folder.name != "teacher":
            trained.append((method, recipe.seed))
        found = {"top1": 0.85 + recipe.seed / 50 - (method == "none") / 10}
        teacher = {} if method == "none" else {"top1": 0.95}
        return RunMetrics("classification", method, recipe.seed, 7, found, teacher, {}, [], 1.0)

    trained = []
    monkeypatch.setattr(alignment, "fit", fit)
    return tmp_path, trained


def test_differences_are_paired_by_seed_with_the_other_methods_runs(trained):
    pytest.importorskip("efficientnet_lite_pytorch")
    folder, runs = trained
    alignment.run(folder, seeds=2, students=["pretrained"])
    assert runs == [("mgd-align", 0), ("mgd-align", 1)]
    found = read_json(folder / "alignment.json")["students"]["pretrained"]
    assert found["mgd-align"] == {"0": 0.85, "1": 0.87}
    rows = {line.split(" | ")[0].strip("| "): line for line in (folder / "alignment.md").read_text().splitlines()}
    assert "| 80.50 ± 6.35 | +10.00 ± 0.00 | +5.50 ± 6.35 |" in rows["mgd-amp"]
    assert "| 90.50 ± 6.35 | +20.00 ± 0.00 | -4.50 ± 6.35 |" in rows["ofd"]
    assert "The teacher: 95.00 (seeds 0, 1)." in rows


def test_further_seeds_are_trained_by_every_method_and_kept(trained):
    pytest.importorskip("efficientnet_lite_pytorch")
    folder, runs = trained
    alignment.run(folder, seeds=4, students=["pretrained"], methods=["none", "mgd-align"])
    assert sorted(runs) == [*(("mgd-align", seed) for seed in range(4)), ("none", 3)]
    rows = {line.split(" | ")[0].strip("| "): line for line in (folder / "alignment.md").read_text().splitlines()}
    assert rows["none"].startswith("| none | 4 |")
    assert rows["ofd"].startswith("| ofd | 3 |")
    runs.clear()
    alignment.run(folder, seeds=4, students=["pretrained"], methods=["none", "mgd-align"])
    assert runs == []


def test_a_teacher_that_the_other_methods_had_not_is_refused(trained):
    pytest.importorskip("efficientnet_lite_pytorch")
    folder, _ = trained
    path = folder / "transfer.json"
    before = read_json(path)
    before["students"]["pretrained"]["teacher"] = 0.94
    write_json(path, before)
    with pytest.raises(ValueError, match=r"seed 0: the teacher in .* is another one"):
        alignment.run(folder, seeds=2, students=["pretrained"])
