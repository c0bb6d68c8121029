"""Slow, obvious implementations of the method's mathematics, in NumPy float64 loops.

Everything in the library that computes is compared with these. They share no code with it and use no tensor tricks.
Axes: N images, Cs student channels, Ct teacher channels, G teacher channels per student channel; an asterisk is any
number of spatial axes, none included. An index entry of -1 means "no teacher channel". A mask (N,*) is True at the
positions that count; None is all of them.
"""

import itertools
import math

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_] | None


def unit_vector(values: Floats) -> Floats:
    """The vector divided by its Euclidean length; a zero vector stays zero."""
    largest = max((abs(float(v)) for v in values), default=0.0)
    if largest == 0.0:
        return np.zeros_like(values)
    length = largest * math.sqrt(sum((float(v) / largest) ** 2 for v in values))
    return np.array([float(v) / length for v in values])


def counted(values: Floats, mask: Mask) -> list[Floats]:
    """Every image without the positions that do not count: (N,C,*) -> N times (C,P)"""
    images = []
    for n, image in enumerate(values.reshape(*values.shape[:2], -1)):
        places = [p for p in range(image.shape[1]) if mask is None or mask[n].reshape(-1)[p]]
        images.append(image[:, places])
    return images


def matching_cost(student: Floats, teacher: Floats, mask: Mask = None) -> Floats:
    """Mean over images of 2 - 2 <s, t> between unit channel maps. (N,Cs,*), (N,Ct,*) -> (Cs,Ct)

    The formula holds for zero maps too: their inner product with anything is 0, so their cost is 2.
    """
    own, others = counted(student, mask), counted(teacher, mask)
    images, student_channels, teacher_channels = len(own), student.shape[1], teacher.shape[1]
    cost = np.zeros((student_channels, teacher_channels))
    for i in range(student_channels):
        for j in range(teacher_channels):
            for n in range(images):
                s = unit_vector(own[n][i])
                t = unit_vector(others[n][j])
                cost[i, j] += 2.0 - 2.0 * sum(float(a) * float(b) for a, b in zip(s, t, strict=True))
            cost[i, j] /= images
    return cost


