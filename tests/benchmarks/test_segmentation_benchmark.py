"""The segmentation benchmark's recipe and its tables."""

from pathlib import Path

from benchmarks import segmentation as benchmark
from matchdistill.runs.recipe import load_recipe

MACHINE = {"cpu": "a processor", "threads": 1, "torch": "2.6"}


def results():
    """Of two seeds: MGD-AMP adds 2 and 4 points of mIoU."""
    runs = [
        {"method": method, "seed": seed, "student": {"miou": miou, "pixel_accuracy": 0.5, "iou_bag": miou}}
        for method, values in (("none", (0.2, 0.3)), ("mgd-amp", (0.22, 0.34)))
        for seed, miou in enumerate(values)
    ]
    mean = {"mean": 0.25, "interval": 0.1}
    difference = {"mean": 0.03, "interval": 0.02}
    summary = {
        name: [
            {"method": "none", name: mean, "difference": None},
            {"method": "mgd-amp", name: mean, "difference": difference},
        ]
        for name in ("miou", "pixel_accuracy")
    }
    teacher = {"miou": 0.4, "pixel_accuracy": 0.6, "iou_bag": 0.41}
    return {"command": "the command", "machine": MACHINE, "teacher": teacher, "summary": summary, "runs": runs}


def test_the_tables():
    lines = benchmark.markdown(results()).splitlines()
    assert "| teacher | 40.00 |  | 60.00 |  |" in lines
    (none,) = (line for line in lines if line.startswith("| none |"))
    (amp,) = (line for line in lines if line.startswith("| mgd-amp |"))
    assert "25.00" in none
    assert "+3.00" in amp
    assert "| bag | 41.0 | 25.0 | 28.0 |" in lines


def test_it_is_the_packaged_recipe_over_pretrained_backbones():
    weights = {name: Path(f"{name}.safetensors") for name in ("lite0", "lite2")}
    made = benchmark.recipe(Path("scenes"), weights).config
    plain = load_recipe("segmentation_scenes").config
    for section in ("training", "distillation", "compare"):
        assert made[section] == plain[section]
    for role, weight in (("teacher", "lite2"), ("student", "lite0")):
        assert weight in made[role]["options"]["backbone"]
        assert made[role]["options"].pop("backbone_weights") == f"{weight}.safetensors"
        assert made[role]["options"] == plain[role]["options"]
    first, last = made["data"]["train_part"]
    assert made["teacher"]["train_part"] == [0, first]
    assert benchmark.SCENES[0] == last
    assert made["data"]["crop"] == [benchmark.SIZE] * 2
