"""The costs of a step in other frameworks' trainers: what is timed is one step, and the results are of these networks."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks import harness
from benchmarks import trainers_step as step

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_a_turn_is_a_step_of_the_loop(tmp_path):
    turns, done = step.Turns((torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))), []

    class Counting(step.Module):
        def on_train_batch_end(self, *_):
            done.append(self.trainer.global_step)

    model = Counting(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = step.pl.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    turns.start(lambda: trainer.fit(model, DataLoader(turns, batch_size=None)))
    for _ in range(3):
        before = len(done)
        turns.step()
        assert len(done) == before + 1
    turns.end()


def test_a_training_that_fails_is_told():
    turns = step.Turns(None)
    with pytest.raises(RuntimeError, match="the training has failed"):
        turns.start(lambda: [][0])


@pytest.mark.parametrize("framework", step.FRAMEWORKS)
def test_the_three_works_take_turns(framework):
    pytest.importorskip(framework.replace("-", "_"))
    found = step.measure(framework, 32, 2, 1)
    assert found["seconds"].keys() == {"alone", "teacher", "distilled"}
    assert found["seconds"]["distilled"] > found["seconds"]["alone"]


def test_the_committed_results():
    results = json.loads((harness.RESULTS.parent / "trainers_step.json").read_text())
    assert results["frameworks"].keys() == set(step.FRAMEWORKS)
    for found in results["frameworks"].values():
        assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]
