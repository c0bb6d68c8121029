"""Detectron2's own models, trainers, loaders and checkpointer with the wrapper and the hook.

Axes: N images, C channels, H and W pixels or positions.
"""

import copy
import itertools
import json
import logging
import pickle
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import oracles

pytest.importorskip("detectron2")

from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss

from matchdistill.integrations.detectron2 import (
    DistilledModel,
    RefreshMatching,
    load_teacher,
    refresh_loader,
)
from matchdistill.norms import group_norm

ARCHITECTURES = {
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]
both = pytest.mark.parametrize("architecture", ARCHITECTURES)


def config(architecture: str, depth: int) -> Any:
    """The model zoo's, as narrow as it can be."""
    cfg = model_zoo.get_config(ARCHITECTURES[architecture])
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.SEED = "cpu", "", 3
    cfg.MODEL.PIXEL_STD = [60.0, 60.0, 60.0]
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 128
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16
    cfg.MODEL.BACKBONE.FREEZE_AT = 1
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.RETINANET.NUM_CONVS = cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 0
    return cfg


def network(architecture: str, depth: int, seed: int) -> nn.Module:
    """With frozen norms that keep the values of a network that nobody trained small."""
    torch.manual_seed(seed)
    model = build_model(config(architecture, depth))
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.3, 0.6)
    return model


def distilled(architecture: str, seed: int = 1, **options: Any) -> DistilledModel:
    """A student of that seed; its teacher is always the same."""
    student = network(architecture, 18, seed)
    return DistilledModel(student, network(architecture, 50, 0), **{"norm": group_norm, **options}).train()


def batch(number: int, sizes: Iterable[tuple[int, int]] = ((64, 48), (40, 64))) -> list[dict[str, Any]]:
    """Images of several sizes with a box and its mask each."""
    generator = torch.Generator().manual_seed(number)
    found = []
    for height, width in sizes:
        masks = torch.zeros(1, height, width, dtype=torch.bool)
        masks[:, 8:36, 10:40] = True
        instances = Instances((height, width), gt_boxes=Boxes(torch.tensor([[10.0, 8.0, 40.0, 36.0]])))
        instances.gt_classes, instances.gt_masks = torch.tensor([number % 3]), BitMasks(masks)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        found.append({"image": image, "height": height, "width": width, "instances": instances})
    return found


def run(model: nn.Module, inputs: list[dict[str, Any]]) -> Any:
    """The same random choices in every call."""
    torch.manual_seed(7)
    with EventStorage(0):
        return model(inputs)


def stages(body: nn.Module, images: Tensor) -> list[Tensor]:
    """The sums that the last blocks of the four stages rectify, block by block."""
    found = []
    values = body.stem(images)
    for stage in (body.res2, body.res3, body.res4, body.res5):
        for block in stage:
            inside = [getattr(block, name) for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]
            branch = values
            for layer in inside[:-1]:
                branch = F.relu(layer(branch))
            total = inside[-1](branch) + (block.shortcut(values) if block.shortcut is not None else values)
            values = F.relu(total)
        found.append(total)
    return found


def places(inputs: list[dict[str, Any]], padded: Tensor, values: Tensor) -> Tensor:
    """Positions whose centre lies in an image, by a loop (N, H, W)."""
    mask = torch.zeros(len(values), *values.shape[2:], dtype=torch.bool)
    for number, row, column in itertools.product(*(range(size) for size in mask.shape)):
        height, width = inputs[number]["image"].shape[1:]
        y, x = ((at + 0.5) * padded.shape[2 + axis] / mask.shape[1 + axis] for axis, at in enumerate((row, column)))
        mask[number, row, column] = y < height and x < width
    return mask


