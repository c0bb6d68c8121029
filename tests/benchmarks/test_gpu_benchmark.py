"""What a GPU is asked, at toy size on a CPU: what is in the results, and what happens where the time is short."""

import functools
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_page, gpu_parts, page, projection
from benchmarks.gpu_parts import FORMS, Item, Part, Scale
from benchmarks.pairs import Pair, random_batch
from networks import PLAIN_TAPS, Plain

ROOT = Path(__file__).parents[2]
TINY = Pair(functools.partial(Plain, 8), functools.partial(Plain, 4), tuple(PLAIN_TAPS), reruns=True)
SCALE = Scale("cpu", size=8, batch=3, rounds=2, batches=2, refresh_rounds=1, whole=False)


def here(work, args, seconds):
    """Works in this process, which no one ends."""
    work(*args)


@pytest.fixture
def tiny(monkeypatch):
    for module in (gpu, gpu_parts):
        monkeypatch.setattr(module, "chosen", lambda _: {"tiny": TINY})
    monkeypatch.setattr(gpu_parts, "FORMS", {name: FORMS[name] for name in ("float32", "bf16 + channels_last")})
    monkeypatch.setattr(gpu_parts, "suite", lambda: {"passed": [], "failed": [], "skipped": ["one"]})
    # A compiled loss takes a minute on a CPU: the slow test has one.
    monkeypatch.setattr(gpu_parts, "LOSS_COMPILED", ("limit", "matchdistill"))


def read(file):
    return json.loads(file.read_text())["results"]


def test_all_that_is_measured_is_in_the_file(tiny, tmp_path):
    assert gpu.measure_all(SCALE, tmp_path / "gpu.json", 1000, here) == []
    found = read(tmp_path / "gpu.json")
    parts = found["parts"]
    assert list(parts) == list(gpu_parts.PARTS)
    assert all(part["missing"] == [] and part["failed"] == {} and part["why"] is None for part in parts.values())
    forms = parts["step"]["found"]["tiny"]
    assert list(forms) == ["float32", "bf16 + channels_last"]
    for works in forms.values():
        assert list(works) == ["limit", "matchdistill", "prepared", "alone"]
        assert works["limit"]["ratio"]["median"] == 1
        assert all(len(own["rounds"]) == 2 and own["seconds"] > 0 for own in works.values())
    refresh = parts["refresh"]["found"]["tiny"]["float32"]
    assert refresh["images"]["matchdistill"] == 6
    assert "original" not in refresh["per image"]
    memory = parts["memory"]["found"]["tiny"]
    assert 0 < memory["step, limit"] < memory["step, matchdistill"]
    kernels = parts["profile"]["found"]["tiny"]["kernels of the loss"]
    assert kernels["aten::copysign_"] > 0
    assert "aten::mkldnn_convolution" not in kernels
    waits = parts["synchronisations"]["found"]["tiny"]["synchronisations"]
    assert waits["step, matchdistill"] == {"count": None, "lines": {}}
    own = found["projection"]["tiny"]
    fastest = forms[own["form"]]["matchdistill"]["seconds"]
    assert fastest == min(works["matchdistill"]["seconds"] for works in forms.values())
    assert own["epoch"] == pytest.approx(projection.IMAGES / 8 * fastest / 3)
    assert_shown(tmp_path / "gpu.json", forms, refresh, memory, kernels)


def assert_shown(file, forms, refresh, memory, kernels):
    """The section of the page has the numbers of the file."""
    text = gpu_page.section(json.loads(file.read_text()))
    step = forms["float32"]["matchdistill"]
    assert f"| tiny | float32 | matchdistill | {1000 * step['seconds']:.1f} | {step['ratio']['median']:.3f} |" in text
    ratio = refresh["per image"]["matchdistill"]["ratio"]["median"]
    assert "### A refresh of 6 images" in text
    assert f" | {ratio:.3f} | " in text
    assert f"| {memory['step, matchdistill'] / memory['step, limit']:.3f} |" in text
    assert "| tiny | step, limit | None |  |" in text
    assert "0 passed, 0 failed, 1 skipped" in text
    assert f"| all | {1000 * sum(kernels.values()):.3f} |" in text
    assert "Not measured" not in text


def test_the_page_names_what_was_not_measured():
    part = {"found": {}, "missing": [], "failed": {}, "why": None}
    parts = dict.fromkeys(gpu_parts.PARTS, part)
    parts["compile"] = {**part, "missing": ["a, compiled step, float32"], "why": "the time was over after 90 s"}
    parts["memory"] = {**part, "failed": {"a, step, limit": "RuntimeError: out of memory"}}
    results = {"size": 8, "batch": 2, "refresh images": 4, "parts": parts, "projection": {}}
    text = gpu_page.section({"machine": {"device": "a GPU"}, "results": results})
    assert "- compile: a, compiled step, float32 (the time was over after 90 s)" in text
    assert "- memory: a, step, limit failed, RuntimeError: out of memory" in text
    assert "### " not in text


