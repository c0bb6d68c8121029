"""Works in turn, what is made of their times, and the file of results."""

import datetime
import json
import os

import pytest
import torch

from benchmarks import harness


def test_works_take_turns_there_and_back(monkeypatch):
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    monkeypatch.setattr(harness, "timed", lambda work, device, clock: (work(), len(calls))[1])
    seconds = harness.interleaved(works, rounds=2, warmup=2)
    assert "".join(calls) == "aabbcc" + "abc" + "cba"
    assert seconds == {"a": [7, 12], "b": [8, 11], "c": [9, 10]}


def test_ratios_are_by_round():
    found = harness.summary({"limit": [1.0, 2.0, 4.0], "own": [1.1, 2.6, 4.8]}, "limit")
    assert found["limit"]["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert found["own"]["seconds"] == 2.6
    assert found["own"]["rounds"] == [1.1, 2.6, 4.8]
    assert found["own"]["ratio"] == pytest.approx({"median": 1.2, "low": 1.15, "high": 1.25})


def test_a_stopwatch_passes_results_on():
    watch = harness.Stopwatch(lambda value: value + 1)
    assert [watch(1), watch(2)] == [2, 3]
    assert len(watch.seconds) == 2
    assert all(seconds >= 0 for seconds in watch.seconds)


def test_processes_are_fresh_and_answer_in_order():
    one, two = harness.in_processes(identity, [("one",), ("two",)])
    assert (one[0], two[0]) == ("one", "two")
    assert len({one[1], two[1], os.getpid()}) == 3


def identity(value):
    return value, os.getpid()


def test_results_have_their_command_and_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["anything", "step", "--only", "[kd, alone]"])
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.save(None, "step", "cpu", {"size": 3})
    saved = json.loads((tmp_path / "step_cpu.json").read_text())
    assert saved["command"] == "python -m benchmarks step --only '[kd, alone]'"
    assert saved["results"] == {"size": 3}
    assert datetime.date.fromisoformat(saved["measured"]) <= datetime.datetime.now(datetime.UTC).date()
    assert saved["machine"]["threads"] == torch.get_num_threads()
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["machine"]["device"] == "cpu"
