import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import distributed
import oracles
from detectors import TAPS, as_found, as_tensors, precision_of_two, scenes
from matchdistill.distiller import MatchingDistiller
from matchdistill.models import build_detector
from matchdistill.runs.build import build_module
from matchdistill.runs.machine import machine_trainer
from matchdistill.runs.settings import Machine
from matchdistill.runs.train import fit
from matchdistill.tasks.detection.module import DetectionModule, average_precision
from records import settings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log", "ignore:.*LeafSpec"),
]

OWN_LOSSES = {"classification", "bbox_regression"}  # of RetinaNet


def ready(small, *arguments):
    """The module of a recipe with networks as if trained, after a refresh, and a batch with padding and an empty image."""
    recipe = small("--data.flip=false", "--data.batch_size=8", "--student.options.min_size=[64]", *arguments)
    module = build_module(recipe)
    torch.manual_seed(0)
    for network in (module.network(), module.teacher):
        if network is not None:
            as_found(network)
    if isinstance(module.distiller, MatchingDistiller):
        module.refresh(recipe.data.refresh_dataloader(8, 0))
    images, targets = next(iter(recipe.data.train_dataloader()))
    assert len({image.shape for image in images}) == 3
    assert min(len(target["boxes"]) for target in targets) == 0
    return module.train(), (images, targets)


def tapped(body, images):
    """What the taps of a small body take, by plain hooks."""
    taken = {}
    handles = [
        body.get_submodule(tap.partition(":")[0]).register_forward_pre_hook(
            lambda _, args, tap=tap: taken.update({tap: args[0].detach().clone()})
        )
        for tap in TAPS
    ]
    with torch.no_grad():
        body(images)
    for handle in handles:
        handle.remove()
    return [taken[tap] for tap in TAPS]


def counted(sizes, padded, size):
    """Which positions of a map have their centre in an image, one by one."""
    mask = np.zeros((len(sizes), *size), bool)
    for number, (height, width) in enumerate(sizes):
        for row in range(size[0]):
            for column in range(size[1]):
                in_height = (row + 0.5) * padded[0] / size[0] < height
                mask[number, row, column] = in_height and (column + 0.5) * padded[1] / size[1] < width
    return mask


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_is_the_students_losses_and_the_partial_loss_where_the_images_are(small, reduction):
    weights = [5.0, 2.0, 0.5, 1.0] if reduction == "mean" else [2e-3, 2e-3, 1e-2, 1e-2]
    arguments = f"--distillation.weights.mgd={weights}", f"--distillation.loss_reduction={reduction}"
    module, (images, targets) = ready(small, *arguments)
    student, teacher = copy.deepcopy(module.network()), copy.deepcopy(module.teacher)
    total = module.training_step((images, targets), 0)

    own = student(images, targets)
    assert own.keys() == OWN_LOSSES
    expected = sum(loss.item() for loss in own.values())
    batch, _ = student.transform(images)
    padded = tuple(batch.tensors.shape[-2:])
    assert any(size != padded for size in batch.image_sizes)
    pairs = zip(tapped(student.backbone.body, batch.tensors), tapped(teacher.backbone.body, batch.tensors), strict=True)
    for number, (maps, teacher_maps) in enumerate(pairs):
        position = module.distiller.positions[number]
        mask = counted(batch.image_sizes, padded, maps.shape[-2:])[:, None]
        groups, index = math.gcd(32, maps.shape[1]), position.index.numpy()
        values = F.group_norm(maps.double() * torch.from_numpy(mask), groups).numpy()
        target = oracles.reduce_channels(teacher_maps.numpy(), index, "amp")
        norm = teacher.backbone.body.get_submodule(TAPS[number].partition(".relu2")[0]).bn2
        margin = oracles.batchnorm_margin(norm.weight.detach().numpy(), norm.bias.detach().numpy())
        goal = np.maximum(target, oracles.reduce_margin(margin, index, "amp")[None, :, None, None])
        squares = ((values - goal) ** 2 * ((values > goal) | (goal > 0)) * mask).sum()
        count = len(images) if reduction == "sum" else mask.sum() * maps.shape[1]
        loss = weights[number] * squares / count
        assert module.distiller.position_losses[number].item() == pytest.approx(loss, rel=1e-3)
        expected += loss
    assert total.item() == pytest.approx(expected, rel=1e-3)