def test_what_fails_is_named_and_the_rest_is_measured(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("CUDA out of memory\nand more")

    items = [Item("a", "one", fails), Item("a", "two", lambda: 2), Item("b", "one", lambda: 3)]
    monkeypatch.setattr(gpu, "PARTS", {"step": Part(lambda scale: iter(items), 1.0)})
    monkeypatch.setattr(gpu, "chosen", lambda _: {})
    failed = gpu.measure_all(SCALE, tmp_path / "gpu.json", 100, here)
    assert failed == ["step: a, one (RuntimeError: CUDA out of memory)"]
    part = read(tmp_path / "gpu.json")["parts"]["step"]
    assert part["found"] == {"a": {"two": 2}, "b": {"one": 3}}
    assert part["failed"] == {"a, one": "RuntimeError: CUDA out of memory"}
    assert part["missing"] == []


def test_what_is_not_likely_to_be_done_in_time_is_not_begun_and_named(tmp_path, monkeypatch, capsys):
    """Items of 20 s, of which 45 s see two; the second part has what the first one left."""
    now = [1000.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def work():
        now[0] += 20
        return now[0]

    items = [Item("a", str(number), work) for number in range(4)]
    parts = {"step": Part(lambda scale: iter(items), 0.5), "refresh": Part(lambda scale: iter(items), 0.5)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "chosen", lambda _: {})
    assert gpu.measure_all(SCALE, tmp_path / "gpu.json", 90, here) == []
    first, second = read(tmp_path / "gpu.json")["parts"].values()
    assert list(first["found"]["a"]) == ["0", "1"]
    assert first["missing"] == ["a, 2", "a, 3"]
    assert first["why"] == "its 45 s were too few"
    assert (first["seconds"], first["share"], second["share"]) == (40, 45, 50)
    assert "step: 40 of 45 s; not measured: a, 2; not measured: a, 3" in capsys.readouterr().out


def endless(file, seconds):
    Path(file).write_text("begun")
    subprocess.run([sys.executable, "-c", f"import time; time.sleep({seconds})"], check=True)


@pytest.mark.slow
def test_a_part_is_ended_with_all_that_it_started(tmp_path):
    marker = 3600 + time.time() % 1  # found among all processes
    said = gpu.alone(endless, (tmp_path / "begun", marker), 60.0)
    assert (tmp_path / "begun").exists()
    assert said == "the time was over after 60 s"
    assert (
        str(marker) not in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=True).stdout
    )


def fail():
    raise SystemExit(3)


@pytest.mark.slow
def test_a_process_that_dies_is_told():
    assert gpu.alone(fail, (), 120.0) == "its process ended with 3"


def test_waits_are_counted_by_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(gpu_parts, "synchronize", lambda device: None)

    def work():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = gpu_parts.waits(work, "cuda")
    assert found["count"] == 3
    ((line, times),) = found["lines"].items()
    assert line.startswith("benchmarks/test_gpu_benchmark.py:")
    assert times == 3
    assert modes == ["warn", 0]


def test_a_form_is_that_of_networks_images_and_autocast():
    images, _ = random_batch(8, 2)
    form = FORMS["bf16 + channels_last"]
    teacher, _ = form.pair(TINY).networks(images)
    assert teacher.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert form.images(images).is_contiguous(memory_format=torch.channels_last)
    with form.autocast("cpu"):
        assert teacher(images).dtype == torch.bfloat16
    assert FORMS["float32"].pair(TINY) is TINY


def test_a_toy_result_is_no_measurement_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {"tests": Part(lambda scale: iter([Item("a", "one", lambda: 1)]), 1.0)})
    monkeypatch.setattr(gpu, "alone", here)
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # then it is so without being asked for
    gpu.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_toy.json"]
    assert "## A large GPU\n\nNot measured yet" in page.page(page.read())


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_the_command_at_toy_size(tmp_path):
    """What a busy machine has no time for is named; nothing fails."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", str(tmp_path), "--toy", "true", "--seconds", "400"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    parts = read(tmp_path / "gpu_toy.json")["parts"]
    assert list(parts) == list(gpu_parts.PARTS)
    unmeasured = [name for name, part in parts.items() if not part["found"]]
    assert done.returncode == (1 if unmeasured else 0), done.stdout + done.stderr
    assert all(f"{name}: nothing was measured" in done.stderr for name in unmeasured)
    for name, part in parts.items():
        assert part["failed"] == {}, name
        assert (part["why"] is None) == (part["missing"] == [] and part["found"] != {}), name
    assert "limit" in parts["step"]["found"]["resnet50 -> mobilenet_v2"]["float32"]