@both
def test_a_step_is_the_students_own_losses_and_a_plain_computation_of_the_distillation(architecture: str) -> None:
    torch.manual_seed(0)
    model = distilled(architecture)
    teacher, inputs = model.distiller.teacher, batch(0)
    reference = copy.deepcopy(model.student)
    model.refresh([inputs])
    own = run(reference, inputs)
    losses = run(model, inputs)
    assert losses.keys() == {*own, "loss_features"}
    for name, loss in own.items():
        torch.testing.assert_close(losses[name], loss, rtol=0, atol=0)

    with torch.no_grad():
        images = reference.preprocess_image(inputs).tensor
        assert images.shape == (2, 3, 64, 64)
        pairs = zip(stages(reference.backbone.bottom_up, images), stages(teacher, images), strict=True)
        expected = 0.0
        for position, (student, guide) in zip(model.distiller.positions, pairs, strict=True):
            assert position.margin_norm is None
            mask = places(inputs, images, student)
            assert not mask.all()
            inside = [guide.movedim(1, -1)[mask][:, channel] for channel in range(guide.shape[1])]
            margins = np.array([values[values < 0].double().mean().nan_to_num() for values in inside])
            np.testing.assert_allclose(
                position.margin.numpy(), oracles.reduce_margin(margins, position.index.numpy(), "amp"), rtol=1e-4
            )
            assert (position.margin < 0).any()
            own, others = (F.normalize((maps * mask[:, None]).flatten(2), dim=2).double() for maps in (student, guide))
            cost = (2 - 2 * (own @ others.mT)).mean(0).numpy()
            best = oracles.assignment_cost(cost, oracles.balanced_assignment(cost, guide.shape[1] // student.shape[1]))
            assert oracles.assignment_cost(cost, position.index.numpy()) == pytest.approx(best, rel=1e-4)
            normed = position.norm(torch.where(mask[:, None], student, 0))
            groups = guide[:, position.index]
            strongest = groups.gather(2, groups.abs().argmax(2, keepdim=True))[:, :, 0]
            target = torch.maximum(strongest, position.margin[:, None, None])
            counts = ((normed > target) | (target > 0)) & mask[:, None]
            expected += 5 * ((normed - target).square() * counts).sum() / (mask.sum() * student.shape[1])
    torch.testing.assert_close(losses["loss_features"], torch.as_tensor(expected))

    sum(losses.values()).backward()
    trained = model.student.backbone.bottom_up.res5[1].conv2.weight
    assert trained.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


@both
def test_of_the_teacher_its_body_alone_runs_once(architecture: str) -> None:
    teacher = network(architecture, 50, 0)
    model = DistilledModel(network(architecture, 18, 1), teacher).train()
    ran = []
    for path, module in teacher.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    model.refresh([batch(0)])
    assert ran.count("backbone.bottom_up") == 1
    losses = run(model, batch(1))
    assert ran.count("backbone.bottom_up") == 2
    assert all(path.startswith("backbone.bottom_up") for path in ran)
    assert losses["loss_features"].isfinite()
    assert not any(parameter is own for parameter in teacher.parameters() for own in model.parameters())


class Pointwise(nn.Module):
    """A body in which no position knows of another: convolutions of one pixel."""

    def __init__(self, width: int, like: nn.Module) -> None:
        super().__init__()
        self._shapes = like.output_shape()
        strides = [shape.stride for shape in self._shapes.values()]
        sizes = [shape.channels for shape in self._shapes.values()]
        self.first = nn.Conv2d(3, width, 1, strides[0])
        self.stages = nn.ModuleList(nn.Conv2d(width, width, 1, 2 if number else 1) for number in range(len(sizes)))
        self.relus = nn.ModuleList(nn.ReLU() for _ in sizes)
        self.widths = nn.ModuleList(nn.Conv2d(width, size, 1) for size in sizes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values, found = self.first(images), {}
        for name, stage, relu, widen in zip(self._shapes, self.stages, self.relus, self.widths, strict=True):
            values = relu(stage(values))
            found[name] = widen(values)
        return found


def test_padding_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    models = [network("retinanet", depth, 0) for depth in (18, 50)]
    for model, width in zip(models, (4, 8), strict=True):
        model.backbone.bottom_up = Pointwise(width, model.backbone.bottom_up)
    losses, margins = [], []
    for multiple in (32, 160):
        student, teacher = copy.deepcopy(models)
        student.backbone._size_divisibility = multiple
        made = DistilledModel(student, teacher, norm=lambda channels: nn.Identity()).train()
        made.refresh([batch(0)])
        losses.append(run(made, batch(1))["loss_features"])
        margins.append(torch.cat([position.margin for position in made.distiller.positions]))
    assert losses[0] > 0
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(margins[0], margins[1])


@both
def test_evaluation_is_the_students(architecture: str) -> None:
    model = distilled(architecture).eval()
    expected, found = (run(each, batch(0)) for each in (copy.deepcopy(model.student), model))
    for first, second in zip(expected, found, strict=True):
        assert len(first["instances"]) > 0
        for name, value in first["instances"].get_fields().items():
            other = second["instances"].get(name)
            assert getattr(value, "tensor", value).equal(getattr(other, "tensor", other)), name


@both
def test_checkpoints_go_from_the_zoo_to_the_wrapper_and_to_the_plain_student(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = network(architecture, 18, 5).state_dict()
    zoo = tmp_path / "zoo.pkl"
    zoo.write_bytes(pickle.dumps({"model": {key: value.numpy() for key, value in weights.items()}, "__author__": "me"}))
    model = distilled(architecture)
    with caplog.at_level(logging.WARNING, "fvcore"):
        DetectionCheckpointer(model).load(str(zoo))
    for name, value in weights.items():
        assert model.student.state_dict()[name].equal(value), name
        assert model.state_dict()[name].equal(value), name
    warned = "\n".join(record.getMessage() for record in caplog.records)
    assert "distiller.positions.0" in warned
    assert all(name not in warned for name in ("student", "backbone", "head"))
    assert not model.distiller.has_matching

    model.refresh([batch(0)])
    DetectionCheckpointer(model, str(tmp_path)).save("own")
    plain = network(architecture, 18, 6)
    DetectionCheckpointer(plain).load(str(tmp_path / "own.pth"))
    for name, value in weights.items():
        assert plain.state_dict()[name].equal(value), name

    other = distilled(architecture, seed=8)
    DetectionCheckpointer(other).load(str(tmp_path / "own.pth"))
    assert other.distiller.has_matching
    assert list(other.state_dict()) == list(model.state_dict())
    for (name, value), saved in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        assert value.equal(saved), name


def test_weights_of_a_backbone_by_the_zoos_heuristics(tmp_path: Path) -> None:
    weights = network("retinanet", 18, 5).backbone.bottom_up.state_dict()
    file = tmp_path / "backbone.pkl"
    found = {"model": {key: value.numpy() for key, value in weights.items()}, "matching_heuristics": True}
    file.write_bytes(pickle.dumps({**found, "__author__": "me"}))
    model = distilled("retinanet")
    DetectionCheckpointer(model).load(str(file))
    for name, value in weights.items():
        assert model.distiller.student.state_dict()[name].equal(value), name


def test_a_checkpoint_for_other_classes_leaves_the_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = network("retinanet", 18, 5).state_dict()
    name = "head.cls_score.weight"
    state[name] = torch.cat([state[name]] * 2)
    torch.save({"model": state}, tmp_path / "zoo.pth")
    model = distilled("retinanet")
    before = model.student.state_dict()[name].clone()
    with caplog.at_level(logging.WARNING, "fvcore"):
        DetectionCheckpointer(model).load(str(tmp_path / "zoo.pth"))
    assert name in caplog.text
    assert model.student.state_dict()[name].equal(before)
    body = "backbone.bottom_up.res2.0.conv1.weight"
    assert model.state_dict()[body].equal(state[body])
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        model.nothing_of_the_kind  # noqa: B018


def test_versions_of_modules_are_saved_under_the_students_names() -> None:
    model = distilled("retinanet")
    state, own = model.state_dict(), model.student.state_dict()
    name = "backbone.bottom_up.res2.0.conv1.norm"
    assert state._metadata[name] == own._metadata[name] == {"version": 3}
    seen = []
    for norm in (model.student.get_submodule(name), model.distiller.student.get_submodule("res2.0.conv1.norm")):
        norm.register_load_state_dict_pre_hook(lambda *args: seen.append(args[3].get("version")))
    model.load_state_dict(own, strict=False)
    assert set(seen) == {3}


def test_what_a_checkpoint_lacks_is_told_by_its_own_names() -> None:
    model = distilled("retinanet")
    state = model.state_dict()
    name = "backbone.bottom_up.res2.0.conv1.weight"
    state["other"] = state.pop(name)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([name], ["other"])


class Seeds(HookBase):
    """The same random choices at an iteration in every run."""

    def before_step(self) -> None:
        torch.manual_seed(self.trainer.iter)


class Loader:
    """Batches that depend on the iteration alone."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        return map(batch, itertools.count(self._start))


def simple_trainer(model: nn.Module, start: int, asked: list[int], phases: Any) -> SimpleTrainer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer = SimpleTrainer(model, Loader(start), torch.optim.SGD(parameters, 0.01, momentum=0.9))

    def loader(iteration: int) -> list[Any]:
        asked.append(iteration)
        return [batch(100 + iteration)]

    trainer.register_hooks([Seeds(), RefreshMatching(loader, phases, max_images=2)])
    return trainer


def test_hook_refreshes_when_it_is_due(caplog: pytest.LogCaptureFixture) -> None:
    model, asked = distilled("retinanet"), []
    trainer = simple_trainer(model, 0, asked, [[0, 2], [4, 3]])
    with caplog.at_level(logging.INFO, "detectron2.matchdistill"):
        trainer.train(0, 7)
    assert asked == [0, 2, 6]
    assert "Matching refreshed before iteration 2, res2.2.conv3.norm:output + res2.1:output" in caplog.text
    stored = trainer.storage.histories()
    assert [iteration for _, iteration in stored["matching/cost_3"].values()] == [0, 2, 6]
    assert [iteration for _, iteration in stored["matching/churn_3"].values()] == [2, 6]
    total = sum(stored[f"features/{number}"].latest() for number in range(4))
    assert total == pytest.approx(stored["loss_features"].latest())

    asked.clear()
    simple_trainer(model, 3, asked, [[0, 2], [4, 3]]).train(3, 6)
    assert asked == []
    simple_trainer(distilled("retinanet"), 3, asked, [[0, 2], [4, 3]]).train(3, 6)
    assert asked == [3]  # it had no matching


@pytest.mark.parametrize("phases", [[], [0, 5000], [[0, 0.5]], [[5, 2]], [[0, 2], [0, 3]], [[0]], [[0, -1]]])
def test_hook_takes_ascending_pairs_alone(phases: Any) -> None:
    with pytest.raises(ValueError, match=r"phases is .*: expected pairs \[from iteration, every\], ascending"):
        RefreshMatching(lambda _: [], phases)


@both
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Detectron2's is scripted: it is compiled after a few calls, and then rounds differently.
    monkeypatch.setattr("detectron2.modeling.meta_arch.retinanet.sigmoid_focal_loss_jit", sigmoid_focal_loss)
    phases, refreshed = [[0, 3]], []
    whole = distilled(architecture)
    simple_trainer(whole, 0, refreshed, phases).train(0, 5)
    assert refreshed == [0, 3]

    first = distilled(architecture)
    trainer = simple_trainer(first, 0, [], phases)
    checkpointer = DetectionCheckpointer(first, str(tmp_path), trainer=trainer)
    trainer.train(0, 2)
    trainer.iter -= 1  # as in the loop, where the checkpoint's hook runs
    checkpointer.save("cut")

    refreshed.clear()
    second = distilled(architecture, seed=9)
    trainer = simple_trainer(second, 2, refreshed, phases)
    DetectionCheckpointer(second, str(tmp_path), trainer=trainer).resume_or_load("", resume=True)
    assert trainer.iter == 1
    if architecture == "retinanet":  # Detectron2 leaves its running number of foreground anchors out of checkpoints
        second.student.loss_normalizer = first.student.loss_normalizer
    trainer.train(2, 5)
    assert refreshed == [3]
    for (name, value), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert value.equal(other), name
    assert not whole.state_dict()["backbone.bottom_up.res5.1.conv2.weight"].equal(
        first.state_dict()["backbone.bottom_up.res5.1.conv2.weight"]
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five images, registered with Detectron2."""
    folder = tmp_path_factory.mktemp("images")
    images, annotations = [], []
    for number in range(5):
        pixels = torch.randint(256, (64, 48 + 8 * number, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        images.append({"id": number, "file_name": f"{number}.png", **size})
        where = {"bbox": [4, 4, 30, 30], "segmentation": [[4, 4, 34, 4, 34, 34, 4, 34]], "area": 900, "iscrowd": 0}
        annotations.append({"id": number + 1, "image_id": number, "category_id": 1 + number % 3, **where})
    categories = [{"id": number, "name": str(number)} for number in (1, 2, 3)]
    file = folder / "annotations.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    register_coco_instances("five_images", {}, str(file), str(folder))
    return "five_images"


def test_the_loader_of_a_refresh_has_every_image_about_once(dataset: str) -> None:
    cfg = config("retinanet", 18)
    cfg.DATASETS.TRAIN, cfg.INPUT.MIN_SIZE_TRAIN = (dataset,), (64,)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    orders = [[each["image_id"] for found in refresh_loader(cfg, at) for each in found] for at in (0, 0, 1)]
    assert sorted(orders[0]) == [0, 1, 2, 3, 4]
    assert orders[0] == orders[1] != orders[2]
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    assert sum(len(found) for found in refresh_loader(cfg, 0)) == 5


def test_a_refresh_leaves_the_random_numbers_as_they_were() -> None:
    def drawing() -> Iterator[Any]:
        random.random(), np.random.rand(), torch.rand(1)
        yield batch(0)

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(1))]

    model = distilled("retinanet")
    found = []
    for refresh in (True, False):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if refresh:
            model.refresh(drawing())
        found.append(draw())
    assert found[0] == found[1]


@both
def test_default_trainer_refreshes_and_resumes(architecture: str, dataset: str, tmp_path: Path) -> None:
    """As the README has it, from two configs."""
    cfg = config(architecture, 18)
    cfg.DATASETS.TRAIN, cfg.INPUT.MIN_SIZE_TRAIN, cfg.OUTPUT_DIR = (dataset,), (48, 64), str(tmp_path)
    cfg.DATASETS.TEST, cfg.SOLVER.BASE_LR = (), 1e-7
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.STEPS = 3, 1, ()
    teacher_cfg = config(architecture, 50)
    (tmp_path / "teacher").mkdir()
    DetectionCheckpointer(network(architecture, 50, 0), str(tmp_path / "teacher")).save("teacher")
    teacher_cfg.MODEL.WEIGHTS = str(tmp_path / "teacher" / "teacher.pth")
    asked: list[int] = []

    class Trainer(DefaultTrainer):
        @classmethod
        def build_model(cls, cfg: Any) -> DistilledModel:
            return DistilledModel(build_model(cfg), load_teacher(teacher_cfg), norm=group_norm)

        def build_hooks(self) -> list[Any]:
            def loader(iteration: int) -> Any:
                asked.append(iteration)
                return refresh_loader(cfg, iteration)

            return [RefreshMatching(loader, [[0, 2]]), *super().build_hooks()]

    trainer = Trainer(cfg)
    for value, other in zip(
        trainer.model.distiller.teacher.state_dict().values(),
        network(architecture, 50, 0).backbone.bottom_up.state_dict().values(),
        strict=True,
    ):
        assert value.equal(other)
    trainer.resume_or_load(resume=True)
    trainer.max_iter = 2
    trainer.train()
    assert asked == [0]
    assert trainer.model.distiller.positions[0].matching.images == 5
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    assert trainer.model.distiller.has_matching
    trainer.train()
    assert asked == [0, 2]


def test_teachers_that_do_not_fit() -> None:
    cfg = config("retinanet", 18)
    cfg.MODEL.PIXEL_STD = [2.0, 2.0, 2.0]
    with pytest.raises(
        ValueError, match=r"teacher's pixel_std is \[2.0, 2.0, 2.0\], the student's \[60.0, 60.0, 60.0\]"
    ):
        DistilledModel(network("retinanet", 18, 0), build_model(cfg))
    cfg = config("retinanet", 18)
    cfg.INPUT.FORMAT = "RGB"
    with pytest.raises(ValueError, match="input_format is RGB, the student's BGR"):
        DistilledModel(network("retinanet", 18, 0), build_model(cfg))
    with pytest.raises(ValueError, match="a Linear has not both backbone and preprocess_image"):
        DistilledModel(network("retinanet", 18, 0), nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"teacher's cfg\.MODEL\.WEIGHTS is empty"):
        load_teacher(cfg)
    trainer = simple_trainer(network("retinanet", 18, 0), 0, [], [[0, 1]])
    with pytest.raises(ValueError, match="the trainer's model is a RetinaNet: expected a DistilledModel"):
        trainer.train(0, 1)
