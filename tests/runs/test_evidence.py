"""What a run leaves to be seen, held to slow loops over the networks that it ended with."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracles
from matchdistill.capture import Capture
from matchdistill.files import read_json
from matchdistill.measuring import network_costs
from matchdistill.models import load_weights, save_weights
from matchdistill.runs import evidence, looking
from matchdistill.runs.build import build_module
from matchdistill.runs.looking import _as_images
from matchdistill.runs.metrics import read_metrics
from matchdistill.runs.train import fit
from matchdistill.taps import Tap
from matchdistill.tasks.classification.module import ClassificationModule
from matchdistill.tasks.detection.module import DetectionModule
from records import settings

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")

EVERY = ("--distillation.method=mgd-amp", "--distillation.refresh_every=1")


class StopError(Exception):
    pass


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(0, 2**16))
def test_a_heat_map_has_the_matching_on_its_diagonal(students, group, more, seed):
    teachers = students * group + more
    chance = torch.Generator().manual_seed(seed)
    cost = torch.rand(students, teachers, generator=chance)
    index = torch.randperm(teachers, generator=chance)[: students * group].reshape(students, group)
    heat = evidence.heat_map(cost, index)
    means = sorted((float(cost[row, index[row]].mean()), row) for row in range(students))
    columns = [column for _, row in means for column in index[row].tolist()]
    columns += [column for column in range(teachers) if column not in columns]
    for place, (_, row) in enumerate(means):
        for at, column in enumerate(columns):
            assert heat[place, at] == cost[row, column]


def test_a_large_heat_map_is_averaged(monkeypatch):
    monkeypatch.setattr(evidence, "HEAT", (2, 3))
    cost = torch.arange(24.0).reshape(4, 6)
    heat = evidence.heat_map(cost, torch.arange(4)[:, None])
    order = sorted(range(4), key=lambda row: float(cost[row, row]))
    columns = [*order, 4, 5]
    expected = [[np.mean([float(cost[order[2 * i + a], columns[2 * j + b]]) for a in (0, 1) for b in (0, 1)])
                 for j in range(3)] for i in range(2)]  # fmt: skip
    np.testing.assert_allclose(heat.numpy(), expected)


def test_students_without_a_teacher_channel_come_last():
    heat = evidence.heat_map(torch.tensor([[5.0], [1.0]]), torch.tensor([[-1], [0]]))
    assert heat.tolist() == [[1.0], [5.0]]


def test_operations_and_latency():
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 8 * 8, 7)).eval()
    found = network_costs(network, torch.zeros(1, 3, 8, 8))
    assert found["operations"] == 2 * (3 * 5 * 9 * 8 * 8 + 5 * 8 * 8 * 7)
    assert 0 < found["latency"] < 1


def test_measuring_leaves_the_network_as_it_was():
    class Counts(nn.Linear):
        calls, last = 0, None

        def forward(self, values):
            self.calls, self.last = self.calls + 1, values
            self.weight.data *= 0.5
            return super().forward(values)

    network = Counts(3, 3).eval()
    weight = network.weight.clone()
    network_costs(network, torch.zeros(1, 3))
    assert network.calls == 0
    assert network.last is None
    assert network.weight.equal(weight)


def test_operations_of_attention():
    """Projections of 3 + 1 matrices, and two products of tokens with tokens; not every kernel's are counted."""
    tokens, width = 6, 8

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

        def forward(self, values):
            return self.attention(values, values, values, need_weights=False)[0]

    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():  # as in a look, where the module takes its fast path
        found = network_costs(Attends().eval(), torch.zeros(1, tokens, width))
    assert found["operations"] == 2 * (4 * tokens * width * width + 2 * tokens * tokens * width)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_evidence_is_readable_by_whom_the_results_are(tmp_path):
    before = os.umask(0o022)
    try:
        evidence.save(tmp_path / "seen.safetensors", {"a": torch.zeros(1)}, {})
        save_weights(nn.Linear(1, 1), tmp_path / "student.safetensors")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [0o644, 0o644]


def test_damaged_evidence_does_not_stop_the_training(tiny, tmp_path, monkeypatch):
    """A run that was cut goes on, whatever is wrong with what it has left to see."""
    losses, seen = ClassificationModule.batch_losses, []

    def cut(self, batch):
        seen.append(batch)
        if len(seen) == 5:
            raise StopError
        return losses(self, batch)

    out = tmp_path / "run"
    monkeypatch.setattr(ClassificationModule, "batch_losses", cut)
    with pytest.raises(StopError):
        fit(tiny(*EVERY), out, quiet=True)
    monkeypatch.setattr(ClassificationModule, "batch_losses", losses)
    (out / evidence.REFRESHES).write_text('{"refreshes": [')
    with pytest.warns(UserWarning, match=r"could not keep .*: ValueError: .*refreshes\.json"):
        fit(tiny(*EVERY), out, resume=True, quiet=True)
    assert (out / "metrics.json").exists()


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "seen.safetensors"
    assert evidence.load(path) is None
    evidence.save(path, {"a": torch.tensor([1.5]), "b": torch.tensor([[7]])}, {"told": ["x", None, 0.25]})
    tensors, told = evidence.load(path)
    assert (tensors["a"].tolist(), tensors["b"].tolist(), told) == ([1.5], [[7]], {"told": ["x", None, 0.25]})
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"seen\.safetensors is damaged .*: remove it"):
        evidence.load(path)


