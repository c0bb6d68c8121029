"""The step with the teacher's features from disk, at a tiny size."""

import json

import pytest
import torch

from benchmarks import cached, pairs
from benchmarks.pairs import Pair, random_batch
from matchdistill.slots import checksum
from networks import PLAIN_TAPS, Plain

TINY = Pair(lambda: Plain(8), lambda: Plain(4), tuple(PLAIN_TAPS), reruns=True)


def test_works_are_timed_beside_the_student_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "chosen", lambda _: {"tiny": TINY})
    cached.run(json=tmp_path / "cached.json", size=8, batch=4, rounds=3, batches=2)
    results = json.loads((tmp_path / "cached.json").read_text())["results"]
    works = results["pairs"]["tiny"]["works"]
    assert {name: len(own["rounds"]) for name, own in works.items()} == dict.fromkeys(
        ("alone", "cached", "matchdistill", "limit"), 3
    )
    assert works["alone"]["ratio"]["median"] == 1
    assert 0 < results["pairs"]["tiny"]["reading"] < sum(works["cached"]["rounds"])


def test_a_step_reads_every_batch_in_turn_and_runs_no_teacher(tmp_path):
    images, labels = random_batch(8, 4)
    step, cache = cached.cached(TINY, images, labels, tmp_path, torch.float32, 3)
    assert cache.runs == 3
    assert cache.empty(range(12)) == []
    shards, read = cache._shards, []
    usual = shards.read
    shards.read = lambda number, pixels: read.append((number, pixels)) or usual(number, pixels)
    for _ in range(4):
        step()
    assert cache.runs == 3
    expected = [(number, checksum(images[number % 4])) for number in [*range(12), *range(4)]]
    assert read == expected
    cache.close()
    with pytest.raises(AssertionError):
        cache.empty([0])
