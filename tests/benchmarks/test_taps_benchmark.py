"""The judge of taps: what leads to a value, stages and doubts by hand-made values, the runner, and the table."""

import os
import time

import pytest
import torch
from torch import nn

from benchmarks import reach, taps, taps_doubts, taps_rows, taps_table, zoo
from benchmarks.reach import Value
from benchmarks.taps_doubts import Side


class Branches(nn.Module):
    """A trunk, a branch that is added to it, one that only leads elsewhere, and one that is cut off from the gradient."""

    def __init__(self):
        super().__init__()
        self.trunk, self.branch, self.exit, self.cut, self.unused = (nn.Conv2d(3, 3, 1) for _ in range(5))

    def forward(self, x):
        trunk = self.trunk(x)
        return torch.relu(trunk + self.branch(trunk) + self.cut(trunk).detach()), self.exit(trunk)


def test_what_leads_to_a_value_is_what_a_backward_pass_gives_a_gradient():
    torch.manual_seed(0)
    model = Branches()
    for place, expected in ((0, {"trunk", "branch"}), (1, {"trunk", "exit"})):
        model.zero_grad()
        value = model(torch.randn(2, 3, 4, 4))[place]
        found = reach.leading_to([value])
        value.backward(torch.randn_like(value))
        with_gradient = {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None}
        assert {name.split(".")[0] for name, weight in model.named_parameters() if id(weight) in found} == expected
        assert with_gradient == expected


def test_values_are_taken_before_what_follows_changes_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.PReLU(), nn.ReLU(inplace=True)), nn.ReLU(inplace=True))
    with reach.returned(model, ["0", "1"]) as values:
        model(torch.randn(2, 3, 4, 4))
    assert [len(reach.leading_to(values[path])) for path in ("0", "1")] == [2, 3]
    assert (values["0"][0] < 0).any()


@pytest.mark.parametrize(
    ("shape", "options", "sizes"),
    [
        ((2, 64, 7, 7), {}, (7, 7)),
        ((2, 7, 7, 64), {}, (7, 7)),
        ((2, 14, 7, 7), {"channels": 14}, (7, 7)),
        ((2, 7, 7, 7), {"channels": 7}, (7, 7)),
        ((2, 64, 7, 14), {}, (7, 14)),
        ((2, 8, 16, 16, 96), {}, (8, 16, 16)),
        ((2, 96, 8, 16, 16), {}, (8, 16, 16)),
        ((2, 50, 64), {}, (50,)),
        ((2, 64, 50), {"sequence": True}, (50,)),
        ((2, 64, 49), {"channels": 64}, (49,)),
    ],
)
def test_positions_are_told_from_channels(shape, options, sizes):
    assert reach.position_sizes(shape, **options) == sizes


def value(name, sizes, parameters, channels=8):
    return Value(name, (zoo.BATCH, channels, *sizes), sizes, frozenset(parameters))


def test_a_stage_ends_with_its_last_feature_and_owns_what_is_new_in_it():
    features = [
        value("stem", (16, 16), {1}),
        value("a", (8, 8), {1, 2}),
        value("b", (8, 8), {1, 2, 3}),
        value("pool", (4, 4), {1, 2, 3}),
        value("c", (2, 2), {1, 2, 3, 4}),
        value("pooled", (1, 1), {1, 2, 3, 4, 5}),
    ]
    assert [(end.name, own) for end, own in taps.deepest_stages(features)] == [
        ("stem", {1}),
        ("b", {2, 3}),
        ("c", {4}),
    ]


def test_tokens_lie_on_the_map_that_they_are_of():
    tokens = value("tokens", (17,), {1})
    assert reach.same_size(tokens, value("map", (4, 4), {1}))
    assert not reach.same_size(tokens, value("map", (8, 8), {1}))
    assert reach.same_size(value("valid", (71, 71), {1}), value("map", (73, 73), {1}))
    assert not reach.same_size(value("coarse", (4, 4), {1}), value("fine", (8, 8), {1}))


def test_a_stage_is_judged_by_the_best_tap_on_its_map():
    stage = value("end", (4, 4), {1, 2, 3}), frozenset({2, 3})
    sizes = {1: 5, 2: 10, 3: 30}
    start, whole, coarse = (
        value("start", (4, 4), {1, 2}),
        value("whole", (4, 4), {1, 2, 3}),
        value("c", (2, 2), {1, 2, 3}),
    )
    assert taps.judged(stage, [start, coarse], sizes) == {
        "stage": "end",
        "sizes": (4, 4),
        "tap": "start",
        "lacks": 0.75,
    }
    assert taps.judged(stage, [start, whole], sizes)["lacks"] == 0
    assert taps.judged(stage, [coarse], sizes)["tap"] is None


