"""What a run keeps of its validation images agrees with its metrics, and stays small."""

import pytest
import torch

from matchdistill.report.judgements import against, judged
from matchdistill.report.runs import Run
from matchdistill.runs import evidence, examining
from matchdistill.runs.examining import MOST_CONTESTED, contested
from matchdistill.runs.train import fit

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


def test_the_grades_of_a_classifier_are_its_accuracy(tiny, tmp_path):
    metrics = fit(tiny("--distillation.method=mgd-amp"), tmp_path, quiet=True)
    run = Run.of(tmp_path)
    examined = run.examined
    assert (examined.images, examined.index.tolist()) == (50, list(range(50)))
    for role in ("student", "teacher"):
        own = examined.roles[role]
        assert float(own.grade.float().mean()) == pytest.approx(metrics.of(role)["top1"], abs=1e-6)
        assert int(own.bins[:, 0].sum()) == int(own.confused[:, 2].sum()) == int(own.counts.sum()) == 50
        assert float((own.classes.nan_to_num() * own.counts).sum() / 50) == pytest.approx(metrics.of(role)["top1"])
    student, teacher = (examined.roles[role].grade for role in ("student", "teacher"))
    (beside,) = against(run)
    assert beside.other == "teacher"
    assert beside.won.tolist() == [at for at in range(50) if student[at] > teacher[at]]
    assert beside.lost.tolist() == [at for at in range(50) if student[at] < teacher[at]]
    assert list(run.contested) == contested(student, teacher).tolist()
    for number, image in run.contested.items():
        label = examined.classes[int(examined.roles["student"].found[number])]
        assert image["student"].startswith(f"{label} (")
    sizes = [(tmp_path / name).stat().st_size for name in (evidence.JUDGED, evidence.CONTESTED)]
    assert sum(sizes) < 500_000


def test_of_very_many_images_some_from_all_over_are_looked_at(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(examining, "MOST_JUDGED", 10)
    fit(tiny("--distillation.method=none"), tmp_path, quiet=True)
    run = Run.of(tmp_path)
    assert run.examined.images == 50
    assert len(run.examined.index) == 10
    assert (run.examined.index[0], run.examined.index[-1]) == (0, 49)
    assert list(judged(run)) == ["student alone"]


def test_a_detector_and_its_teacher(small, tmp_path):
    metrics = fit(small(), tmp_path, quiet=True)
    roles = Run.of(tmp_path).examined.roles
    for role, own in roles.items():
        known = own.classes[~own.classes.isnan()]
        assert (own.measure, own.counted) == ("AP", "objects")
        assert float(known.mean()) == pytest.approx(metrics.of(role)["ap"], abs=1e-6)
    assert set(roles) == {"student", "teacher"}


def test_a_segmenter_and_its_teacher(pixelset, tmp_path):
    metrics = fit(pixelset(), tmp_path, quiet=True)
    run = Run.of(tmp_path)
    for role, own in run.examined.roles.items():
        for name, iou in zip(run.examined.classes, own.classes.tolist(), strict=True):
            assert iou == pytest.approx(metrics.of(role)[f"iou_{name}"], abs=1e-6)
        right = own.confused[own.confused[:, 0] == own.confused[:, 1], 2].sum() / own.confused[:, 2].sum()
        assert float(right) == pytest.approx(metrics.of(role)["pixel_accuracy"], abs=1e-6)


def test_images_worth_a_look():
    """The best and the worst against the teacher, the first ones of equals; few of each."""
    student, teacher = torch.tensor([0.5, 0.9, 1.0, 0.2]), torch.tensor([0.9, 0.5, 1.0, 0.2])
    assert contested(student, teacher).tolist() == [0, 1, 3]
    assert contested(torch.ones(5)).tolist() == []
    assert contested(torch.zeros(100)).tolist() == list(range(MOST_CONTESTED))


def test_what_cannot_be_judged_does_not_stop_a_run(tiny, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr("matchdistill.tasks.classification.judging.ClassJudge.add", fails)
    with pytest.warns(UserWarning, match="could not judge the validation images: RuntimeError: no luck"):
        fit(tiny("--distillation.method=none"), tmp_path, quiet=True)
    assert Run.of(tmp_path).examined is None