def test_the_teachers_body_alone_runs_once_a_step_on_the_students_batch(small):
    module, batch = ready(small)
    student, teacher = module.network(), module.teacher
    seen = {"student": [], "teacher": [], "heads": 0}
    for role, network in (("student", student), ("teacher", teacher)):
        body = network.backbone.body
        body.register_forward_pre_hook(
            lambda body, args, role=role: seen[role].append((body.training, args[0].clone()))
        )
    for part in (teacher.head, teacher.backbone.fpn, teacher.transform):
        part.register_forward_pre_hook(lambda *_: seen.update(heads=seen["heads"] + 1))
    student.head.register_forward_pre_hook(lambda *_: seen.update(heads=seen["heads"] + 10))
    teacher.train()
    for _ in range(2):
        module.training_step(batch, 0)
    assert [training for training, _ in seen["teacher"]] == [False, False]
    assert [training for training, _ in seen["student"]] == [True, True]
    for (_, own), (_, others) in zip(seen["student"], seen["teacher"], strict=True):
        assert torch.equal(own, others)
    assert seen["heads"] == 20  # the student's, of its own losses
    module.refresh([batch])
    assert [training for training, _ in seen["student"][2:]] == [False]
    assert len(seen["teacher"]) == 3
    assert seen["heads"] == 20


def test_the_matching_is_over_what_is_not_padding(small):
    module, (images, _) = ready(small)
    positions = module.distiller.positions
    module.refresh([(images, None)])
    together = [position.matching.cost for position in positions]
    module.eval()
    batch, _ = module.network().transform(images)
    bodies = [network.backbone.body.eval() for network in (module.network(), module.teacher)]
    for number, maps in enumerate(zip(*(tapped(body, batch.tensors) for body in bodies), strict=True)):
        mask = counted(batch.image_sizes, batch.tensors.shape[-2:], maps[0].shape[-2:])
        cost = torch.zeros_like(together[number], dtype=torch.float64)
        for image, keep in enumerate(torch.from_numpy(mask)):
            own, others = (F.normalize(values[image][:, keep].double(), dim=1) for values in maps)
            cost += (2 - 2 * own @ others.T) / len(images)
        torch.testing.assert_close(together[number].double(), cost, rtol=1e-3, atol=1e-4)


def test_refreshes_do_not_change_the_sizes_that_training_draws(small):
    recipe = small()
    module = build_module(recipe)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    module.refresh(recipe.data.refresh_dataloader(8, 0))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("method", ["none", "fitnets", "at", "ofd", "random-amp", "mgd-rd"])
