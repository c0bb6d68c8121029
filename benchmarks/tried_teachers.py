"""What a step costs with faster teachers that the library does not have: one of 8-bit numbers, and one in a thread.

Axes: N batch.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.harness import interleaved, summary
from benchmarks.pairs import Choice, Pair, by_pair, random_batch, training_step
from benchmarks.step import ENGINE, Step, limit, loss_differences, matchdistill
from matchdistill import engine
from matchdistill.engine import on_onnxruntime
from matchdistill.prepare import Folds
from matchdistill.programs import open_onnx

INT8 = f"{ENGINE} + int8"
THREAD = "limit, the teacher in a thread"


def in_int8(images: Tensor, model: nn.Module, folds: Folds = ()) -> nn.Module:
    """As `on_onnxruntime`, with weights and activations of 8 bits, whose ranges are the ones of given images.

    Weights have 7 bits, as the sums of a CPU without VNNI overflow otherwise.
    """
    model = on_onnxruntime(model, folds)
    run = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # The values differ by more than the library lets them.
        with (
            mock.patch.object(engine, "open_onnx", functools.partial(_open_quantised, images)),
            mock.patch.object(engine, "_compare"),
        ):
            return run(*args, **kwargs)

    model.forward = forward
    return model


def _open_quantised(images: Tensor, path: Path, threads: int) -> Any:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        """The images, once."""

        given = False

        def get_next(self) -> dict[str, Any] | None:
            """The batch, by the name of the program's input."""
            if self.given:
                return None
            self.given = True
            name = open_onnx(path).get_inputs()[0].name
            return {name: images.numpy()}

    ready, quantised = path.with_name("ready.onnx"), path.with_name("int8.onnx")
    quant_pre_process(path, ready, skip_symbolic_shape=True)
    quantize_static(
        ready,
        quantised,
        Images(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
    )
    return open_onnx(quantised, threads=threads)


def in_a_thread(pair: Pair, images: Tensor, labels: Tensor) -> Step:
    """The student's step while another thread has the teacher's forward pass, as if of the next batch.

    Each takes half of the threads, which both have in turn in the other works.
    """
    teacher, student = pair.networks(images)
    teacher.eval()
    step = training_step(lambda images: (student(images), 0.0), student.parameters(), images, labels)
    threads = torch.get_num_threads()
    half = max(1, threads // 2)

    def run_teacher() -> None:
        torch.set_num_threads(half)
        with torch.inference_mode():
            teacher(images)

    def both() -> None:
        other = threading.Thread(target=run_teacher)
        torch.set_num_threads(half)
        other.start()
        step()
        other.join()
        torch.set_num_threads(threads)

    return both


def run(
    json: Path | None = None,
    pair: Choice = "all",
    size: int = 128,
    batch: int = 16,
    rounds: int = 20,
) -> None:
    """Time steps of training on the CPU, the works in turn, and compare each with the limit, as `step` does.

    Args:
        json: file of the results; default: under benchmarks/results/speed.
        pair: which student.
        size: pixels of a side of the images.
        batch: images of a step.
        rounds: how often each work is timed.
    """
    images, labels = random_batch(size, batch)
    prepares = {ENGINE: on_onnxruntime, INT8: functools.partial(in_int8, images)}

    def measured(name: str, each: Pair) -> dict[str, Any]:
        works = {"limit": limit(each, images, labels)}
        works |= {work: matchdistill(each, images, labels, prepare=prepare) for work, prepare in prepares.items()}
        if torch.get_num_threads() > 1:
            works[THREAD] = in_a_thread(each, images, labels)
        found = summary(interleaved(works, rounds), "limit")
        for work, own in found.items():
            print(f"{name}, {work}: {own['seconds']:.4f} s, {own['ratio']['median']:.3f} of the limit", flush=True)
        return {"works": found, "loss differences": loss_differences(each, images, prepares)}

    by_pair("tried-teachers", "cpu", json, pair, {"size": size, "batch": batch}, measured)