def features(network, taps, images):
    """The tapped values of a network, as float64 arrays."""
    capture = Capture(network, taps)
    with torch.no_grad(), capture() as captured:
        network.eval()(images)
    return [captured.values[number].double().numpy() for number in range(len(taps))]


def test_the_trained_student_is_compared_with_its_teacher(tiny, tmp_path, monkeypatch):
    """Similarities and ignored shares, by loops over the images that the recipe has for it."""
    recipe = tiny(*EVERY, "--data.train_limit=20", "--data.augment=false")
    out = tmp_path / "run"
    fit(recipe, out, quiet=True)
    tensors, told = evidence.load(out / evidence.FINAL)
    module = build_module(recipe)
    load_weights(module.network(), out / "student.safetensors")
    saved = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(saved)
    images, _ = next(iter(recipe.data.refresh_dataloader(looking.LOOKED_AT, 2)))
    assert told["images"] == len(images) == 20
    positions = module.distiller.positions
    own = features(module.network(), [Tap.parse(str(position.student)) for position in positions], images)
    others = features(module.teacher, [Tap.parse(str(position.teacher)) for position in positions], images)
    for number, position in enumerate(positions):
        cost = oracles.matching_cost(own[number], others[number])
        index = position.index.numpy()
        assert tensors[f"index{number}"].tolist() == index.tolist()
        similarity = [1 - np.mean([cost[row, column] for column in index[row]]) / 2 for row in range(len(index))]
        np.testing.assert_allclose(tensors[f"similarity{number}"].numpy(), similarity, atol=2e-3)  # in 16 bits
        np.testing.assert_allclose(tensors[f"margin{number}"].numpy(), position.margin.numpy(), rtol=1e-3)
        target = oracles.reduce_channels(others[number], index, "amp")
        with torch.no_grad():
            normed = position.norm.eval()(torch.from_numpy(own[number]).float()).numpy()
        left = 0
        for place in np.ndindex(normed.shape):
            goal = max(target[place], float(position.margin[place[1]]))
            left += not (normed[place] > goal or goal > 0)
        assert told["ignored"][number] == pytest.approx(left / normed.size, abs=1e-3)


def test_pictures_are_of_the_best_and_the_worst_matched(tiny, tmp_path):
    recipe = tiny(*EVERY, "--student.options.width=3", "--teacher.options.width=4")
    out = tmp_path / "run"
    fit(recipe, out, quiet=True)
    tensors, told = evidence.load(out / evidence.PICTURES)
    assert [sorted(image) for image in told["images"]] == [["student", "teacher", "truth"]] * 4
    assert tensors["image0"].dtype == torch.uint8
    for number, position in enumerate(told["positions"]):
        similarity = position["similarity"]
        assert similarity == sorted(similarity, reverse=True)
        shape = tensors[f"student{number}"].shape
        assert shape == tensors[f"target{number}"].shape == (len(similarity), 4, *shape[2:])
        members = tensors[f"members{number}"]
        assert members.shape == (len(similarity), len(position["members"][0]), 4, *shape[2:])
        # The reduced target is the member of largest magnitude, where all members are shown.
        if position["group"] == members.shape[1]:
            strongest = members.abs().argmax(1, keepdim=True)
            torch.testing.assert_close(members.gather(1, strongest)[:, 0].abs(), tensors[f"target{number}"].abs())


def test_refreshes_are_kept_as_they_come(tiny, tmp_path):
    out = tmp_path / "run"
    fit(tiny(*EVERY), out, quiet=True)
    refreshes = evidence.read_refreshes(out)
    assert [(each["step"], each["epoch"], each["images"]) for each in refreshes] == [(0, 0, 60), (3, 1, 60)]
    assert refreshes[0]["churn"] == [None] * 3
    assert all(0 <= value <= 1 for value in refreshes[1]["churn"])
    assert all(each["seconds"] > 0 for each in refreshes)
    for name, place in ((evidence.FIRST, 0), (evidence.LAST, 1)):
        tensors, told = evidence.load(out / name)
        assert told["step"] == refreshes[place]["step"]
        for number, cost in enumerate(refreshes[place]["cost"]):
            assert 2 - 2 * float(tensors[f"similarity{number}"].float().mean()) == pytest.approx(cost, abs=5e-3)
    logged = json.loads((out / evidence.COSTS).read_text())
    assert logged["memory"] is None or logged["memory"] > 1e6
    assert logged["student"]["operations"] < logged["teacher"]["operations"]