def test_methods(small, method):
    module, batch = ready(small, f"--distillation.method={method}")
    losses = module.batch_losses(batch)
    assert losses.keys() == OWN_LOSSES | ({"features"} if method != "none" else set())
    assert all(math.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []
    assert not any(parameter.grad is not None for parameter in (module.teacher or nn.Identity()).parameters())
    frozen = [name for name, value in module.network().named_parameters() if not value.requires_grad]
    assert frozen == ["backbone.body.conv1.weight"]


def test_the_pyramid_is_distilled_too(small):
    module, batch = ready(small, "--distillation.pyramid=true")
    positions = module.distiller.positions
    assert [str(position.student) for position in positions] == [
        *(f"body.{tap}" for tap in TAPS),
        *(f"fpn.layer_blocks.{level}:output" for level in range(3)),
    ]
    for position in positions[4:]:
        assert (position.teacher_channels, position.student_channels, position.margin_norm) == (16, 16, None)
        assert (position.margin < 0).any()
    assert module.batch_losses(batch)["features"].isfinite()


def test_networks_that_see_images_differently(small):
    with pytest.raises(ValueError, match=r"the teacher's image_mean is \[0\.5, 0\.5, 0\.5\], the student's \[0\.485"):
        build_module(small("--teacher.options.image_mean=[0.5, 0.5, 0.5]"))


def test_weights_that_are_not_finite_are_told_before_a_checkpoint_is_written(small, tmp_path, monkeypatch):
    recipe = small("--distillation.method=none", "--training.epochs=2", "--training.validate_every=2")

    def spoil(self, outputs, batch, number):
        if self.current_epoch == 1 and number == 1:  # after the last step, whose loss was finite
            with torch.no_grad():
                self.network().head.classification_head.cls_logits.weight[0, 0] = math.nan

    monkeypatch.setattr(DetectionModule, "on_train_batch_end", spoil, raising=False)
    with pytest.raises(FloatingPointError, match=r"student's weights is nan at step 4 \(epoch 1\)"):
        fit(recipe, tmp_path / "run", quiet=True)
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["epoch"] == 0


@pytest.mark.parametrize("masks", [False, True])
def test_average_precision_is_that_of_pycocotools(masks):
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    targets, found = scenes()
    metric = average_precision(masks)
    metric.update(*as_tensors(found, targets, masks))
    module = DetectionModule(nn.Identity(), masks, settings(method="none"))
    results = module.results(metric.compute())

    def coded(mask):
        code = rle.encode(np.asfortranarray(mask))
        return {**code, "counts": code["counts"].decode()}

    def corner(box):
        left, top, right, bottom = (float(value) for value in box.astype(np.float32))
        return [left, top, right - left, bottom - top]

    truth, detected = COCO(), []
    annotations = [
        {
            "image_id": image,
            "category_id": int(target["labels"][number]),
            "bbox": corner(target["boxes"][number]),
            "area": float(target["area"][number]),
            "iscrowd": int(target["iscrowd"][number]),
            "segmentation": coded(target["masks"][number]),
        }
        for image, target in enumerate(targets, 1)
        for number in range(5)
    ]
    truth.dataset = {
        "images": [{"id": image, "height": 200, "width": 200} for image in range(1, 7)],
        "categories": [{"id": label, "name": str(label)} for label in (1, 2, 3)],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)],
    }
    truth.createIndex()
    for kind in ["bbox", *(["segm"] if masks else [])]:
        detected = [
            {
                "image_id": image,
                "category_id": int(own["labels"][number]),
                "score": float(np.float32(own["scores"][number])),
                **(
                    {"bbox": corner(own["boxes"][number])}
                    if kind == "bbox"
                    else {"segmentation": coded(own["masks"][number])}
                ),
            }
            for image, own in enumerate(found, 1)
            for number in range(12)
        ]
        evaluation = COCOeval(truth, truth.loadRes(detected), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
        expected = {name: value for name, value in zip(names, evaluation.stats, strict=False) if value >= 0}
        assert 0.05 < expected["ap"] < 0.95
        assert len(expected) >= 5
        prefix = "mask_" if kind == "segm" else ""
        own = {name.removeprefix(prefix): value for name, value in results.items() if ("mask" in name) == bool(prefix)}
        assert own == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_processes_with_different_numbers_of_images_measure_as_one(tmp_path):
    metric = average_precision(masks=True)
    targets, found = scenes()
    metric.update(*as_tensors(found, targets, masks=True))
    alone = metric.compute()
    assert 0.05 < alone["bbox_map"] < 0.95
    for gathered in distributed.run(precision_of_two, tmp_path):
        assert gathered == pytest.approx({name: float(value) for name, value in alone.items() if name in gathered})
        assert len(gathered) > 10


class Remembering(nn.Module):
    """Returns what it is told of images by their brightness, and counts how often it is asked."""

    def __init__(self, known, drop=0):
        super().__init__()
        self.known, self.drop, self.asked = known, drop, 0

    def forward(self, images):
        self.asked += len(images)
        found = []
        for image in images:
            target = self.known[round(image.double().sum().item(), 6)]
            keep = target["iscrowd"] == 0
            boxes, labels = target["boxes"][keep][self.drop :], target["labels"][keep][self.drop :]
            masks = target["masks"][keep][self.drop :, None].float() * 0.9
            found.append({"boxes": boxes, "labels": labels, "masks": masks, "scores": torch.ones(len(boxes))})
        return found


def test_validation_is_of_every_image_as_it_was_and_the_teacher_is_measured_once(small):
    recipe = small("--data.masks=true", "--data.batch_size=2")
    recipe.data.setup()
    known = {
        round(image.double().sum().item(), 6): target
        for images, targets in recipe.data.val_dataloader()
        for image, target in zip(images, targets, strict=True)
    }
    assert len(known) == 5
    student, teacher = Remembering(known), Remembering(known, drop=1)
    module = DetectionModule(student, True, settings(method="mgd-amp"), teacher)
    trainer = machine_trainer(Machine("cpu"), logger=False, enable_progress_bar=False)
    for _ in range(2):
        trainer.validate(module, recipe.data, verbose=False)
        assert {module.result[f"{kind}ap{level}"] for kind in ("", "mask_") for level in ("", "50", "75")} == {1.0}
        assert 0 < module.teacher_result["ap"] < 1
    assert (student.asked, teacher.asked) == (10, 5)


def test_heads_have_the_classes_and_the_background():
    for name in ("torchvision:retinanet_resnet50_fpn", "matchdistill.models:detector"):
        with torch.device("meta"):
            head = build_detector(name, 3, **({} if "torch" in name else {"backbone": "detectors:SmallBackbone"})).head
        assert head.classification_head.num_classes == 4
