"""What a step of other frameworks' trainers costs with a teacher, beside the step without it and the teacher's forward pass.

Lightning's `Trainer` with the callback, and the `Trainer` of Hugging Face with the mixin, each in its own training loop. The
loops run in threads, and get a batch only when it is their turn: a step is from one batch that is asked for to the next.
Three works take turns: the framework's loop alone, the teacher's forward pass, and the loop with MGD. The ratio is the
median over the rounds of distilled / (alone + teacher), in seconds of the processor, whose target is 1.05.

    python -m benchmarks.trainers_step --size 64 --batch 16 --rounds 9
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.harness import interleaved, ratio
from matchdistill.files import write_json
from matchdistill.integrations.lightning import MatchingDistillation

CLASSES = 100
TARGET = 1.05
WARMUP = 6  # batches in which trainers start, refresh the matching and fetch ahead


class _Ended(BaseException):
    """Ends a training loop."""


class Turns(IterableDataset[Any]):
    """One batch, again and again, each when it is the loop's turn.

    Args:
        batch: what is given.
    """

    def __init__(self, batch: Any) -> None:
        self.batch, self.failed, self.ends = batch, None, False
        self._go, self._asked = threading.Semaphore(0), threading.Semaphore(0)

    def __iter__(self) -> Iterator[Any]:
        while True:
            self._asked.release()
            self._go.acquire()
            if self.ends:
                raise _Ended
            yield self.batch

    def start(self, train: Callable[[], object]) -> None:
        """Begin a training over these batches."""

        def work() -> None:
            try:
                train()
            except _Ended:
                pass
            except BaseException as error:
                self.failed = error
            self._asked.release()

        threading.Thread(target=work, daemon=True).start()
        self._asked.acquire()
        for _ in range(WARMUP):
            self.step()

    def step(self) -> None:
        """Let the loop do a step."""
        if self.failed is not None:
            raise RuntimeError("the training has failed") from self.failed
        self._go.release()
        self._asked.acquire()

    def end(self) -> None:
        """End the training."""
        self.ends = True
        self._go.release()


class Module(pl.LightningModule):
    """A classifier of Lightning's that knows nothing of a teacher."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """The cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> Any:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), 1e-6, momentum=0.9)


def of_lightning(folder: str, size: int, count: int) -> tuple[Callable[..., Turns], Callable[[], object]]:
    """What begins a training with a teacher or without, and the teacher's forward pass."""
    from torchvision.models import resnet18, resnet50

    batch = torch.rand(count, 3, size, size), torch.arange(count) % CLASSES
    teacher = resnet50(num_classes=CLASSES).eval()

    def begin(distils: bool) -> Turns:
        turns = Turns(batch)
        callbacks = [MatchingDistillation(teacher, refresh_every=0, max_images=count)] if distils else []
        options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            enable_checkpointing=False,
            callbacks=callbacks,  # type: ignore[arg-type]
            default_root_dir=folder,
            **options,  # type: ignore[arg-type]
        )
        model = Module(resnet18(num_classes=CLASSES))
        turns.start(lambda: trainer.fit(model, DataLoader(turns, batch_size=None)))
        return turns

    return begin, lambda: teacher(batch[0])


def of_transformers(folder: str, size: int, count: int) -> tuple[Callable[..., Turns], Callable[[], object]]:
    """Likewise of Hugging Face."""
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

    from matchdistill.integrations.transformers import MatchingTrainer

    batch = {"pixel_values": torch.rand(count, 3, size, size), "labels": torch.arange(count) % CLASSES}
    teacher = ResNetForImageClassification(ResNetConfig(num_labels=CLASSES)).eval()  # of 50 layers
    basic = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}

    def begin(distils: bool) -> Turns:
        turns = Turns(batch)
        arguments = TrainingArguments(
            folder,
            max_steps=1_000_000,
            per_device_train_batch_size=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            optim="sgd",
            learning_rate=1e-6,
        )
        model = ResNetForImageClassification(ResNetConfig(num_labels=CLASSES, **basic))
        shared = {"train_dataset": turns, "data_collator": lambda samples: samples[0]}
        trainer = (
            MatchingTrainer(model, arguments, teacher=teacher, refresh_every=0, max_images=count, **shared)
            if distils
            else Trainer(model, arguments, **shared)  # type: ignore[arg-type]
        )
        turns.start(trainer.train)
        return turns

    return begin, lambda: teacher(batch["pixel_values"])


FRAMEWORKS = {"pytorch-lightning": of_lightning, "transformers": of_transformers}


def measure(framework: str, size: int, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of the processor for the three works of a framework, and their ratio over the rounds."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begin, forward = FRAMEWORKS[framework](folder, size, count)
        trainings = {name: begin(distils) for name, distils in (("alone", False), ("distilled", True))}

        @torch.inference_mode()
        def teacher() -> None:
            forward()

        works = {"alone": trainings["alone"].step, "teacher": teacher, "distilled": trainings["distilled"].step}
        try:
            # Of the process: on a machine that others use too, the wall clock tells what they do.
            seconds = interleaved(works, rounds, clock=time.process_time)
        finally:
            for training in trainings.values():
                training.end()
    floor = [alone + own for alone, own in zip(seconds["alone"], seconds["teacher"], strict=True)]
    return {
        "version": importlib.metadata.version(framework),
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "ratio": ratio(seconds["distilled"], floor),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="pixels of the images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    machine = f"{torch.get_num_threads()} threads ({platform.machine()}), torch {torch.__version__}"
    results: dict[str, Any] = {**vars(options), "machine": machine, "target": TARGET, "frameworks": {}}
    for name in FRAMEWORKS:
        with contextlib.redirect_stdout(None):
            found = measure(name, options.size, options.batch, options.rounds)
        print(f"{name} {found['version']}: {found['ratio']} of alone + teacher; seconds {found['seconds']}", flush=True)
        results["frameworks"][name] = found
        write_json(Path(__file__).parent / "results" / "trainers_step.json", results)


if __name__ == "__main__":
    main()
