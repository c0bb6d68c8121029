"""torchdistill's distillation of features beside the library's: steps in turn, and the most memory that each holds.

torchdistill is not among the benchmarks' packages. Install it apart, and name the folder:

    pip install --target /tmp/torchdistill --no-deps torchdistill
    PYTHONPATH=/tmp/torchdistill python -m benchmarks.peers.torchdistill
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.harness import RESULTS
from benchmarks.pairs import Pair, chosen, random_batch
from benchmarks.peers.steps import beside
from benchmarks.step import alone, fitnets, limit, matchdistill

STAGES = ("layer1", "layer2", "layer3", "layer4")
WEIGHT = 30.0
# As in `training_step`.
OPTIMIZER = {"key": "SGD", "kwargs": {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}}


def staged(pair: Pair) -> Pair:
    """A pair of residual networks with the outputs of their stages as taps, which both libraries can take."""
    return Pair(pair.teacher, pair.student, tuple((f"{stage}:output", f"{stage}:output") for stage in STAGES))


def term(criterion: str, given: dict[str, Any], target: dict[str, Any], weight: float) -> dict[str, Any]:
    """A loss of torchdistill's configuration, of something of the student's."""
    wrapper = {
        "key": "SimpleLossWrapper",
        "kwargs": {"input": {"is_from_teacher": False, "io": "output", **given}, "target": target},
    }
    return {"criterion": {"key": criterion, "kwargs": {}}, "criterion_wrapper": wrapper, "weight": weight}


def configuration(teacher: nn.Module, student: nn.Module) -> dict[str, Any]:
    """FitNets' hints at the outputs of all stages as torchdistill is told of them: 1x1 connectors, mean squared errors."""
    connectors, terms, inside = {}, {}, []
    for stage in STAGES:
        widths = [_width(network.get_submodule(stage)) for network in (student, teacher)]
        connectors[stage] = {
            "conv2d_kwargs": {"in_channels": widths[0], "out_channels": widths[1], "kernel_size": 1, "bias": False},
            "io": "output",
            "path": f"student_model.{stage}",
        }
        inside.append(f"connector_dict.{stage}")
        target = {"is_from_teacher": True, "module_path": stage, "io": "output"}
        terms[stage] = term("MSELoss", {"module_path": f"connector_dict.{stage}"}, target, WEIGHT)
    terms["task"] = term("CrossEntropyLoss", {"module_path": "."}, {"uses_label": True}, 1.0)
    hooks = [f"student_model.{stage}" for stage in STAGES] + inside
    return {
        "num_epochs": 1,
        "teacher": {
            "forward_proc": "forward_batch_only",
            "forward_hook": {"output": list(STAGES)},
            "requires_grad": False,
        },
        "student": {
            "forward_proc": "forward_batch_only",
            "auxiliary_model_wrapper": {"key": "Connector4DAB", "kwargs": {"connectors": connectors}},
            "forward_hook": {"output": hooks},
        },
        "optimizer": {**OPTIMIZER, "kwargs": dict(OPTIMIZER["kwargs"])},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }


def _width(stage: nn.Module) -> int:
    return [module.num_features for module in stage.modules() if isinstance(module, nn.BatchNorm2d)][-1]


def peer(pair: Pair, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A step of torchdistill's box."""
    from torchdistill.core.distillation import DistillationBox

    teacher, student = pair.networks(images)
    box = DistillationBox(
        teacher, student, {}, configuration(teacher, student), images.device, None, False, lr_factor=1
    )
    box.teacher_model.eval()
    box.student_model.train()

    def step() -> None:
        box.post_forward_process(loss=box.forward_process(images, labels, supp_dict={}))

    return step


WORKS = {"limit": limit, "matchdistill": matchdistill, "fitnets": fitnets, "torchdistill": peer, "alone": alone}


def run(json: Path = RESULTS / "peers_cpu.json", size: int = 64, batch: int = 16, rounds: int = 12) -> None:
    """Time steps of resnet50 -> resnet18 with the outputs of their four stages distilled, and measure the most memory.

    Args:
        json: file of the results.
        size: pixels of a side of the images.
        batch: images of a step.
        rounds: how often each work is timed.
    """
    images, labels = random_batch(size, batch)
    (pair,) = chosen("resnet18").values()
    works = {name: functools.partial(make, staged(pair), images, labels) for name, make in WORKS.items()}
    beside("torchdistill", works, json, rounds, size=size, batch=batch)


if __name__ == "__main__":
    auto_cli(run)
