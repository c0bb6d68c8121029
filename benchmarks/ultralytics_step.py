"""What a step of Ultralytics' trainer costs with a teacher, beside the student's own step and the teacher's forward pass.

Untrained networks on one batch of scenes. The works take turns in one process; the ratio is the median over the rounds of
distilled / (alone + teacher), whose target is 1.05. The teacher's pass is taken twice: whole, and without its head, which
gives no features. Seconds are of the one thread's CPU time, in which other processes count little. Needs Ultralytics:
``pip install 'matchdistill[ultralytics]'``.

    python -m benchmarks.ultralytics_step --size 320 --batch 4 --rounds 15
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import ultralytics
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from benchmarks.harness import interleaved, machine
from matchdistill.data.scenes import write_scenes
from matchdistill.files import write_json
from matchdistill.integrations.ultralytics import distilling
from matchdistill.integrations.yolo import without_head

TARGET = 1.05
WARMUP = 2  # calls that do not count


def ready(trainer: Any) -> Any:
    """A trainer before its first step."""
    trainer._setup_train()
    trainer.epoch = 0
    trainer.run_callbacks("on_train_epoch_start")
    trainer._model_train()
    return trainer


def stepper(trainer: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """A step of a trainer on a batch of its loader: preparation, forward, backward, clipping, optimiser and average."""

    def step() -> None:
        losses, _ = trainer.model(trainer.preprocess_batch(dict(batch)))
        trainer.scaler.scale(losses.sum()).backward()
        trainer.optimizer_step()

    return step


def counted(work: Callable[[], object], seconds: list[float]) -> Callable[[], None]:
    """A work that notes its CPU time at each call."""

    def run() -> None:
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)

    return run


def measure(teacher: str, student: str, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of the works, and the ratio of each round."""
    overrides = {"model": student, **options}
    alone = ready(DetectionTrainer(overrides=dict(overrides)))
    distilled = ready(distilling(teacher)(overrides=dict(overrides)))
    batch = next(iter(alone.train_loader))
    images = alone.preprocess_batch(dict(batch))["img"]
    whole, body = (YOLO(teacher).model.eval() for _ in range(2))
    without_head(body)
    works = {
        "alone": stepper(alone, batch),
        "teacher": torch.no_grad()(lambda: whole(images)),
        "teacher without its head": torch.no_grad()(lambda: body(images)),
        "distilled": stepper(distilled, batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    interleaved({name: counted(work, seconds[name]) for name, work in works.items()}, rounds, warmup=WARMUP)
    seconds = {name: values[WARMUP:] for name, values in seconds.items()}
    found: dict[str, Any] = {"seconds": {name: statistics.median(values) for name, values in seconds.items()}}
    for name in ("teacher", "teacher without its head"):
        ratios = [d / (a + t) for a, t, d in zip(*(seconds[w] for w in ("alone", name, "distilled")), strict=True)]
        found[f"distilled / (alone + {name})"] = {"median": statistics.median(ratios), "rounds": ratios}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="yolo11s.yaml")
    parser.add_argument("--student", default="yolo11n.yaml")
    parser.add_argument("--size", type=int, default=320, help="pixels of the images' sides")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder, "scenes"), given.batch, 1, given.size, format="yolo")
        options = {
            "data": f"{folder}/scenes/data.yaml",
            "imgsz": given.size,
            "batch": given.batch,
            "nbs": given.batch,
            "device": "cpu",
            "optimizer": "AdamW",
            "plots": False,
            "project": folder,
        }
        found = measure(given.teacher, given.student, given.rounds, options)
    for name, value in found.items():
        print(f"{name}: {value if name == 'seconds' else round(value['median'], 3)}", flush=True)
    versions = {"ultralytics": ultralytics.__version__, "machine": machine("cpu"), "target": TARGET}
    write_json(Path(__file__).parent / "results" / "ultralytics_step.json", {**vars(given), **versions, **found})


if __name__ == "__main__":
    main()
