"""Every measurement at a tiny size: what it reports, and that it measures what it says."""

import json

import pytest
import torch
from torch import nn

from benchmarks import assign, maps, memory, pairs, profiled, projection, refresh, scale, step
from benchmarks.pairs import Pair, chosen, random_batch
from matchdistill.prepare import prepared
from networks import PLAIN_TAPS, Plain


def teacher():
    return Plain(8)


def student():
    return Plain(4)


# Of functions of this module, as other processes make it too.
TINY = Pair(teacher, student, tuple(PLAIN_TAPS), reruns=True)


@pytest.fixture
def tiny(monkeypatch):
    """A pair of small networks in place of torchvision's."""
    monkeypatch.setattr(pairs, "chosen", lambda _: {"tiny": TINY})


def results(path):
    return json.loads(path.read_text())["results"]


def test_networks_are_equal_in_every_call_and_look_trained():
    images, _ = random_batch(8, 2)
    before = torch.get_rng_state()
    (first, _), (second, own) = TINY.networks(images), TINY.networks(images)
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    values = []
    own.bn0.register_forward_hook(lambda _, taken, __: values.append(taken[0]))
    own(images)
    torch.testing.assert_close(own.bn0.running_mean, values[0].mean((0, 2, 3)), atol=1e-6, rtol=1e-4)
    assert own.bn0.momentum == 0.1


def test_what_is_measured_is_saved_before_the_next_pair(monkeypatch, tmp_path):
    def measure(name, pair):
        if name == "second":
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    monkeypatch.setattr(pairs, "chosen", lambda _: {"first": TINY, "second": TINY})
    with pytest.raises(KeyboardInterrupt):
        pairs.by_pair("step", "cpu", tmp_path / "step.json", "all", {"size": 8}, measure)
    assert results(tmp_path / "step.json") == {"size": 8, "pairs": {"first": {"seconds": 1.0}}}


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_the_pairs_have_maps_of_equal_size(name):
    (pair,) = chosen(name).values()
    images, _ = random_batch(64, 2)
    distiller = pair.distiller(images)
    assert len(distiller.positions) == {"mobilenet_v2": 3, "resnet18": 4}[name]
    assert all(teacher == student for teacher, student in (position.spatial for position in distiller.positions))


def test_steps(tiny, tmp_path):
    names = ["matchdistill", "original", "fitnets", "kd", "alone"]
    step.run(json=tmp_path / "step.json", size=8, batch=3, rounds=2, only=names)
    found = results(tmp_path / "step.json")
    works = found["pairs"]["tiny"]["works"]
    assert list(works) == ["limit", *names]
    assert works["limit"]["ratio"]["median"] == 1
    assert all(len(own["rounds"]) == 2 and own["seconds"] > 0 for own in works.values())


@pytest.mark.parametrize("name", ["limit", "matchdistill", "original", "fitnets", "kd", "alone"])
def test_a_step_trains_the_student_alone(monkeypatch, name):
    made, networks = [], Pair.networks
    monkeypatch.setattr(Pair, "networks", lambda *own: made.append(networks(*own)) or made[-1])
    train = step.MAKERS[name](TINY, *random_batch(8, 3))
    teacher, student = made[0]
    before = [[weight.clone() for weight in network.parameters()] for network in (teacher, student)]
    train()
    changed = [
        [not torch.equal(one, other) for one, other in zip(weights, network.parameters(), strict=True)]
        for weights, network in zip(before, (teacher, student), strict=True)
    ]
    assert not any(changed[0])
    assert all(changed[1])


def test_works_are_chosen():
    assert "compiled" not in step.selection("cpu", False, None)
    assert {"compiled", "limit compiled"} < set(step.selection("cpu", True, None))
    bf16 = "prepared + bf16 + compile"
    assert bf16 in step.selection("cuda", False, None)
    assert bf16 not in step.selection("cpu", True, None)
    assert step.selection("cpu", False, ["kd"]) == ["limit", "kd"]
    with pytest.raises(ValueError, match="no work fitnet: expected some of limit, "):
        step.selection("cpu", False, ["fitnet"])


def test_the_loss_with_another_teacher_is_compared(monkeypatch):
    def distiller(pair, images, prepare=None):
        made = original(pair, images)
        if prepare is not None:
            with torch.no_grad():
                made.teacher.conv2.weight.mul_(1.001)
        return made

    original = Pair.distiller
    monkeypatch.setattr(Pair, "distiller", distiller)
    found = step.loss_differences(TINY, random_batch(8, 3)[0], {"prepared": prepared})
    assert list(found) == ["prepared"]
    assert 1e-6 < found["prepared"] < 1e-2


