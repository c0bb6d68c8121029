"""Distillation by Detectron2's own trainer, on scenes of real Fashion-MNIST items: refresh, checkpoint, cut and resume.

    python -m matchdistill.data.scenes scenes --train 200 --val 60 --size 128
    python benchmarks/detectron2_scenes.py scenes runs/retinanet --stop 25    # the teacher, then half of the student
    python benchmarks/detectron2_scenes.py scenes runs/retinanet              # goes on where it was cut

Needs Detectron2; the README says how to install it. The networks are small and start from scratch, and 50 iterations teach
a detector little: this shows that everything runs as it should, not what is gained.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from matchdistill.integrations.detectron2 import DistilledModel, RefreshMatching, load_teacher, refresh_loader
from matchdistill.norms import group_norm

CONFIGS = {
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
}
ITERATIONS = 50
CLASSES = 10


def config(architecture: str, depth: int, iterations: int, out: Path) -> Any:
    """The model zoo's, for small images and a processor of two cores."""
    cfg = model_zoo.get_config(CONFIGS[architecture])
    cfg.SEED = 1
    cfg.OUTPUT_DIR = str(out)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("scenes_train",), ("scenes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (112, 128, 144), 128  # several sizes: batches are padded
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = depth, "BN", 0
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.INPUT.MASK_FORMAT = "bitmask"  # some masks are run lengths
    sizes = (16, 32, 64, 96, 128)
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.01
    if architecture == "retinanet":
        cfg.MODEL.RETINANET.NUM_CONVS = 2
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size, 1.26 * size, 1.59 * size] for size in sizes]
    else:
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size] for size in sizes]
        cfg.MODEL.RPN.CONV_DIMS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = [64], 256
        cfg.MODEL.ROI_MASK_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 2, 64
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
        cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 200
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.NESTEROV = 8, 0.01, True
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = iterations, (iterations * 2 // 3,), 10
    cfg.SOLVER.CHECKPOINT_PERIOD = 25
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    return cfg


class Trainer(DefaultTrainer):
    """Evaluates by COCO's measures, and writes often."""

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)

    def build_hooks(self) -> list[HookBase]:
        return [*super().build_hooks()[:-1], hooks.PeriodicWriter(self.build_writers(), period=5)]


def student_trainer(cfg: Any, teacher_cfg: Any) -> Trainer:
    """The trainer of a student with its teacher: what a user writes."""

    class StudentTrainer(Trainer):
        @classmethod
        def build_model(cls, cfg: Any) -> DistilledModel:
            return DistilledModel(build_model(cfg), load_teacher(teacher_cfg), norm=group_norm, loss_weight=0.005)

        def build_hooks(self) -> list[HookBase]:
            refresh = RefreshMatching(lambda iteration: refresh_loader(cfg, iteration), [[0, 20]], max_images=80)
            return [refresh, *super().build_hooks()]

    return StudentTrainer(cfg)


class Stop(HookBase):
    """Ends the process after an iteration, as a crash would."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self._iterations:
            raise SystemExit(f"stopped after {self._iterations} iterations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, help="folder written by matchdistill.data.scenes")
    parser.add_argument("out", type=Path, help="folder of the run; one that was stopped goes on")
    parser.add_argument("--architecture", choices=sorted(CONFIGS), default="retinanet")
    parser.add_argument("--teacher-iterations", type=int, default=150)
    parser.add_argument("--stop", type=int, default=0, help="end after so many of the student's iterations")
    options = parser.parse_args()

    for part in ("train", "val"):
        annotations = options.scenes / "annotations" / f"instances_{part}2017.json"
        register_coco_instances(f"scenes_{part}", {}, str(annotations), str(options.scenes / f"{part}2017"))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("detectron2", "fvcore"):  # the second saves checkpoints
        setup_logger(color=False, name=name)
    teacher_cfg = config(options.architecture, 50, options.teacher_iterations, options.out / "teacher")
    weights = options.out / "teacher" / "model_final.pth"
    if not weights.is_file():
        torch.manual_seed(0)
        (options.out / "teacher").mkdir(exist_ok=True)
        Trainer(teacher_cfg).train()
    teacher_cfg.MODEL.WEIGHTS = str(weights)

    torch.manual_seed(0)
    (options.out / "student").mkdir(exist_ok=True)
    cfg = config(options.architecture, 18, ITERATIONS, options.out / "student")
    trainer = student_trainer(cfg, teacher_cfg)
    trainer.register_hooks([Stop(options.stop)])
    trainer.resume_or_load(resume=True)
    trainer.train()


if __name__ == "__main__":
    main()
