"""The benchmarks of Ultralytics' trainer, but for the trainings: tables of given results, and what a work is timed by."""

import json
import statistics

import pytest

pytest.importorskip("ultralytics")

from benchmarks import ultralytics_scenes as scenes
from benchmarks import ultralytics_step as step


def run(method, seed, value, seconds=10.0):
    return {"method": method, "seed": seed, "map": value, "map50": 2 * value, "seconds": seconds}


def rows(runs):
    """The cells of each row of the table, by the first one."""
    given = {"teacher": {"map": 0.5, "map50": 0.75}, "ultralytics": "8.4.190", "epochs": 3, "machine": {"cpu": "a CPU"}}
    text = scenes.markdown({**given, "runs": runs})
    assert "--epochs 3`; ultralytics 8.4.190, one thread of\na CPU." in text
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert {len(row) for row in cells} == {6}
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([run("none", 0, 0.25)], {"none": ["25.00", "", "50.00", "", "10"]}),
        (
            [run("none", 0, 0.25), run("mgd-amp", 0, 0.375, 20.0)],
            {"none": ["25.00", "", "50.00", "", "10"], "mgd-amp": ["37.50", "+12.50", "75.00", "+25.00", "20"]},
        ),
        # A seed without its plain training counts in no difference, and equal differences have no interval's width.
        (
            [
                run(method, seed, value)
                for method, first in (("none", 0.25), ("mgd-amp", 0.375))
                for seed, value in enumerate((first, first))
            ]
            + [run("mgd-amp", 2, 0.375)],
            {"mgd-amp": ["37.50 ± 0.00", "+12.50 ± 0.00", "75.00 ± 0.00", "+25.00 ± 0.00", "10"]},
        ),
    ],
)
def test_the_table_of_given_results(runs, expected):
    found = rows(runs)
    assert found["teacher"] == ["50.00", "", "75.00", "", ""]
    assert {method: found[method] for method in expected} == expected


def test_the_committed_results():
    results = json.loads((scenes.RESULTS / "ultralytics.json").read_text())
    assert scenes.markdown(results) == (scenes.RESULTS / "ultralytics.md").read_text()
    assert results["methods"] == scenes.METHODS
    assert results["settings"] == scenes.SETTINGS
    timed = json.loads((scenes.RESULTS / "ultralytics_step.json").read_text())
    for name in ("teacher", "teacher without its head"):
        ratios = timed[f"distilled / (alone + {name})"]
        assert len(ratios["rounds"]) == timed["rounds"]
        assert ratios["median"] == statistics.median(ratios["rounds"])


def test_a_work_notes_its_time_at_each_call():
    seconds, done = [], []
    work = step.counted(lambda: done.append(sum(range(100_000))), seconds)
    work()
    work()
    assert len(done) == len(seconds) == 2
    assert all(0 < each < 10 for each in seconds)