def test_maps(tiny, tmp_path):
    maps.run(json=tmp_path / "maps.json", size=8, batch=4, batches=2, rounds=2)
    found = results(tmp_path / "maps.json")["pairs"]["tiny"]
    assert list(found["works"]) == ["forwards", "matchdistill", "svd"]
    assert found["difference"] < 1e-8
    batches = [random_batch(8, 16)[0], random_batch(8, 12)[0]]
    distiller = TINY.distiller(batches[0], reduction="align")
    distiller.refresh(batches)
    for position, covariance in zip(distiller.positions, maps.covariances(TINY, batches), strict=True):
        expected = position.rotation.to(covariance)
        torch.testing.assert_close(maps.by_decomposition(covariance), expected, atol=1e-5, rtol=0)


def test_refreshes(tiny, tmp_path):
    refresh.run(json=tmp_path / "refresh.json", size=8, batch=2, images=6, original_images=4, rounds=2)
    found = results(tmp_path / "refresh.json")["pairs"]["tiny"]
    names = ["forwards", "matchdistill", "original", "matchdistill without assignments"]
    assert list(found["per image"]) == names
    assert list(found["images"].values()) == [6, 6, 4, 6]
    whole, without = (found["per image"][name]["rounds"] for name in (names[1], names[3]))
    assert all(more > less > 0 for more, less in zip(whole, without, strict=True))
    assert found["assignments"] > 0
    assert found["original assignments"] is None or found["original assignments"] > 0


def test_a_refresh_by_two_processes():
    found = refresh.measure_processes(TINY, 2, 1, size=8, batch=2, images=8)
    assert found["same matching"]
    assert {world: len(seconds) for world, seconds in found["seconds"].items()} == {"1": 1, "2": 1}


@pytest.mark.parametrize("options", [{"processes": 1}, {"processes": 2, "device": "cuda"}])
def test_processes_that_cannot_be_compared(options):
    with pytest.raises(ValueError, match="expected 0, or at least 2 on the CPU"):
        refresh.run(**options)


def test_assignments(tmp_path, monkeypatch):
    monkeypatch.delitem(assign.COSTS, "trained")
    assign.run(json=tmp_path / "assign.json", students=[6, 4], teachers=13, rounds=1)
    found = results(tmp_path / "assign.json")["costs"]
    assert list(found) == ["random, 6", "random, 4", "realistic, 6", "realistic, 4"]
    for each in found.values():
        assert 0 < each["mean cost"]["matchdistill"] < 2
        assert each["mean cost"]["scipy"] == pytest.approx(each["mean cost"]["matchdistill"], abs=1e-12)
        assert each["parts"] == 0  # so few are solved as a whole
        if assign.HAS_SOLVER:
            whole, building = (each["works"][name]["seconds"] for name in ("original", assign.PROBLEM))
            assert whole > 0 < building
    monkeypatch.setattr(assign, "HAS_SOLVER", False)
    assign.run(json=tmp_path / "assign.json", students=[6], teachers=13, rounds=1)
    assert list(results(tmp_path / "assign.json")["costs"]["random, 6"]["works"]) == ["matchdistill", "scipy"]


def test_parts_of_a_large_assignment_are_counted():
    found = assign.measure(assign.random_cost(128, 1024), 1, solver=False)
    assert found["parts"] >= 1
    assert found["mean cost"]["scipy"] == pytest.approx(found["mean cost"]["matchdistill"], abs=1e-12)


def test_costs_that_cannot_be_had_are_left_out(tmp_path, monkeypatch, capsys):
    def missing(students, teachers):
        raise ImportError("No module named 'efficientnet_lite_pytorch'")

    monkeypatch.setitem(assign.COSTS, "trained", missing)
    assign.run(json=tmp_path / "assign.json", students=[2], teachers=5, rounds=1)
    assert "trained: left out (No module named" in capsys.readouterr().out
    assert list(results(tmp_path / "assign.json")["costs"]) == ["random, 2", "realistic, 2"]


def test_trained_costs_are_of_the_last_maps():
    pytest.importorskip("efficientnet_lite_pytorch")
    try:
        cost = assign.trained_cost(20, 30)
    except ValueError as error:
        pytest.skip(str(error))  # no Fashion-MNIST
    assert cost.shape == (20, 30)
    torch.testing.assert_close(cost, assign.trained_cost(40, 50)[-20:, -30:], rtol=0, atol=1e-6)


def test_realistic_costs_have_structure():
    cost = assign.realistic_cost(16, 64, causes=4)
    assert cost.shape == (16, 64)
    assert cost.min() < 0.8 < 2 < cost.max()