WEIGHTS = dict.fromkeys(range(10), 100)
PYRAMID = [value("a", (16, 16), {0}), value("b", (8, 8), {0, 1, 2}), value("c", (4, 4), {0, 1, 2, 3})]


def side(found, features=PYRAMID, heads=zoo.HEADS):
    return Side(features, found, WEIGHTS, heads)


def test_a_good_side_has_no_doubts():
    good = side(
        [value("layer1:output", (16, 16), {0}), value("l2", (8, 8), {0, 1, 2}), value("l3", (4, 4), {0, 1, 2, 3})]
    )
    assert good.doubts() == []
    assert good.guided == 1
    assert taps_doubts.doubts(good, good) == []


@pytest.mark.parametrize(
    ("found", "doubt"),
    [
        ([value("down:output", (8, 8), {0, 1})], "down:output leaves out 50% of b"),
        ([value("classifier.2:input", (4, 4), {0, 1, 2, 3, 9})], "classifier.2:input in the head"),
        ([value("up:output", (16, 16), {0, 1, 2, 3, 9})], "up:output in a decoder"),
        ([value("l3", (4, 4), {0, 1, 2, 3}), value("l1", (16, 16), {0})], "l1 does not follow l3"),
        ([Value("win", (8, 8, 4, 4), (8, 4), frozenset({0}))], "win has no batch axis (8, 8, 4, 4)"),
    ],
)
def test_what_an_expert_would_look_at_is_flagged(found, doubt):
    assert doubt in side(found).doubts()


def test_one_resolution_has_positions_at_depths_apart():
    blocks = [value(f"block{number}", (17,), range(number + 1)) for number in range(10)]
    even = side([blocks[number] for number in (2, 4, 7, 9)], blocks)
    assert even.doubts() == []
    assert side(blocks[:4], blocks).doubts() == []
    stuck = [*blocks[:2], value("again", (17,), range(2)), blocks[9]]
    assert side(stuck, blocks).doubts() == ["depths 10% 20% 20% 100%"]
    assert taps_doubts.doubts(even, side(blocks[:4], blocks))[0] == "60% of the body unguided"


def test_pairs_are_compared_by_stride():
    student = side([value("s3", (4, 4), {0, 1, 2, 3})])
    wrong = side([value("t2", (8, 8), {0, 1, 2})])
    assert "t2 has 2.0 times the stride of s3" in taps_doubts.doubts(wrong, student)
    coarse_only = Side(PYRAMID[:2], [value("t2", (8, 8), {0, 1, 2})], WEIGHTS, zoo.HEADS)  # it has no coarser map
    assert not any("stride" in doubt for doubt in taps_doubts.doubts(coarse_only, student))
    assert taps_doubts.octaves(value("video", (8, 4, 4), {0}), value("other", (2, 8, 8), {0})) == 1
    assert taps_doubts.octaves(value("sequence", (16,), {0}), value("other", (64,), {0})) == 2
    assert taps_doubts.octaves(value("tokens", (16,), {0}), value("map", (8, 8), {0})) == 1


def test_too_few_positions_are_flagged():
    one = side([value("l3", (4, 4), {0, 1, 2, 3})])
    assert taps_doubts.doubts(one, one) == ["1 positions of 3"]


def work(name):
    if name == "dies":
        os._exit(3)
    if name == "slow":
        time.sleep(60)
    if name == "raises":
        raise ValueError("it is broken")
    if name == "missing":
        raise ImportError("no such library")
    return {"pid": os.getpid()}


def test_rows_that_fail_do_not_stop_the_others():
    rows = {}
    taps.each_in_a_process(work, ["a", "raises", "missing", "dies", "b", "slow"], rows.__setitem__, 1, 2.0)
    assert list(rows) == ["a", "raises", "missing", "dies", "b", "slow"]
    assert rows["raises"]["error"] == "ValueError: it is broken"
    assert rows["missing"]["skipped"] == "no such library"
    assert rows["dies"]["error"] == "its process died"
    assert rows["slow"]["error"] == "took more than 2 s"
    assert len({os.getpid(), rows["a"]["pid"], rows["b"]["pid"]}) == 3


