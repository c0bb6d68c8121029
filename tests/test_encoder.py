"""Dominators against a search of the graph, and the encoders of networks written by hand.

Axes: N images, C channels, H and W positions, T tokens.
"""

from typing import Any, NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from matchdistill.axes import INPUT
from matchdistill.encoder import Dominators
from matchdistill.trace import Trace
from networks import Function

IMAGES = torch.zeros(2, 3, 8, 8)


def trace(function: Any, *example: Any, **modules: nn.Module) -> Trace:
    return Trace(Function(function, **modules), example or (IMAGES,))


def through(function: Any, *example: Any, **modules: nn.Module) -> list[str]:
    """The names of the values through which everything flows to the last."""
    found = trace(function, *example, **modules)
    return [operation.name for operation in Dominators(found).chain(found.operations[-1])]


class Step(NamedTuple):
    kind: str  # "out", "in place", "split" or "scalar"
    sources: tuple[int, ...]


steps = st.lists(
    st.tuples(
        st.sampled_from(("out", "out", "out", "in place", "split", "scalar")),
        st.lists(st.integers(0, 30), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=12,
)


class Graph(nn.Module):
    """A random network: every step takes earlier variables, of which the first is the input."""

    def __init__(self, program: list[Step]) -> None:
        super().__init__()
        self.program = program

    def forward(self, images: Tensor) -> Tensor:
        variables = [images]
        for step in self.program:
            taken = [variables[source] for source in step.sources]
            if step.kind == "out":
                variables.append(torch.stack(taken).sum(0) if len(taken) > 1 else torch.tanh(taken[0]))
            elif step.kind == "in place":
                taken[0].mul_(2)
            elif step.kind == "split":
                variables.extend(torch.split(taken[0], 2))
            else:
                variables.append(taken[0].sum())
        return variables[-1]


def program_of(drawn: list[tuple[str, list[int]]]) -> list[Step]:
    """Sources within the variables that exist; in-place steps and splits take no scalar and not the input."""
    whole, count, program = [0], 1, []
    for kind, numbers in drawn:
        if kind == "in place" and len(whole) > 1:
            program.append(Step(kind, (whole[1:][numbers[0] % (len(whole) - 1)],)))
            continue
        sources = tuple(whole[number % len(whole)] for number in numbers)
        program.append(Step("out" if kind == "in place" else kind, sources))
        if program[-1].kind == "out":
            whole.append(count)
        count += 2 if kind == "split" else 1
    return program


def slow_dominators(program: list[Step]) -> dict[int, list[int]]:
    """Of each operation, the numbers of the operations without which it cannot be reached from the input."""
    edges: dict[int, set[int]] = {INPUT: set()}
    made_by = [INPUT]

    def operation(sources: set[int]) -> int:
        number = len(edges) - 1
        edges[number] = set()
        for source in sources:
            edges[source].add(number)
        return number

    for step in program:
        sources = {made_by[source] for source in step.sources}
        if step.kind == "out" and len(step.sources) > 1:
            made_by.append(operation({operation(sources)}))
        elif step.kind == "out":
            made_by.append(operation(sources))
        elif step.kind == "in place":
            made_by[step.sources[0]] = operation(sources)
        elif step.kind == "split":
            made_by += [operation({made_by[step.sources[0]]})] * 2
        else:
            made_by.append(operation({made_by[step.sources[0]]}))

    def reachable(start: int, removed: int) -> set[int]:
        found, left = set(), [start]
        while left:
            for following in edges[left.pop()] - found - {removed}:
                found.add(following)
                left.append(following)
        return found

    return {
        number: [before for before in range(number + 1) if number not in reachable(INPUT, before)]
        for number in edges
        if number != INPUT
    }


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(steps)
def test_dominators_are_what_separates_an_operation_from_the_input(drawn: list[tuple[str, list[int]]]) -> None:
    program = program_of(drawn)
    found = Trace(Graph(program), (torch.zeros(4, 3),))
    dominators = Dominators(found)
    chains = {o.number: [before.number for before in dominators.chain(o)] for o in found.operations}
    assert chains == slow_dominators(program)


def test_nothing_flows_through_the_inside_of_a_residual_block() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        return (torch.tanh(torch.sin(x)) + x).exp()

    assert through(forward) == ["sigmoid", "add", "exp"]


def test_a_late_use_of_the_input_passes_by_what_lies_before_it() -> None:
    assert through(lambda self, x: (x.sin().cos() + x).exp()) == ["add", "exp"]


def test_other_inputs_and_constants_do_not_count() -> None:
    def forward(self: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (x.sin() * torch.ones(()) + y.cos()).exp()

    assert through(forward, IMAGES, IMAGES.clone()) == ["sin", "mul", "add", "exp"]
    found = trace(forward, IMAGES, IMAGES.clone())
    assert [o.name for o in Dominators(found, 1).chain(found.operations[-1])] == ["cos", "add", "exp"]
