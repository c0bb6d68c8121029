"""Assign groups of columns to rows at minimal total cost: the transportation problem, solved exactly.

A group of G columns is what G equal rows would get. A solver of assignments loses most of its time on such rows, and looks
at every entry. Here SciPy's sparse solver gets only the entries that are likely to be in an optimum. The prices of its
solution prove that no other entry belongs there, or name the ones that do. The next solution has these, too, and starts
from the prices.

Source: R. Jonker, A. Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems",
Computing 38 (1987); first prices by M. Cuturi, "Sinkhorn distances", NeurIPS 2013 (arXiv 1306.0895).

Axes: Cs rows (student channels), Ct columns (teacher channels), G group, E entries that are looked at.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

# Costs become multiples of 2**-40 of their range, whose sums are exact: with rounding errors the solver may never end.
BITS = 40
ROUGHLY = 2.0 ** (BITS - 20)  # more than what float32, of 24 bits, makes of four such numbers
DENSE = 2**16  # entries up to which the dense solver is faster
NEAREST = 8  # entries that are looked at first, for each of a group and for each column
FURTHER = 4  # entries that are added at most, likewise, where the prices name many
MANY = 2000
SWEEPS = 10  # of the first prices
SOFTNESS = 0.2  # of them, in standard deviations of the costs
ROUNDS = 50  # far more than was ever seen (7): then the dense solver


def groups_of_least_cost(cost: Tensor, group: int) -> Tensor:
    """Give each row its G columns, none of them twice, at minimal total cost.

    Args:
        cost: (Cs, Ct), float64 on the CPU, finite, with Cs * G <= Ct or G = 1.
        group: G.

    Returns:
        index (Cs, G), int64; -1 for a row that gets none, where there are fewer columns than rows.
    """
    large = group > 1 and cost.numel() > DENSE and (cost.amax() - cost.amin()).isfinite()
    found = _sparse(cost, group) if large else None
    return _dense(cost, group) if found is None else found


def _dense(cost: Tensor, group: int) -> Tensor:
    """The same by G equal rows."""
    rows, columns = map(torch.from_numpy, linear_sum_assignment(cost.repeat(group, 1).numpy()))
    index = torch.full((group * len(cost),), -1)
    index[rows] = columns
    return index.reshape(group, len(cost)).T


def _sparse(cost: Tensor, group: int) -> Tensor | None:
    """The same by few entries and prices; None where it does not come to an end."""
    students, teachers = cost.shape
    least = cost.amin()
    spread = (cost.amax() - least).item() or 1.0

    def whole(costs: Tensor) -> Tensor:
        return ((costs - least) / spread * 2.0**BITS).round_()

    # What all entries are needed for is done in float32, in one place; memory is what this takes its time for.
    rough = (cost - least).div_(spread).float() * 2.0**BITS
    column_price, none = _first_prices(rough, group), torch.zeros(teachers, dtype=torch.float64)
    reduced = rough - column_price.float()
    looked_at = _least(reduced.sub_(reduced.amin(1, keepdim=True)), NEAREST, group)
    row_price = torch.zeros(students, dtype=torch.float64)
    index = torch.arange(students * group).reshape(group, students).T  # feasible, whatever else is looked at
    for _ in range(ROUNDS):
        looked_at.scatter_(1, index, True)
        row, column = looked_at.nonzero(as_tuple=True)
        weight = whole(cost[row, column])
        # Prices of columns change no choice only where every column is taken; one that is left over has no price.
        start = column_price if students * group == teachers else none
        index = _matched(weight - row_price[row] - start[column], column, row.bincount(), teachers, group)
        prices = _prices(weight, row, column, whole(cost.gather(1, index)), index, start)
        if prices is None:
            return None
        row_price, column_price = prices
        torch.sub(rough, row_price[:, None].float(), out=reduced).sub_(column_price.float())
        row, column = (reduced < ROUGHLY).nonzero(as_tuple=True)
        cheaper = whole(cost[row, column]) < row_price[row] + column_price[column]
        count = int(cheaper.sum())
        if not count:
            return index
        more = torch.zeros_like(looked_at)
        more[row[cheaper], column[cheaper]] = True
        looked_at |= more if count <= MANY else more & _least(reduced, FURTHER, group)
    return None


def _first_prices(cost: Tensor, group: int) -> Tensor:
    """Roughly the prices (Ct,) of the optimum, in whole units: where every column is taken once, softly (Sinkhorn)."""
    reduced = cost - cost.amin(1, keepdim=True)
    least = reduced.amin(0)
    reduced -= least
    softness = SOFTNESS * max(reduced.std().item(), 1)
    kernel = reduced.div_(-softness).exp_()
    weight = torch.ones(cost.shape[1])
    for _ in range(SWEEPS):
        weight = 1 / ((group / (kernel @ weight)) @ kernel)
        if len(cost) * group < cost.shape[1]:
            weight = weight.clamp_max(1)  # a column may be left over
    return (least + softness * weight.log().nan_to_num(0, 0, 0)).double().round_()


def _least(reduced: Tensor, number: int, group: int) -> Tensor:
    """Where the least entries of each row and column are, bool (Cs, Ct)."""
    students, teachers = reduced.shape
    chosen = torch.zeros(reduced.shape, dtype=torch.bool)
    chosen.scatter_(1, reduced.topk(min(number * group, teachers), 1, largest=False, sorted=False).indices, True)
    columns = reduced.T.contiguous()  # the search is faster along memory
    return chosen.scatter_(0, columns.topk(min(number, students), 1, largest=False, sorted=False).indices.T, True)


def _matched(weight: Tensor, column: Tensor, counts: Tensor, teachers: int, group: int) -> Tensor:
    """The optimum (Cs, G) among entries of whole weights (E,), ordered by rows with so many entries (Cs,) each."""
    ends = np.concatenate([[0], counts.repeat(group).cumsum(0).numpy()]).astype(np.int32)
    weights = (weight - (weight.amin() - 1)).repeat(group).numpy()  # a weight of 0 would be no entry
    matrix = csr_array((weights, column.int().repeat(group).numpy(), ends), shape=(len(counts) * group, teachers))
    _, columns = min_weight_full_bipartite_matching(matrix)
    return torch.from_numpy(columns).long().reshape(group, len(counts)).T


def _prices(
    weight: Tensor, row: Tensor, column: Tensor, chosen: Tensor, index: Tensor, start: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Prices of rows (Cs,) and columns (Ct,) that prove an index (Cs, G) optimal among the entries (E,).

    Every entry costs at least the sum of its prices, a chosen one exactly that. The columns' are lowered from a start (Ct,)
    until that is so, as Bellman and Ford find shortest ways. None where there are no such prices.
    """
    order = column.argsort()
    weights, rows = weight[order].numpy(), row[order].numpy()
    first = np.searchsorted(column[order].numpy(), np.arange(len(start)))
    costs, columns, column_price = chosen.numpy(), index.numpy(), start.numpy()
    for _ in range(len(start) + 1):
        row_price = (costs - column_price[columns]).max(1)
        lower = np.minimum(np.minimum.reduceat(weights - row_price[rows], first), column_price)
        if np.array_equal(lower, column_price):
            return torch.from_numpy(row_price), torch.from_numpy(column_price)
        column_price = lower
    return None
