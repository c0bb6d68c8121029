"""The page on speed: it is of the committed results, and copes with those that are missing."""

import pytest

from benchmarks import page, scale, tables
from benchmarks.harness import ratio, summary

MACHINE = {"cpu": "a CPU", "cores": 2, "threads": 2, "device": "cpu", "torch": "2.6"}


def found(**results):
    return {"command": "python -m benchmarks", "machine": MACHINE, "results": {"size": 8, "batch": 2, **results}}


STEP = summary(
    {"limit": [1.0, 1.0], "matchdistill": [1.02, 1.02], "fitnets": [1.01, 1.01], "original": [3.0, 3.0]}, "limit"
)
CURVE = {"values": [1, 2, 4], "seconds": [1.0, 2.0, 4.0], "exponent": 1.0}
ALL = {
    "step_cpu": found(pairs={"resnet50 -> mobilenet_v2": {"works": STEP, "loss differences": {"prepared": 2e-5}}}),
    "online_cpu": found(
        every=10,
        pairs={"a": {"works": summary({"matchdistill": [1.0, 1.0], "online": [1.02, 1.02]}, "matchdistill")}},
    ),
    "cached_cpu": found(
        dtype="float16",
        pairs={
            "a": {
                "works": summary({"alone": [1.0, 1.0], "cached": [1.04, 1.04], "limit": [1.9, 1.9]}, "alone"),
                "bytes of an image": 3_010_560,
            }
        },
    ),
    "peers_cpu": found(
        packages={"torchdistill": "1.1.5"},
        pairs={
            "a": {
                name: {**own, "tensors": tensors}
                for (name, own), tensors in zip(
                    summary({"limit": [1.0, 1.0], "torchdistill": [1.3, 1.3]}, "limit").items(), (100, 125), strict=True
                )
            }
        },
    ),
    "refresh_cpu": found(
        pairs={
            "resnet50 -> mobilenet_v2": {
                "images": {"forwards": 4, "matchdistill": 4, "matchdistill without assignments": 4},
                "per image": summary(
                    {
                        "forwards": [1.0, 1.0],
                        "matchdistill": [1.1, 1.1],
                        "matchdistill without assignments": [1.05, 1.05],
                    },
                    "forwards",
                ),
                "assignments": 0.5,
                "original assignments": 9.0,
                "processes": {"processes": 2, "ratio": ratio([0.5], [1.0]), "same matching": True},
            }
        }
    ),
    "assign_cuda": found(
        teachers=8,
        costs={
            "random, 4": {
                "works": summary(
                    {"matchdistill": [1.0, 1.0], "scipy": [5.0, 5.0], "original": [30.0, 30.0]}, "matchdistill"
                ),
                "mean cost": {"matchdistill": 0.5, "scipy": 0.5, "original": 0.5},
            }
        },
    ),
    "profile_cpu": found(
        batches=2,
        pairs={
            "a": {
                "step": {
                    "limit": {"aten::add": 0.001, "aten::mul": 0.02, **{f"aten::o{n}": 0.0 for n in range(20)}},
                    "matchdistill": {"aten::add": 0.004, "aten::mul": 0.02, **{f"aten::o{n}": 1e-4 for n in range(20)}},
                },
                "refresh": {"forwards": {"aten::mm": 0.0}, "matchdistill": {"aten::mm": 0.5}},
            }
        },
    ),
    "memory_cpu": found(
        pairs={
            "a": {
                "step": {
                    "limit": {"tensors": 2**20, "resident": 2**21},
                    "matchdistill": {"tensors": 2**21, "resident": None},
                },
                "refresh": [
                    {"work": "matchdistill", "images": images, "tensors": 2**20, "resident": 2**20} for images in (4, 8)
                ],
            }
        }
    ),
    "scale_cpu": found(
        features={"batch": {"loss": CURVE, "update": {**CURVE, "exponent": None, "seconds": [1.0, -1.0, -1.0]}}},
        step={"size": {**CURVE, "limit": [1.0] * 3}},
    ),
    "projection": found(
        pairs={
            "resnet50 -> mobilenet_v2": {
                "teacher": 8e9,
                "student forward": 1e9,
                "student's graph": 1e8,
                "distillation's graph": 1e6,
                "teacher's features": 1e6,
                "weights": 1e8,
                "accumulators": 1e7,
                "depth-wise": True,
            }
        }
    ),
}