def test_the_table_counts_and_gives_reasons(monkeypatch):
    name = "pair timm:a -> timm:b"
    monkeypatch.setitem(taps_table.REVIEWED, name, "it is so")
    tap = {"teacher": "layer1:output", "student": "l1.act:input", "channels": [64, 32], "sizes": [[8, 8], [8, 8]]}
    costs = {"seconds": 0.5, "MiB": 3.0, "changed": False, "taps": [tap]}
    stages = [
        {"stage": "b", "sizes": [4, 4], "tap": None, "lacks": 1.0},
        {"stage": "c", "sizes": [2, 2], "tap": "t", "lacks": 0.004},
    ]
    rows = {
        "stages timm:a": {**costs, "stages": stages},
        "stages timm:c": {"error": "ValueError: a|b"},
        "stages timm:c depth=2": {**costs, "stages": stages[1:]},
        name: {**costs, "guided": 0.9, "flags": ["10% of the body unguided"]},
        "pair timm:a -> timm:c": {**costs, "guided": 1.0, "flags": []},
        "pair monai:a -> timm:c": {"skipped": "monai is not installed"},
    }
    lines = taps_table.summary(rows)
    assert lines[0] == "timm: 2 of 3 stages of 3 models are tapped (2 of them but for a norm or scale); 1 models fail"
    assert lines[-2] == "2 pairs: 1 good, 1 flagged (1 of them reviewed and right), 0 fail"
    assert lines[-1] == "1 rows skipped"
    text = taps_table.table(rows)
    assert "| timm:a | 1 of 2 | b (4 x 4) has no tap |" in text
    assert r"a\|b" in text
    assert "layer1 (64, 8 x 8) → l1.act in (32, 8 x 8)" in text
    assert "10% of the body unguided (right: it is so)" in text


def test_every_row_names_a_library_and_is_there_once():
    names = [*taps_rows.STAGES, *(spec for pair in taps_rows.PAIRS for spec in pair.partition(" @ ")[0].split(" -> "))]
    for name in names:
        *wrappers, spec = name.split(" of ")
        assert spec.partition(":")[0] in zoo.LIBRARIES, name
        assert set(wrappers) <= set(zoo.WRAPPERS), name
    assert len(set(taps_rows.STAGES)) == len(taps_rows.STAGES)
    assert len(set(taps_rows.PAIRS)) == len(taps_rows.PAIRS) >= 250
    rows = {f"stages {model}" for model in taps_rows.STAGES} | {f"pair {pair}" for pair in taps_rows.PAIRS}
    assert set(taps_rows.REVIEWED) <= rows


def test_networks_are_named_by_library_options_and_wrappers(monkeypatch):
    def built(name, **options):
        return zoo.Network(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train(), (name, options), [("0", 4)])

    monkeypatch.setitem(zoo.LIBRARIES, "toy", (built, "torch"))
    network = zoo.build("parallel of bfloat16 of toy:net depth=2 act=relu widths=[1,2]")
    assert network.example == ("net", {"depth": 2, "act": "relu", "widths": [1, 2]})
    assert isinstance(network.model, nn.DataParallel)
    assert network.model.module[0].weight.dtype == torch.bfloat16
    assert network.features == [("module.0", 4)]
    assert not network.model.training
    monkeypatch.setitem(zoo.LIBRARIES, "toy", (built, "no_such_package"))
    with pytest.raises(ImportError, match="no_such_package is not installed"):
        zoo.build("toy:net")


def test_stages_are_found_by_numbers_and_names():
    model = nn.ModuleDict({"layer1": nn.ModuleDict({"a": nn.ReLU()}), "layer22": nn.ReLU(), "layers": nn.ReLU()})
    assert [path for path, _ in zoo.numbered(model, "layer#")] == ["layer1", "layer22"]
    assert [path for path, _ in zoo.numbered(model, "layer#.*", "layers")] == ["layer1.a", "layers"]


def test_a_pair_is_measured():
    row = taps.measure("pair timm:resnet18 -> timm:resnet10t @ 64")
    assert row["flags"] == []
    assert row["guided"] == 1
    assert [tap["sizes"][1] for tap in row["taps"]] == [[16, 16], [8, 8], [4, 4], [2, 2]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    """timm:resnet10t timm:mobilenetv2_035 timm:darknet17 timm:hgnetv2_b0 timm:ese_vovnet19b_slim_dw timm:efficientnetv2_rw_t
    timm:levit_128s timm:efficientvit_m0 timm:fastvit_t8 timm:tiny_vit_5m_224 timm:mobilevitv2_050 timm:shvit_s1
    timm:convnext_zepto_rms timm:pvt_v2_b0 timm:vit_tiny_patch16_224""".split(),
)
def test_the_four_deepest_stages_of_a_family_are_tapped(model):
    row = taps.measure(f"stages {model}")
    wrong = [taps_table.described(stage) for stage in row["stages"] if stage["lacks"] > taps_table.NORM]
    assert not wrong
    assert not row["changed"]