@pytest.mark.parametrize("online", ["0", "1"])
@pytest.mark.parametrize("at", [4, 7])
def test_a_run_that_goes_on_keeps_the_refreshes_of_one_that_was_not_cut(tiny, tmp_path, monkeypatch, online, at):
    """Cut in the second epoch after its refresh, and at the start of the third one; a step is one of three."""
    arguments = (*EVERY, "--training.epochs=3", f"--distillation.refresh_online={online}")
    fit(tiny(*arguments), tmp_path / "whole", quiet=True)
    losses, seen = ClassificationModule.batch_losses, []

    def cut(self, batch):
        seen.append(batch)
        if len(seen) == at:
            raise StopError
        return losses(self, batch)

    monkeypatch.setattr(ClassificationModule, "batch_losses", cut)
    with pytest.raises(StopError):
        fit(tiny(*arguments), tmp_path / "cut", quiet=True)
    monkeypatch.setattr(ClassificationModule, "batch_losses", losses)
    fit(tiny(*arguments), tmp_path / "cut", resume=True, quiet=True)
    found = [evidence.read_refreshes(tmp_path / name) for name in ("whole", "cut")]
    for refreshes in found:
        for each in refreshes:
            del each["seconds"]
    assert found[0] == found[1]
    assert [each["step"] for each in found[0]] == [0, 3, 6]


@pytest.mark.parametrize(
    ("part", "what", "left"),
    [
        ("network_costs", "measure the networks", {evidence.PICTURES, evidence.FINAL}),
        ("_maps", "take pictures", {evidence.FINAL}),
        ("ignored", "compare the student with its teacher", {evidence.PICTURES}),
    ],
)
def test_a_look_that_fails_does_not_fail_the_run(tiny, tmp_path, monkeypatch, part, what, left):
    def fails(*_):
        raise RuntimeError("no space on the moon")

    monkeypatch.setattr(looking, part, fails)
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match=f"could not {what}: RuntimeError: no space on the moon"):
        metrics = fit(tiny(*EVERY), out, quiet=True)
    assert read_metrics(out) == metrics
    assert left == {name for name in (evidence.PICTURES, evidence.FINAL) if (out / name).exists()}


@pytest.mark.parametrize("method", ["none", "kd", "fitnets"])
def test_runs_without_a_matching_leave_their_networks_and_pictures(tiny, tmp_path, method):
    out = tmp_path / "run"
    fit(tiny(f"--distillation.method={method}"), out, quiet=True)
    assert evidence.read_refreshes(out) == []
    assert not (out / evidence.FINAL).exists()
    tensors, told = evidence.load(out / evidence.PICTURES)
    assert told["positions"] == []
    assert ("teacher" in told["images"][0]) == (method != "none")
    assert {"student", "memory"} <= set(read_json(out / evidence.COSTS))
    assert set(tensors) == {"image0", "image1", "image2", "image3"}


class Finder(nn.Module):
    """Finds the same in every image."""

    def forward(self, images):
        found = {"boxes": [[0, 0, 10, 5], [1, 2, 3, 4]], "scores": [0.75, 0.2], "labels": [2, 1]}
        return [{name: torch.tensor(value) for name, value in found.items()} for _ in images]


def test_what_a_detector_finds_is_told_where_it_is_sure():
    task = DetectionModule(Finder(), False, settings(method="none"))
    target = {"boxes": torch.tensor([[5.0, 5, 10, 10]]), "labels": torch.tensor([1])}
    images, told = task.gallery(([torch.zeros(3, 10, 20)], [target]), ["cat", "dog"])
    assert images[0].shape == (3, 10, 20)
    assert told == [{"truth": [["cat", None, 0.25, 0.5, 0.5, 1.0]], "student": [["dog", 0.75, 0.0, 0.0, 0.5, 0.5]]}]


def test_a_detector_leaves_boxes_in_shares_of_the_image(small, tmp_path):
    out = tmp_path / "run"
    recipe = small()
    fit(recipe, out, quiet=True)
    tensors, told = evidence.load(out / evidence.PICTURES)
    recipe.data.setup()
    numbers = [0, 1, 3, 4]  # of five, evenly
    images, targets = recipe.data.val_set.__getitems__(numbers)
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        height, width = image.shape[1:]
        assert tensors[f"image{number}"].shape == image.shape
        found = told["images"][number]
        expected = [
            [recipe.data.class_names[label - 1], None, *np.divide(box, [width, height, width, height])]
            for label, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True)
        ]
        for own, other in zip(found["truth"], expected, strict=True):
            assert own[:2] == other[:2]
            assert own[2:] == pytest.approx(other[2:], abs=1e-6)
        assert set(found) == {"truth", "student", "teacher"}
    assert len(told["positions"]) == len(evidence.load(out / evidence.FINAL)[1]["ignored"]) == 4
    assert not math.isnan(sum(evidence.load(out / evidence.FINAL)[1]["ignored"]))


def test_tokens_become_a_grid():
    maps = torch.arange(10.0).reshape(1, 1, 10)
    assert _as_images(maps, None).tolist() == [[[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]]
    assert _as_images(torch.ones(2, 3), None).shape == (2, 3, 1, 1)
    counted = torch.tensor([[[True, False]]])
    assert _as_images(torch.ones(1, 1, 1, 2), counted).tolist() == [[[[1, 0]]]]
    assert _as_images(torch.ones(1, 1, 112, 56), None).shape == (1, 1, 56, 28)
