"""What a training on ImageNet-1K with eight H100s should take: arithmetic, to be checked on such a machine.

Operations and activations are counted; the rates at which a GPU does them are assumptions.

Axes: N batch, Cs student channels, Ct teacher channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, save
from benchmarks.pairs import Pair, chosen, of_recipe
from matchdistill import MatchingDistiller
from matchdistill.measuring import operations

IMAGES = 1_281_167
REFRESH_IMAGES = 20_000
GPUS = 8
BATCH = 32  # of a GPU; 256 together
SIZE = 224
# Sustained operations per second of a GPU, a multiplication and its addition counted as two. NVIDIA's own training of
# ResNet-50 in mixed precision (DeepLearningExamples, ResNet50 v1.5 for PyTorch) runs 2,470 images a second on one A100,
# which is 61e12; it waits for memory, whose bandwidth on an H100 is 1.64 times that of an A100 (3.35 and 2.04 TB/s).
SUSTAINED = 100e12
# Depth-wise convolutions do little with what they read: a fifth of it, which is a guess.
SUSTAINED_DEPTHWISE = 20e12


def counted(pair: Pair) -> dict[str, int]:
    """Operations and bytes of float32 values, per image, and bytes whatever the batch, on a device without values."""
    batch = 2
    with torch.device("meta"):
        teacher, student = pair.teacher(), pair.student()
        images = torch.empty(batch, 3, SIZE, SIZE)
        distiller = MatchingDistiller(teacher, student, pair.taps, loss_weight="paper", example=images)
    distiller.has_matching = True  # an index without values will do
    with torch.no_grad():
        own = {"teacher": operations(lambda: teacher(images)), "student forward": operations(lambda: student(images))}
    own["student's graph"] = saved(student, lambda: student(images))
    own["distillation's graph"] = saved(distiller, lambda: distiller(images)[1]) - own["student's graph"]
    with torch.no_grad(), distiller._teacher.capture() as taken:
        teacher(images)
    own["teacher's features"] = sum(value.nbytes for value in taken.values.values())
    return {
        **{name: value // batch for name, value in own.items()},
        # The student's weights, gradients and momentum, and the teacher's weights.
        "weights": 3 * bytes_of(student) + bytes_of(teacher),
        "accumulators": sum(8 * place.teacher_channels * (place.student_channels + 2) for place in distiller.positions),
        "depth-wise": any(
            isinstance(each, nn.Conv2d) and each.groups == each.in_channels for each in student.modules()
        ),
    }


def saved(network: nn.Module, work: Callable[[], Tensor]) -> int:
    """Bytes that the graph of some work holds, without the network's weights; storages are counted once."""
    held: dict[int, Tensor] = {}
    handles = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in handles:
            held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    total = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    del result
    return total


def bytes_of(network: nn.Module) -> int:
    """Bytes of the weights."""
    return sum(parameter.nbytes for parameter in network.parameters())


def project(count: dict[str, int], assignment: float | None = None) -> dict[str, float | None]:
    """Seconds and bytes of an epoch and a refresh, from counts and the seconds of a refresh's assignments."""
    rate = SUSTAINED_DEPTHWISE if count["depth-wise"] else SUSTAINED
    # Backward are two products for each forward one. (PyTorch's counter takes those of depth-wise convolutions for dense.)
    step = IMAGES / GPUS * (count["teacher"] / SUSTAINED + 3 * count["student forward"] / rate)
    images = REFRESH_IMAGES / GPUS * (count["teacher"] / SUSTAINED + count["student forward"] / rate)
    activations = count["student's graph"] + count["distillation's graph"] + count["teacher's features"]
    return {
        "epoch": step,
        "refresh": images,
        "assignments": assignment,
        "share": (images + (assignment or 0)) / step,
        "memory": BATCH * activations + count["weights"] + count["accumulators"],
    }


def from_measured(image: float, refresh: dict[str, Any] | None) -> dict[str, float | None]:
    """Seconds of an epoch and a refresh, from the seconds that a GPU takes for an image of a step and from its refresh."""
    own = None if refresh is None else refresh["per image"]["matchdistill without assignments"]["seconds"]
    assignment = None if refresh is None else refresh["assignments"]
    epoch, images = IMAGES / GPUS * image, None if own is None else REFRESH_IMAGES / GPUS * own
    share = None if images is None or assignment is None else (images + assignment) / epoch
    return {"epoch": epoch, "refresh": images, "assignments": assignment, "share": share}


def run(json: Path | None = None) -> None:
    """Count operations and activations for the projection to ImageNet-1K.

    Args:
        json: file of the results; default: under benchmarks/results/speed.
    """
    pairs = {**chosen("all"), "resnet152 -> resnet50": of_recipe("imagenet_resnet152_resnet50")}
    results: dict[str, Any] = {"size": SIZE, "pairs": {name: counted(pair) for name, pair in pairs.items()}}
    save(json or RESULTS / "projection.json", "projection", "cpu", results)