def test_the_peak_of_tensors_is_of_what_lives_at_a_time():
    """Bytes: 4,000 of a weight that stays; 4,000 twice in a sum that is freed, from the second call on with 400 more."""
    weights = []

    def build():
        weights.append(torch.zeros(1000))

        def work():
            doubled = weights[0] * 2
            total = doubled + weights[0]
            del doubled
            weights.append(total[:100].clone())

        return work

    assert memory.tensor_peak(build) == 4000 + 400 + 2 * 4000
    assert torch.equal(weights[1], torch.zeros(100))


def test_memory(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "in_processes", lambda worker, arguments: [worker(*each) for each in arguments])
    memory.run(json=tmp_path / "memory.json", size=8, batch=2, only=["matchdistill"])
    found = results(tmp_path / "memory.json")["pairs"]["tiny"]
    assert list(found["step"]) == ["limit", "matchdistill"]
    limit, own = (each["tensors"] for each in found["step"].values())
    assert sum(weight.nbytes for weight in (*teacher().parameters(), *student().parameters())) < limit < own
    assert [(each["work"], each["images"]) for each in found["refresh"]] == [
        ("forwards", 4),
        ("forwards", 16),
        ("matchdistill", 4),
        ("matchdistill", 16),
    ]
    assert found["refresh"][2]["tensors"] == found["refresh"][3]["tensors"]


def test_growth(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "SWEEPS", {"channels": (4, 8), "batch": (1, 2), "side": (2, 4), "positions": (1, 2)})
    monkeypatch.setattr(scale, "BASE", {"channels": 4, "batch": 2, "side": 2, "positions": 1})
    monkeypatch.setattr(scale, "STEP_SWEEPS", {"batch": (2, 3), "positions": (1, 3)})
    monkeypatch.setattr(scale, "STEP_BASE", {"batch": 2, "size": 8, "positions": 3})
    monkeypatch.setattr(scale, "chosen", lambda _: {"tiny": TINY})
    scale.run(json=tmp_path / "scale.json", rounds=1, step_rounds=1)
    found = results(tmp_path / "scale.json")
    assert list(found["features"]["channels"]) == ["loss", "update", "assignment"]
    assert list(found["features"]["side"]) == ["loss", "update"]
    assert found["features"]["batch"]["loss"]["values"] == [1, 2]
    assert len(found["step"]["positions"]["limit"]) == 2


def test_exponents_are_of_the_larger_half():
    values = [1, 2, 4, 8, 16]
    assert scale.exponent(values, [7, 7, 16, 64, 256]) == pytest.approx(2)
    assert scale.exponent(values, [7, 7, 16, -1, 256]) == pytest.approx(2)
    assert scale.exponent(values, [7, 7, -1, -1, 256]) is None


def test_operations_and_graphs_are_counted():
    layer = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    images = torch.zeros(2, 3, 5, 5)
    assert projection.operations(lambda: layer(images)) == 2 * 2 * 25 * 3 * 4
    # The input, the convolution's output, the norm's (in place the activation's too), and its mean and deviation.
    assert projection.saved(layer, lambda: layer(images)) == 4 * (2 * 25 * (3 + 4 + 4) + 4 + 4)


def test_the_projection_is_what_its_formula_says(monkeypatch):
    monkeypatch.setattr(projection, "SIZE", 64)
    count = projection.counted(chosen("resnet18")["resnet50 -> resnet18"])
    assert not count["depth-wise"]
    assert count["accumulators"] == 8 * sum(teacher * (teacher // 4 + 2) for teacher in (256, 512, 1024, 2048))
    assert count["teacher's features"] == 4 * sum(
        64 * width * side**2 for width, side in ((4, 16), (8, 8), (16, 4), (32, 2))
    )
    own = projection.project(count, 1.5)
    step = (count["teacher"] + 3 * count["student forward"]) / projection.SUSTAINED
    assert own["epoch"] == pytest.approx(1_281_167 / 8 * step)
    assert own["share"] == pytest.approx((own["refresh"] + 1.5) / own["epoch"])


def test_a_profile(tiny, tmp_path):
    profiled.run(json=tmp_path / "profile.json", size=8, batch=2, batches=2, rounds=2)
    found = results(tmp_path / "profile.json")["pairs"]["tiny"]
    assert found["step"]["limit"].keys() == found["step"]["matchdistill"].keys()
    assert found["step"]["limit"]["aten::mkldnn_convolution"] > 0
    assert found["step"]["limit"]["aten::copysign_"] == 0 < found["step"]["matchdistill"]["aten::copysign_"]
    assert (
        found["refresh"]["forwards"][profiled.ASSIGNMENT] == 0 < found["refresh"]["matchdistill"][profiled.ASSIGNMENT]
    )
