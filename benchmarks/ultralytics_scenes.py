"""YOLO11n alone and with YOLO11s as its teacher, by Ultralytics' own trainer, on scenes of Fashion-MNIST items.

The teacher learns from 600 scenes, the students from 300 others, all from random weights, at a size that one thread finishes
in half an hour. Interrupted, the same command goes on with the trainings that are missing. Needs Ultralytics and
Fashion-MNIST: ``pip install 'matchdistill[ultralytics]'``.

    python -m benchmarks.ultralytics_scenes --out runs/ultralytics
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import ultralytics
from ultralytics import YOLO

from benchmarks.harness import machine
from matchdistill.data.scenes import write_scenes
from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.integrations.ultralytics import distilling
from matchdistill.runs.summary import Mean
from matchdistill.tasks.metric import Metric

RESULTS = Path(__file__).parent / "results"
SIZE = 64  # pixels
OTHERS, SCENES, VALIDATION = 600, 300, 200  # scenes
METRICS = {"metrics/mAP50-95(B)": Metric("map", "mAP50-95"), "metrics/mAP50(B)": Metric("map50", "mAP50")}
# Scenes are small: a mosaic of four would have objects of eight pixels.
SETTINGS = {
    "imgsz": SIZE,
    "batch": 16,
    "nbs": 16,
    "optimizer": "AdamW",
    "lr0": 0.002,
    "warmup_epochs": 1,
    "mosaic": 0.0,
    "device": "cpu",
    "plots": False,
    "val": False,  # but after the last epoch, whose student is the one that counts
}
TEACHER_EPOCHS = 30
METHODS: dict[str, dict[str, Any] | None] = {"none": None, "mgd-amp": {"refresh_every": 5}}


def train(model: str, scenes: Path, folder: Path, epochs: int, seed: int = 0, trainer: Any = None) -> Path:
    """The weights of a training, which is made if they are not there yet."""
    done = folder / "done.json"
    if not done.exists():
        started = time.process_time()
        torch.manual_seed(seed)
        YOLO(model).train(
            trainer=trainer,
            data=str(scenes / "data.yaml"),
            epochs=epochs,
            seed=seed,
            project=str(folder.parent.absolute()),
            name=folder.name,
            exist_ok=True,
            **SETTINGS,
        )
        write_json(done, {"seconds": round(time.process_time() - started, 1)})
    return folder / "weights" / "last.pt"


def measured(weights: Path, scenes: Path) -> dict[str, float]:
    """The metrics of a network on the validation scenes."""
    found = (
        YOLO(weights).val(data=str(scenes / "data.yaml"), imgsz=SIZE, batch=32, device="cpu", plots=False).results_dict
    )
    return {metric.name: float(found[name]) for name, metric in METRICS.items()}


def markdown(results: dict[str, Any]) -> str:
    """The table of `results`."""
    runs, epochs = results["runs"], results["epochs"]
    seeds = [run["seed"] for run in runs if run["method"] == "none"]
    taught = [f"{100 * results['teacher'][metric.name]:.2f}" for metric in METRICS.values()]
    heads = [cell for metric in METRICS.values() for cell in (metric.label, "to none")]
    lines = [
        "# The Ultralytics benchmark",
        "",
        f"`python -m benchmarks.ultralytics_scenes --epochs {epochs}`; ultralytics {results['ultralytics']}, one thread of",
        f"{results['machine']['cpu']}. YOLO11n learns from {SCENES} scenes of {SIZE} px for {epochs} epochs, alone and from",
        f"YOLO11s, which has learned from {OTHERS} other scenes for {TEACHER_EPOCHS} epochs; both from random weights.",
        f"Average precisions in percent on {VALIDATION} scenes after the last epoch, ± half of the 95% interval over",
        f"{len(seeds)} seeds; differences are paired by seed. The seconds are of one training, on the CPU.",
        "",
        f"| | {' | '.join(heads)} | seconds |",
        "|---" * (len(heads) + 2) + "|",
        f"| teacher | {' | | '.join(taught)} | | |",
    ]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = {run["seed"]: run for run in runs if run["method"] == method}
        alone = {run["seed"]: run for run in runs if run["method"] == "none" and run["seed"] in own}
        cells = []
        for metric in METRICS.values():
            cells.append(Mean.of([run[metric.name] for run in own.values()]).shown(metric))
            gains = [own[seed][metric.name] - alone[seed][metric.name] for seed in alone]
            cells.append(Mean.of(gains).shown(metric, "+") if method != "none" and gains else "")
        lines.append(
            f"| {method} | {' | '.join(cells)} | {sum(run['seconds'] for run in own.values()) / len(own):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ultralytics"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of the students")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = {"others": (OTHERS, 1), "scenes": (SCENES, 0)}
    for name, (count, seed) in sets.items():
        if not (options.out / name).exists():
            write_scenes(options.out / name, count, VALIDATION, SIZE, seed, format="yolo")
    scenes = options.out / "scenes"
    teacher = train("yolo11s.yaml", options.out / "others", options.out / "teacher", TEACHER_EPOCHS)
    results: dict[str, Any] = {
        "ultralytics": ultralytics.__version__,
        "machine": machine("cpu"),
        "settings": SETTINGS,
        "epochs": options.epochs,
        "methods": METHODS,
        "teacher": measured(teacher, scenes),
        "runs": [],
    }
    for seed in range(options.seeds):
        for method, distillation in METHODS.items():
            folder = options.out / f"{method}-{seed}"
            trainer = None if distillation is None else distilling(teacher, **distillation)
            weights = train("yolo11n.yaml", scenes, folder, options.epochs, seed, trainer)
            row = {"method": method, "seed": seed, **measured(weights, scenes), **read_json(folder / "done.json")}
            results["runs"].append(row)
            print(row, flush=True)
            write_json(RESULTS / "ultralytics.json", results)
            atomic_write(RESULTS / "ultralytics.md", lambda path: path.write_text(markdown(results)))


if __name__ == "__main__":
    main()