def test_a_profile_names_what_is_above_the_limit_and_adds_up():
    text = page.page({"profile_cpu": ALL["profile_cpu"]})
    assert text.count("aten::o") == tables.OPERATORS - 1
    assert "| `aten::add` | 1.0 | 3.0 |" in text
    assert "| others | 20.0 | 0.9 |" in text
    assert "| all | 21.0 | 5.0 |" in text
    assert "a refresh of 4 images" in text


def test_reasons_are_of_the_results():
    works = summary({"limit": [1.0], "prepared": [0.9], "prepared + compiled loss": [0.99]}, "limit")
    step = found(pairs={"a": {"works": works, "loss differences": {}}})
    refresh = {"forwards": {"aten::conv": 2.0, "aten::mm": 0.5}, "matchdistill": {"aten::conv": 2.1, "aten::mm": 0.75}}
    profile = found(batches=2, pairs={"a": {"step": {"limit": {}, "matchdistill": {}}, "refresh": refresh}})
    text = page.page({"step_cpu": step, "profile_cpu": profile})
    assert "(`aten::mm`) alone take 10.0% of the forward" in text
    assert "takes 1.100 of the time (1.100 to 1.100)" in text
    assert "older solver" in text
    assert "older solver" not in page.page({"profile_cpu": {**profile, "measured": page.SOLVER}})


def test_what_was_tried_and_is_not_there_is_told():
    rounds = {
        "limit": [2.0],
        "onnxruntime": [1.7],
        "onnxruntime + int8": [1.5],
        "limit, the teacher in a thread": [2.2],
    }
    differences = {"onnxruntime": 1e-6, "onnxruntime + int8": 0.125}
    pairs = {"a": {"works": summary(rounds, "limit"), "loss differences": differences}}
    text = page.page({"tried-teachers_cpu": found(pairs=pairs)})
    assert "a step takes 0.750 of the limit, but the loss differs by 0.12." in text
    assert "both take 1.100 of the limit" in text
    without = {"a": {"works": summary({"limit": [1.0]}, "limit"), "loss differences": {}}}
    assert "8 bits" not in page.page({"tried-teachers_cpu": found(pairs=without)})


def test_what_reading_from_disk_takes():
    pair = ALL["cached_cpu"]["results"]["pairs"]["a"]
    cached = found(dtype="float16", pairs={"a": {**pair, "reading": 0.0125}})
    assert "from disk takes 1.2% of the student's own step" in page.page({"cached_cpu": cached})


def test_what_the_assignments_take_their_time_for():
    times = {"x, 4": (1.0, 10.0, 8.0, 1), "trained, 4": (2.0, 12.0, 9.0, 5)}
    costs = {
        name: {
            "works": summary(
                {
                    "matchdistill": [own],
                    "scipy": [own],
                    "original": [original],
                    "original, its problem alone": [problem],
                },
                "matchdistill",
            ),
            "mean cost": dict.fromkeys(("matchdistill", "scipy", "original"), 0.5),
            "parts": parts,
        }
        for name, (own, original, problem, parts) in times.items()
    }
    text = page.page({"assign_cpu": found(teachers=8, costs=costs)})
    assert "takes 10.0 to 12.0 s, whatever the costs are, and 75% to 80% of that to build its problem" in text
    assert "as the costs need: 1 (x, 4), 5 (trained, 4)." in text
    assert "| x, 4 | original, its problem alone | 8.000 | 8.0 |  |" in text
    del costs["x, 4"]["works"]["original, its problem alone"]
    assert "whatever the costs" not in page.page({"assign_cpu": found(teachers=8, costs=costs)})


def test_what_a_faster_teacher_would_have_to_reach():
    """The teacher takes 0.4 of the limit, and the loss 0.05: for 0.85, the teacher may take 0.2 of it, so half its time."""
    rounds = {"limit": [1.0], "matchdistill": [1.05], "alone": [0.6], "prepared": [0.95], "onnxruntime": [0.89]}
    text = page.page({"engine_cpu": found(pairs={"a": {"works": summary(rounds, "limit"), "loss differences": {}}})})
    assert "## A step with a teacher on ONNX Runtime, 8 px, batch 2, cpu" in text
    assert (
        "may take 0.50 of PyTorch's time for it. In the steps that were timed it takes 0.75 with `prepared` and 0.60"
        in text
    )


