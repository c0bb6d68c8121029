"""Pairs of candidates, and the inputs that are tried without an example.

Axes: N images, C channels, H and W positions, T tokens.
"""

import pytest
import torch
from torch import nn

from matchdistill import find_taps
from matchdistill.candidates import Candidate
from matchdistill.choice import pair_candidates
from matchdistill.layout import image_layout
from matchdistill.taps import Tap
from matchdistill.trace import Operation
from networks import Plain


def stage(size: int, *depths: float) -> list[Candidate]:
    """Blocks of one map size, each at a share of the layers."""
    shape = (2, 8, size, size)
    operation = Operation(0, "add", "", (), shape, image_layout(shape, 1))
    return [Candidate(Tap(f"{size}-{depth}"), operation, depth) for depth in depths]


PYRAMID = [stage(32, 0.1, 0.2), stage(16, 0.3, 0.4), stage(8, 0.5, 0.7), stage(4, 0.9, 1.0)]


def paired(teacher: list[list[Candidate]], student: list[list[Candidate]], limit: int = 4) -> list[tuple[str, str]]:
    return [(one.tap.module, two.tap.module) for one, two in pair_candidates(teacher, student, limit)]


def test_stages_of_equal_stride() -> None:
    expected = [("32-0.2", "32-0.2"), ("16-0.4", "16-0.4"), ("8-0.7", "8-0.7"), ("4-1.0", "4-1.0")]
    assert paired(PYRAMID, PYRAMID) == expected
    assert paired(PYRAMID, PYRAMID, limit=2) == expected[2:]
    assert paired(PYRAMID[1:], PYRAMID) == expected[1:]


def test_stages_coarser_than_the_teachers_go_with_its_last_blocks_of_the_same_depth() -> None:
    teacher = [stage(32, 0.1), stage(16, 0.3, 0.5, 0.72, 0.9, 1.0)]
    student = [stage(32, 0.2), stage(16, 0.45), stage(8, 0.7), stage(4, 1.0)]
    assert paired(teacher, student) == [
        ("32-0.1", "32-0.2"),
        ("16-0.5", "16-0.45"),
        ("16-0.72", "8-0.7"),
        ("16-1.0", "4-1.0"),
    ]


def test_a_network_of_one_resolution_goes_by_depth() -> None:
    blocks = [stage(14, *(number / 12 for number in range(1, 13)))]
    student = [stage(32, 0.1), stage(16, 0.26), stage(8, 0.76), stage(4, 1.0)]
    assert [one for one, _ in paired(blocks, student)] == [f"14-{number / 12}" for number in (1, 3, 9, 12)]
    assert [two for _, two in paired(student, blocks)] == [f"14-{number / 12}" for number in (1, 3, 9, 12)]
    assert [one for one, _ in paired(blocks, [stage(7, *(number / 24 for number in range(1, 25)))])] == [
        f"14-{number / 12}" for number in (3, 6, 9, 12)
    ]


def test_fewer_blocks_than_stages() -> None:
    assert paired([stage(14, 0.5, 1.0)], PYRAMID) == [("14-0.5", "8-0.7"), ("14-1.0", "4-1.0")]


def test_videos_are_paired_by_height_and_width() -> None:
    def network(time_stride: int) -> nn.Module:
        strides = [(1, 2, 2), (time_stride, 2, 2), (time_stride, 2, 2)]
        layers = [
            layer for stride in strides for layer in (nn.LazyConv3d(4, 3, stride, 1), nn.LazyBatchNorm3d(), nn.ReLU())
        ]
        made = nn.Sequential(*layers)
        made(torch.zeros(2, 3, 8, 32, 32))
        return made

    found = find_taps(network(2), network(1), torch.zeros(2, 3, 8, 32, 32))
    assert [(str(one), str(two)) for one, two in found] == [(f"{n}:input", f"{n}:input") for n in (2, 5, 8)]


def test_sequences_and_videos_need_no_example() -> None:
    def network(width: int, kind: type[nn.Module], norm: type[nn.Module]) -> nn.Module:
        return nn.Sequential(
            kind(3, width, 3, 2, 1), norm(width), nn.ReLU(), kind(width, width, 3, 2, 1), norm(width), nn.ReLU()
        )

    for kind, norm in ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv3d, nn.BatchNorm3d)):
        found = find_taps(network(8, kind, norm), network(4, kind, norm))
        assert [str(two) for _, two in found] == ["2:input", "5:input"]


def test_what_fails_at_sizes_that_are_tried_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    def sized(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 32 * 32, 2))

    assert find_taps(sized(4), sized(2))
    assert not caplog.records


def test_one_size_for_two_networks_of_transformers_configurations() -> None:
    class Config:
        image_size = 40

    seen = []
    networks = [Plain(8), Plain(4)]
    networks[0].config = Config()
    networks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    find_taps(*networks)
    assert seen == [40]
