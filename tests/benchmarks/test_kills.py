import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.kills import RESULTS, Tally, differences, files, run, same, table

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher first", "compare --jobs 2"])
def test_killed_runs_end_as_uncut_ones(tmp_path, kind):
    run(kills=3, kinds=[kind], seed=7, out=tmp_path / "kills.json")
    (found,) = json.loads((tmp_path / "kills.json").read_text())["results"]["kinds"].values()
    assert found["kills"] == 3
    assert (found["lost"], found["unequal"], found["stray"], found["told"]) == (0, 0, 0, [])


def test_the_table_of_the_page_is_of_the_results():
    results = json.loads(RESULTS.read_text())["results"]
    assert table(results) in (ROOT / "docs" / "reliability.md").read_text()
    assert sum(each["kills"] for each in results["kinds"].values()) >= 100
    assert all(each[key] == 0 for each in results["kinds"].values() for key in ("lost", "unequal", "stray"))


def test_every_result_has_a_place_in_the_table():
    cut = Tally(runs=1, kills=2, writing=3, lost=4, unequal=5, stray=6)
    assert "| x | 1 | 2 | 3 | 4 | 5 | 6 |" in table({"kinds": {"x": vars(cut)}})


@pytest.fixture
def two(tiny, tmp_path):
    """The folders of a run and of its copy."""
    from matchdistill.runs.train import fit

    fit(tiny("--distillation.method=mgd-amp"), tmp_path / "whole", quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    return tmp_path / "run", tmp_path / "whole"


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_checkpoint(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_the_comparison_sees_every_difference(two):
    out, whole = two
    assert differences(out, whole) == []
    change_json(out / "metrics.json", seconds=9.0)
    assert differences(out, whole) == []  # but for times

    change_json(out / "metrics.json", epochs=9)
    change_json(out / "evidence" / "epochs.json", epochs=[])
    change_checkpoint(out / "last.ckpt", lambda content: content["state_dict"]["distiller.student.fc.bias"].add_(1e-7))
    (out / "student.safetensors").unlink()
    shutil.copy(whole / "evidence" / "first.safetensors", out / "evidence" / "final.safetensors")
    assert set(differences(out, whole)) == {
        "metrics.json",
        "evidence/epochs.json",
        "last.ckpt/state_dict",
        "student.safetensors",
        "evidence/final.safetensors",
    }
    (out / "evidence" / ".last.partial-00000000.json").touch()
    assert files(out) ^ files(whole) == {"student.safetensors", "evidence/.last.partial-00000000.json"}


def test_nested_values_are_equal_bit_for_bit():
    value = {"a": [torch.ones(2), (1, "x")]}
    assert same(value, {"a": [torch.ones(2), (1, "x")]})
    for other in ({"a": [torch.ones(2), (2, "x")]}, {"a": [torch.ones(2).double(), (1, "x")]}, {"b": value["a"]}, {}):
        assert not same(value, other)
