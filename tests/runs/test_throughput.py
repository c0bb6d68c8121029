"""How fast a run trains, and how much of the time it waits for its images."""

import json
import re
import time

import pytest
from test_train_resume import killed

from matchdistill.runs.throughput import Throughput
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.module import ClassificationModule
from matchdistill.tasks.module import DistilledModule

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


def kept(out):
    return json.loads((out / "evidence/costs.json").read_text())["throughput"]


def slowed(function, seconds):
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def test_it_is_told_and_kept(tiny, tmp_path, capsys):
    recipe = tiny("--distillation.method=mgd-amp")
    fit(recipe, tmp_path / "run")
    found = kept(tmp_path / "run")
    assert found["images"] == 2 * sum(len(images) for images, _ in recipe.data.train_dataloader())
    assert 0 < found["waiting"] < 1
    costs = json.loads((tmp_path / "run/evidence/costs.json").read_text())
    assert {"memory", "student", "teacher"} < costs.keys()
    told = re.search(
        r"throughput: (\S+) images per second, (\d+)% of the time waiting for data\n", capsys.readouterr().out
    )
    assert float(told[1]) == pytest.approx(found["images_per_second"], rel=1e-3)
    assert int(told[2]) == pytest.approx(100 * found["waiting"], abs=0.5)


@pytest.mark.parametrize("refresh", [("--distillation.refresh_every=1",), ("--distillation.refresh_steps=[[0, 1]]",)])
@pytest.mark.parametrize("slow", ["data", "step", "refresh"])
def test_what_is_slow_is_counted_where_it_belongs(tiny, tmp_path, monkeypatch, slow, refresh):
    """6 steps that take 0.6 s more, the batches, the steps themselves, or what counts as neither."""
    places = {
        "data": (ClassificationModule, "transfer_batch_to_device"),
        "step": (ClassificationModule, "training_step"),
        "refresh": (DistilledModule, "refresh"),
    }
    owner, name = places[slow]
    found = []
    monkeypatch.setattr(Throughput, "on_fit_end", lambda self, *_: found.append((self.waiting, self.stepping)))
    monkeypatch.setattr(owner, name, slowed(getattr(owner, name), 0.6))
    fit(tiny("--distillation.method=mgd-amp", *refresh), tmp_path / "run", quiet=True)
    waiting, stepping = found[0]
    assert (waiting >= 3.6) == (slow == "data")
    assert (stepping >= 3.6) == (slow == "step")
    if slow == "refresh":
        assert waiting + stepping < 1.2


def test_it_goes_over_all_resumes(tiny, tmp_path):
    arguments = ("--distillation.method=none", "--training.epochs=3")
    fit(tiny(*arguments), tmp_path / "whole", quiet=True)
    for moment, count in (("step", 5), ("student", 1)):
        killed(moment, count, tiny(*arguments), tmp_path / moment)
        fit(tiny(*arguments), tmp_path / moment, resume=True, quiet=True)
        assert kept(tmp_path / moment)["images"] == kept(tmp_path / "whole")["images"]