def test_a_refresh_of_the_default_number_of_images_is_calculated():
    """1.05 s per image without the assignments, half a second for these, beside 1 s per image of the forward passes."""
    assert "takes 1.050 of the forward passes" in page.page({"refresh_cpu": ALL["refresh_cpu"]})


def test_an_adaptive_refresh_is_judged_by_the_worst_of_its_orders():
    tried = [
        {"images": 2048, "seconds": 9.0, "excess": [1e-4, 2e-4]},
        {"images": 4096, "seconds": 18.0, "excess": [3e-3, 1e-4]},
    ]
    found = {
        "size": 64,
        "trained on": 10,
        "tolerance": 1e-3,
        "positions": ["a -> b", "c -> d"],
        "full": {"images": 20_000, "seconds": 90.0},
        "adaptive": tried,
        "fixed": tried[:1],
    }
    text = page.page({"adaptive_cpu": {**ALL["step_cpu"], "results": found}})
    assert "of those of a full one: at most 0.2 | cpu | resnet50 -> resnet18 | 0.205 | **missed** |" in text
    assert "above the full one's: at most 0.001 | cpu | resnet50 -> resnet18 | 3.0e-03 | **missed** |" in text
    assert "| adaptive | 4096 | 18 | 0.300 | 0.010 |" in text
    assert "| fixed | 2048 | 9 | 0.010 | 0.020 |" in text


def test_the_committed_page_is_of_the_committed_results():
    assert page.page(page.read()) == (page.DOCS / "speed.md").read_text()


@pytest.mark.parametrize("missing", [None, *ALL])
def test_what_is_missing_is_left_out(missing):
    text = page.page({name: each for name, each in ALL.items() if name != missing})
    assert ("## A step, 8 px, batch 2, cpu" in text) == (missing != "step_cpu")
    assert ("## A projection" in text) == (missing != "projection")
    assert ("images/scale_cpu.svg" in text) == (missing != "scale_cpu")
    assert "not measured" in text


def test_targets_are_met_or_missed():
    lines = page.page(ALL).splitlines()

    def line(start):
        (only,) = [line for line in lines if line.startswith(f"| {start}")]
        return only

    pair = "resnet50 -> mobilenet_v2"
    assert line("step, of the limit") == f"| step, of the limit: at most 1.03 | cpu | {pair} | 1.020 | met |"
    assert line("step, of FitNets") == f"| step, of FitNets' step: at most 1 | cpu | {pair} | 1.010 | **missed** |"
    assert line("the original's step").endswith("at least 2 | cpu | resnet50 -> mobilenet_v2 | 2.941 | met |")
    assert line("loss with a prepared teacher,").endswith("2.0e-05 | met |")
    assert line("a step that sums").endswith("1.020 | **missed** |")
    assert line("a step with the teacher's features").endswith("1.040 | met |")
    assert line("torchdistill") == "| torchdistill | 1300.0 | 1.300 | 1.300 | 1.300 | 1.250 |"
    assert "An image takes 3.01 MB in float16" in page.page(ALL)
    assert line("peak memory").endswith("2.000 | **missed** |")
    assert line("memory of a refresh").endswith("1.000 | met |")
    assert line("refresh, of the forward passes").endswith("1.100 | **missed** |")
    assert line("refresh by two processes").endswith("0.500 | met |")
    assert line("step with a prepared and compiled teacher, of the limit").endswith("| cpu |  |  | not measured |")


def test_the_projection_has_the_assignments_as_measured():
    (line,) = [line for line in page.page(ALL).splitlines() if line.startswith("| resnet50 -> mobilenet_v2 | 8.00")]
    # 1,281,167 / 8 images x (8e9 / 100e12 + 3e9 / 20e12) seconds, and 2,500 x (8e9 / 100e12 + 1e9 / 20e12).
    assert line.split(" | ")[3:7] == ["37", "0.33", "0.50", "2.2%"]


def test_the_plot_is_the_same_file_for_the_same_results(tmp_path):
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("one.svg", "two.svg")]
    for file in files:
        scale.plot(ALL["scale_cpu"]["results"], file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert b"<svg" in files[0].read_bytes()
