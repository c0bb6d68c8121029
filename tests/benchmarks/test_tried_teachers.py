"""Faster teachers that were tried: what they give is near to what the teacher gives, and what is timed is a step."""

import copy
import functools
import json

import pytest
import torch

from benchmarks import pairs, tried_teachers
from benchmarks.pairs import Pair, random_batch
from matchdistill import engine
from networks import PLAIN_TAPS, Plain

TINY = Pair(lambda: Plain(8), lambda: Plain(4), tuple(PLAIN_TAPS), reruns=True)
IMAGES, LABELS = random_batch(8, 4)


def test_a_teacher_of_8_bits_is_near_to_itself():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    compare, losses = engine._compare, []
    for prepare in (None, functools.partial(tried_teachers.in_int8, IMAGES)):
        distiller = TINY.distiller(IMAGES, prepare=prepare)
        distiller.refresh([IMAGES])
        losses.append(distiller(IMAGES)[1].item())
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    assert engine._compare is compare


def test_the_students_step_is_the_same_beside_a_thread(monkeypatch):
    networks = TINY.networks(IMAGES)
    student, expected = networks[1], copy.deepcopy(networks[1])
    monkeypatch.setattr(Pair, "networks", lambda *_: networks)
    threads = torch.get_num_threads()
    tried_teachers.in_a_thread(TINY, IMAGES, LABELS)()
    assert torch.get_num_threads() == threads
    pairs.training_step(lambda images: (expected(images), 0.0), expected.parameters(), IMAGES, LABELS)()
    for one, other in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("threads", [1, 2])
def test_works_are_timed_beside_the_limit(threads, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(pairs, "chosen", lambda _: {"tiny": TINY})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    tried_teachers.run(json=tmp_path / "tried.json", size=8, batch=4, rounds=2)
    found = json.loads((tmp_path / "tried.json").read_text())["results"]["pairs"]["tiny"]
    names = ["limit", tried_teachers.ENGINE, tried_teachers.INT8, tried_teachers.THREAD]
    assert list(found["works"]) == names[: 2 + threads]
    assert list(found["loss differences"]) == names[1:3]
