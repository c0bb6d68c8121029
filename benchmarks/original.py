"""The method as its authors ran it, rebuilt from its description: what the library is compared with.

The teacher runs with a graph that nobody uses. Each of MobileNet-V2's positions is a run from the input that ends there; the
last of them goes on to the output, which is the reading that costs least. The matched channels are stacked, and the largest
is found by argmax and gathered. The costs of each batch are an (N, Cs, Ct) tensor, moved to the CPU and summed there. The
assignment is a square problem, the costs stacked G times, built by one call per arc. Every process runs all images of a
refresh.

Axes: N batch, Cs student channels, Ct teacher channels, G group, P positions (`*` flattened).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from benchmarks.pairs import Pair
from matchdistill.probing import evaluating
from matchdistill.taps import Tap, resolve

COST_SCALE = 1e4  # the solver takes whole numbers
HAS_SOLVER = importlib.util.find_spec("ortools") is not None


class Original:
    """A pair of networks with the original's loss; a call returns what that of a `MatchingDistiller` does.

    Args:
        pair: the networks and their taps, all of them before a ReLU.
        images: an input (N, 3, H, W), as of `Pair.networks`.
    """

    def __init__(self, pair: Pair, images: Tensor) -> None:
        described = pair.distiller(images)  # for the widths, and the batch norms of the margins
        positions = list(described.positions)
        self.pair = pair
        self.teacher, self.student = described.teacher, described.release()
        self.norms = nn.ModuleList(nn.BatchNorm2d(position.student_channels) for position in positions).to(
            images.device
        )
        self.teacher_margins = [position.teacher_margin() for position in positions]
        for network, taps in zip((self.teacher, self.student), zip(*pair.taps, strict=True), strict=True):
            for tap in taps:  # so that what is taken stays as it was
                resolve(network, Tap.parse(tap).module).inplace = False

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [*self.student.parameters(), *self.norms.parameters()]

    def match(self, index: Sequence[Tensor]) -> None:
        """Set the matching (Cs, G) of every position."""
        self.index = list(index)
        self.margins = [margin[each].mean(1) for margin, each in zip(self.teacher_margins, self.index, strict=True)]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The student's output, and the paper's loss."""
        output, own, others = self.features(images)
        losses = [
            partial_loss(norm(student), teacher.detach(), index, margin)
            for norm, student, teacher, index, margin in zip(
                self.norms, own, others, self.index, self.margins, strict=True
            )
        ]
        weighted = [loss / 2 ** (len(losses) - 1 - number) for number, loss in enumerate(losses)]
        return output, torch.stack(weighted).sum() / (len(images) * 1e4)

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The student's output, and the features of student and teacher at every position."""
        _, others = run(self.teacher, [teacher for teacher, _ in self.pair.taps], images)
        taps = [student for _, student in self.pair.taps]
        if not self.pair.reruns:
            return *run(self.student, taps, images), others
        before = [prefix(self.student, tap, images) for tap in (*self.pair.unused, *taps[:-1])]
        output, last = run(self.student, taps[-1:], images)
        return output, [*before[len(self.pair.unused) :], *last], others

    @torch.no_grad()
    def costs(self, loader: Iterable[Tensor]) -> list[Tensor]:
        """The matching cost (Cs, Ct) of every position, over all images (N, 3, H, W) of a loader."""
        totals: list[Tensor] = [torch.zeros(())] * len(self.pair.taps)
        count = 0
        with evaluating(self.student):
            for images in loader:
                _, own, others = self.features(images)
                for number, (student, teacher) in enumerate(zip(own, others, strict=True)):
                    unit = [F.normalize(features.flatten(2), dim=2) for features in (student, teacher)]
                    distances = 2 - 2 * unit[0] @ unit[1].transpose(1, 2)  # (N, Cs, Ct)
                    totals[number] = totals[number] + distances.cpu().sum(0)
                count += len(images)
        return [total / count for total in totals]


class _Reached(Exception):  # noqa: N818 - no error
    """A run is at its tap, with the value."""


def prefix(network: nn.Module, tap: str, images: Tensor) -> Tensor:
    """The value at a tap, by a run of the network from the input that ends there."""

    def stop(_: nn.Module, arguments: tuple[Tensor]) -> None:
        raise _Reached(*arguments)

    handle = resolve(network, Tap.parse(tap).module).register_forward_pre_hook(stop)
    try:
        network(images)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise AssertionError(f"the network does not reach {tap}")


def run(network: nn.Module, taps: Sequence[str], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output of a network, and the values at taps on the way."""
    values: dict[str, Tensor] = {}

    def keeping(tap: str) -> RemovableHandle:
        def keep(_: nn.Module, arguments: tuple[Tensor]) -> None:
            (values[tap],) = arguments

        return resolve(network, Tap.parse(tap).module).register_forward_pre_hook(keep)

    handles = [keeping(tap) for tap in taps]
    output = network(images)
    for handle in handles:
        handle.remove()
    return output, [values[tap] for tap in taps]


def partial_loss(student: Tensor, teacher: Tensor, index: Tensor, margin: Tensor) -> Tensor:
    """The summed loss of a position, of normalised student (N, Cs, H, W) and teacher features (N, Ct, H, W)."""
    stacked = torch.stack([teacher[:, members] for members in index.T], 1)  # (N, G, Cs, H, W)
    largest = stacked.abs().argmax(1, keepdim=True)
    target = torch.max(stacked.gather(1, largest)[:, 0], margin[:, None, None])
    counts = (student > target) | (target > 0)
    return (F.mse_loss(student, target, reduction="none") * counts).sum()


def problem(cost: Tensor) -> tuple[Any, int]:
    """The solver with all arcs of the costs (Cs, Ct) of the first G * Cs teacher channels, and the number of its rows."""
    from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment

    students, teachers = cost.shape
    group = teachers // students
    square = (cost[:, : group * students].repeat(group, 1) * COST_SCALE).round().long().tolist()
    solver = SimpleLinearSumAssignment()
    for row, costs in enumerate(square):
        for column, arc in enumerate(costs):
            solver.add_arc_with_cost(row, column, arc)
    return solver, len(square)


def assignment(cost: Tensor) -> Tensor:
    """The index (Cs, G) of least cost (Cs, Ct), of the first G * Cs teacher channels."""
    solver, rows = problem(cost)
    status = solver.solve()
    assert status == solver.OPTIMAL
    return torch.tensor([solver.right_mate(row) for row in range(rows)]).reshape(-1, len(cost)).T