def default_group_size(student_channels: int, teacher_channels: int) -> int:
    return max(1, teacher_channels // student_channels)


def assignment_cost(cost: Floats, index: Ints) -> float:
    """The total cost of an index (Cs,G), entries of -1 left out."""
    total = 0.0
    for i, members in enumerate(index):
        for j in members:
            if j >= 0:
                total += float(cost[i, j])
    return total


def brute_force_cost(cost: Floats, group_size: int) -> float:
    """The lowest total cost over every admissible assignment: for tiny problems only."""
    students, teachers = cost.shape
    slots = [i for i in range(students) for _ in range(group_size)]
    if len(slots) <= teachers:
        return min(
            sum(float(cost[i, j]) for i, j in zip(slots, chosen, strict=True))
            for chosen in itertools.permutations(range(teachers), len(slots))
        )
    return min(
        sum(float(cost[slots[k], j]) for j, k in enumerate(chosen))
        for chosen in itertools.permutations(range(len(slots)), teachers)
    )


def balanced_assignment(cost: Floats, group_size: int) -> Ints:
    """The explicit stacked problem: the cost repeated G times along the student axis, solved as one-to-one."""
    students = cost.shape[0]
    stacked = np.concatenate([cost] * group_size, axis=0)
    rows, columns = linear_sum_assignment(stacked)
    groups: list[list[int]] = [[] for _ in range(students)]
    for row, column in zip(rows, columns, strict=True):
        groups[row % students].append(int(column))
    return np.array([sorted(group) + [-1] * (group_size - len(group)) for group in groups], dtype=np.int64)


def reduce_channels(teacher: Floats, index: Ints, reduction: str) -> Floats:
    """The deterministic reductions sm, amp, max and mean. (N,Ct,*), (Cs,G) -> (N,Cs,*)"""
    maps = teacher.reshape(teacher.shape[0], teacher.shape[1], -1)
    images, _, positions = maps.shape
    reduced = np.zeros((images, len(index), positions))
    for n in range(images):
        for i, members in enumerate(index):
            for p in range(positions):
                values = [float(maps[n, j, p]) for j in members if j >= 0]
                if values:
                    reduced[n, i, p] = reduce_values(values, reduction)
    return reduced.reshape(images, len(index), *teacher.shape[2:])


def reduce_values(values: list[float], reduction: str) -> float:
    if reduction == "sm":
        (only,) = values
        return only
    if reduction == "amp":
        best = values[0]
        for value in values[1:]:
            if abs(value) > abs(best):
                best = value
        return best
    if reduction == "max":
        return max(values)
    if reduction == "mean":
        return math.fsum(values) / len(values)
    raise AssertionError(f"no oracle for {reduction!r}")


def random_drop_choices(teacher: Floats, index: Ints) -> Floats:
    """What `rd` may pick: the allowed values of every output element on a last axis. -> (N,Cs,*,G)"""
    images, students, group_size = teacher.shape[0], *index.shape
    allowed = np.zeros((images, students, *teacher.shape[2:], group_size))
    for n in range(images):
        for i in range(students):
            for g in range(group_size):
                if index[i, g] >= 0:
                    allowed[n, i, ..., g] = teacher[n, index[i, g]]
    return allowed


def reduce_margin(margin: Floats, index: Ints, reduction: str) -> Floats:
    """The mean for amp and mean, the maximum for max, the one for sm. (Ct,), (Cs,G) -> (Cs,)"""
    rule = {"amp": "mean", "mean": "mean", "max": "max", "sm": "sm"}[reduction]
    return np.array([reduce_values([float(margin[j]) for j in members], rule) for members in index.tolist()])


def random_margin_choices(margin: Floats, index: Ints) -> list[set[float]]:
    """What `rd` may pick as the margin of each student channel."""
    return [{float(margin[j]) for j in members} for members in index]


def standard_normal_density(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def standard_normal_below(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def batchnorm_margin(weight: Floats, bias: Floats) -> Floats:
    """E[x | x < 0] of x ~ Normal(bias, |weight|), by numerical integration.

    -3 |weight| where a negative value has probability 0.001 or less; min(bias, 0) where the scale is 0.
    """
    margins = []
    for g, b in zip(weight.tolist(), bias.tolist(), strict=True):
        s = abs(g)
        if s == 0.0:
            margins.append(min(b, 0.0))
        elif standard_normal_below(-b / s) <= 0.001:
            margins.append(-3.0 * s)
        else:
            margins.append(b + s * standard_normal_mean_below(-b / s))
    return np.array(margins)


def standard_normal_mean_below(upper: float) -> float:
    """E[u | u < upper] of a standard normal u; the density beyond 12 is below 1e-31 and left out."""
    lower, upper = -12.0, min(upper, 12.0)
    breaks = [x for x in range(-8, 9, 2) if lower < x < upper] or None
    options = {"epsabs": 1e-14, "epsrel": 1e-12, "limit": 200, "points": breaks}
    mass, _ = quad(standard_normal_density, lower, upper, **options)
    moment, _ = quad(lambda u: u * standard_normal_density(u), lower, upper, **options)
    return float(moment / mass)


def empirical_margin(features: Floats, mask: Mask = None) -> Floats:
    """The mean of a channel's negative values over images and positions, 0 where it has none. (N,C,*) -> (C,)"""
    margins = []
    for c in range(features.shape[1]):
        negatives = [float(v) for image in counted(features, mask) for v in image[c] if v < 0]
        margins.append(math.fsum(negatives) / len(negatives) if negatives else 0.0)
    return np.array(margins)


def partial_loss(student: Floats, target: Floats, margin: Floats, reduction: str, mask: Mask = None) -> float:
    """Squared error to t = max(target, margin) over the elements where s > t or t > 0."""
    s_maps, t_maps = counted(student, mask), counted(target, mask)
    total = 0.0
    elements = 0
    for n in range(len(s_maps)):
        for c in range(s_maps[n].shape[0]):
            for p in range(s_maps[n].shape[1]):
                s = float(s_maps[n][c, p])
                t = max(float(t_maps[n][c, p]), float(margin[c]))
                elements += 1
                if s > t or t > 0:
                    total += (s - t) ** 2
    return total / max(elements, 1) if reduction == "mean" else total


def partial_loss_gradient(
    student: Floats, target: Floats, margin: Floats, reduction: str, step: float, mask: Mask = None
) -> Floats:
    """Central finite differences of the loss above by each student element."""
    gradient = np.zeros_like(student)
    for place in np.ndindex(*student.shape):
        above, below = student.copy(), student.copy()
        above[place] += step
        below[place] -= step
        rise = partial_loss(above, target, margin, reduction, mask) - partial_loss(
            below, target, margin, reduction, mask
        )
        gradient[place] = rise / (2.0 * step)
    return gradient


def paper_loss_weights(positions: int, batch_size: int) -> list[float]:
    """Weights of the summed losses, shallow to deep: 1 / (B * 1e4 * 2^(n-1-i))."""
    return [1.0 / (batch_size * 1e4 * 2.0 ** (positions - 1 - i)) for i in range(positions)]


def mean_loss_weights(positions: int, loss_weight: float = 5.0) -> list[float]:
    """Weights of the mean losses: the same for every position, whatever the resolution and the batch size."""
    return [loss_weight] * positions


def total_loss(task_loss: float, losses: list[float], weights: list[float]) -> float:
    total = task_loss
    for weight, loss in zip(weights, losses, strict=True):
        total += weight * loss
    return total
