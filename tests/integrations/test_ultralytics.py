"""The distilling trainers of Ultralytics, on small networks from YAML with random weights and a set that the test makes."""

import copy
import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

import oracles
from matchdistill.probing import OwnHook

os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_VERBOSE", "false")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
ultralytics = pytest.importorskip("ultralytics")
from ultralytics import RTDETR, YOLO  # noqa: E402
from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: E402
from ultralytics.nn.modules import Detect  # noqa: E402

from matchdistill.integrations.ultralytics import COLUMN, STATE, distilling  # noqa: E402
from matchdistill.integrations.yolo import found_taps, head_of  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

HEADS = {
    "detect": "Detect, [nc]",
    "segment": "Segment, [nc, 8, 16]",
    "pose": "Pose, [nc, kpt_shape]",
    "classify": "Classify, [nc]",
}


def network(folder: Path, task: str = "detect", width: int = 1, classes: int = 2) -> Path:
    """A YAML of a small network with four stages and a neck of two maps; a classifier has none."""
    w = 8 * width
    layers = [
        f"[-1, 1, Conv, [{w}, 3, 2]]",
        f"[-1, 1, Conv, [{2 * w}, 3, 2]]",
        f"[-1, 1, C3k2, [{2 * w}, False, 0.25]]",
        f"[-1, 1, Conv, [{4 * w}, 3, 2]]",
        f"[-1, 1, C3k2, [{4 * w}, False, 0.25]]",
        f"[-1, 1, Conv, [{8 * w}, 3, 2]]",
        f"[-1, 1, C3k2, [{8 * w}, True]]",
    ]
    neck = [
        '[-1, 1, nn.Upsample, [None, 2, "nearest"]]',
        "[[-1, 4], 1, Concat, [1]]",
        f"[-1, 1, C3k2, [{4 * w}, False]]",
    ]
    last = "-1" if task == "classify" else "[9, 6]"
    head = [*([] if task == "classify" else neck), f"[{last}, 1, {HEADS[task]}]"]
    path = folder / f"{task}{width}-{classes}.yaml"
    words = [f"nc: {classes}", "kpt_shape: [3, 3]", "backbone:", *(f"  - {each}" for each in layers), "head:"]
    path.write_text("\n".join([*words, *(f"  - {each}" for each in head)]) + "\n")
    return path


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For each task a set of a dozen images with bright rectangles, as Ultralytics reads it."""
    root, chance = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    found = {}
    for task in HEADS:
        for split in ("train", "val"):
            for number in range(12):
                image = chance.integers(0, 90, (64, 64, 3), dtype=np.uint8)
                left, top, width, height = (
                    int(value) for value in (*chance.integers(4, 30, 2), *chance.integers(16, 30, 2))
                )
                label = number % 2
                image[top : top + height, left : left + width, label] = 250
                right, bottom = left + width, top + height
                corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]]) / 64
                box = [(left + right) / 128, (top + bottom) / 128, width / 64, height / 64]
                values = {
                    "detect": box,
                    "segment": corners.flatten(),
                    "pose": [*box, *np.column_stack([corners[:3], [2, 2, 2]]).flatten()],
                }
                folder = root / task / split / str(label) if task == "classify" else root / task / "images" / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{number}.png")
                if task != "classify":
                    labels = root / task / "labels" / split
                    labels.mkdir(parents=True, exist_ok=True)
                    text = " ".join(f"{value:.6f}" for value in values[task])
                    (labels / f"{number}.txt").write_text(f"{label} {text}\n")
        found[task] = str(root / task)
        if task != "classify":
            words = {"train": "images/train", "val": "images/val", "names": {0: "red", 1: "green"}, "kpt_shape": [3, 3]}
            found[task] = str(root / task / "data.yaml")
            Path(found[task]).write_text(yaml.safe_dump(words))
    return found


Train = Callable[..., YOLO]


@pytest.fixture
def train(sets: dict[str, str], tmp_path: Path) -> Train:
    """Trains a small student of a task; a callback gets the trainer at an event."""

    def run(trainer: Any, task: str = "detect", start: Any = None, **options: Any) -> YOLO:
        callbacks = options.pop("callbacks", {})
        torch.manual_seed(0)
        model = YOLO(str(start or network(tmp_path, task)), task=task)
        for event, callback in callbacks.items():
            model.add_callback(event, callback)
        usual = {
            "data": sets[task],
            "epochs": 1,
            "imgsz": 64,
            "batch": 4,
            "nbs": 4,
            "device": "cpu",
            "plots": False,
            "optimizer": "SGD",
            "lr0": 0.01,
            "project": str(tmp_path / "runs"),
            "name": "run",
        }
        model.train(trainer=trainer, **{**usual, **options})
        return model

    return run


def teacher(folder: Path, task: str = "detect", classes: int = 5, seed: int = 1) -> YOLO:
    """A wide one, of other classes, whose norms have seen something."""
    torch.manual_seed(seed)
    made = YOLO(str(network(folder, task, width=2, classes=classes)), task=task)
    for module in made.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.2)
    return made


def own_hooks(model: nn.Module) -> list[OwnHook]:
    hooks = [
        hook for m in model.modules() for held in (m._forward_hooks, m._forward_pre_hooks) for hook in held.values()
    ]
    return [hook for hook in hooks if isinstance(hook, OwnHook)]


def features(model: nn.Module, paths: list[str], run: Callable[[], Any]) -> tuple[list[Tensor], Any]:
    """What the modules at these paths return in a run, by plain hooks."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = [
        modules[path].register_forward_hook(
            lambda module, args, output, path=path: found.__setitem__(path, output.clone())
        )
        for path in paths
    ]
    output = run()
    for handle in handles:
        handle.remove()
    return [found[path] for path in paths], output


def test_the_loss_of_a_step_is_the_one_of_a_slow_loop(train: Train, tmp_path: Path) -> None:
    whole, seen = teacher(tmp_path), {}

    def before(trainer: Any) -> None:
        if "student" not in seen:
            seen["student"] = copy.deepcopy(trainer.model)
            seen["positions"] = copy.deepcopy(list(trainer.distiller.positions))
            plain = trainer.preprocess_batch

            def preprocess(batch: Any) -> Any:
                batch = plain(batch)
                seen.setdefault("batch", copy.deepcopy(batch))
                return batch

            trainer.preprocess_batch = preprocess

    def after(trainer: Any) -> None:
        if "loss" not in seen:
            seen["loss"], seen["items"] = trainer.loss.detach().clone(), trainer.loss_items

    callbacks = {"on_train_batch_start": before, "on_train_batch_end": after}
    train(distilling(whole, loss_weight=0.7), callbacks=callbacks)
    student, batch = seen["student"], seen["batch"]
    for module in student.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    places = [position.student.module for position in seen["positions"]]
    assert places == ["model.0.bn", *(f"model.{number}.cv2.bn" for number in (2, 4, 6, 9))]
    given, (losses, items) = features(student.train(), places, lambda: student(batch))
    with torch.no_grad():
        targets, _ = features(whole.model.eval(), places, lambda: whole.model(batch["img"]))
    expected = 0.0
    for position, maps, wide in zip(seen["positions"], given, targets, strict=True):
        index = position.index.numpy()
        normed = nn.functional.batch_norm(maps, None, None, training=True).detach().double().numpy()
        reduced = oracles.reduce_channels(wide.double().numpy(), index, "amp")
        norm = dict(whole.model.named_modules())[position.teacher.module]
        margins = oracles.batchnorm_margin(norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy())
        margin = oracles.reduce_margin(margins, index, "amp")
        expected += 0.7 * oracles.partial_loss(normed, reduced, margin, "mean")
    assert list(seen["items"]) == [*items, COLUMN]
    assert seen["items"][COLUMN].item() == pytest.approx(expected, rel=1e-4)
    assert seen["loss"].item() == pytest.approx(losses.sum().item() + expected * 4, rel=1e-4)  # a sum over four images


@pytest.mark.parametrize("task", HEADS)
def test_a_pair_of_each_task(train: Train, tmp_path: Path, task: str) -> None:
    whole = teacher(tmp_path, task)
    before, seen = copy.deepcopy(whole.model.state_dict()), []

    def ended(trainer: Any) -> None:
        sums = sum(value for name, value in trainer.loss_items.items())
        seen.append((trainer.loss.item(), sums.item()))
        assert not own_hooks(trainer.ema.ema)
        assert own_hooks(trainer.model)

    model = train(distilling(whole), task, callbacks={"on_train_batch_end": ended})
    images = 1 if task == "classify" else 4  # a mean over the images, or sums of all four
    assert all(loss == pytest.approx(images * items, rel=1e-4) for loss, items in seen)
    assert all(torch.equal(value, before[name]) for name, value in whole.model.state_dict().items())
    assert all(parameter.grad is None for parameter in whole.model.parameters())
    assert not own_hooks(whole.model)
    assert not own_hooks(model.trainer.model)
    assert model.trainer.distiller is None
    (row,) = csv.DictReader(model.trainer.csv.open())
    assert float(row[f"train/{COLUMN}"]) > 0
    assert any(name.startswith("metrics/") for name in row)


PLAIN = """
import sys
sys.modules["matchdistill"] = None  # importing it fails
import torch
from ultralytics import RTDETR, YOLO
for path in sys.argv[1:]:
    model = YOLO(path)
    model.predict(torch.zeros(1, 3, 64, 64), device="cpu", verbose=False)
    print(sorted(torch.load(path, weights_only=False)))
    print(type(model.model).__module__, [type(module).__name__ for module in YOLO(path).model.modules()])
    kinds = "hooks", "pre_hooks", "hooks_with_kwargs", "hooks_always_called", "pre_hooks_with_kwargs"
    print([len(getattr(module, f"_forward_{kind}")) for module in YOLO(path).model.modules() for kind in kinds])
    print({name: tuple(value.shape) for name, value in YOLO(path).model.state_dict().items()})
"""


def test_the_files_are_the_ones_of_a_plain_training(train: Train, tmp_path: Path) -> None:
    plain = train(None, name="plain")
    distilled = train(distilling(teacher(tmp_path)), name="distilled")
    printed = []
    for model in (plain, distilled):
        files = [str(model.trainer.wdir / name) for name in ("best.pt", "last.pt")]
        command = [sys.executable, "-c", PLAIN, *files]
        printed.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for file in files:
            assert b"matchdistill" not in Path(file).read_bytes()
    assert printed[0].count("model.9.cv2.bn.weight") == 2
    assert printed[0] == printed[1]
    student, images = YOLO(files[0]), torch.rand(1, 3, 64, 64)
    exported = torch.jit.load(student.export(format="torchscript", imgsz=64, device="cpu"))
    with torch.no_grad():
        expected = YOLO(files[0]).model.float().fuse().eval()(images)[0]
        torch.testing.assert_close(exported(images), expected, rtol=1e-3, atol=1e-3)


class CutError(Exception):
    pass


def stopped(train: Train, trainer: Any, epochs: int, folder: Path, **options: Any) -> Path:
    """The last checkpoint of a run that is cut after so many epochs of three."""

    def cut(trainer: Any) -> None:
        if trainer.epoch == epochs - 1:
            raise CutError

    callbacks = {"on_fit_epoch_end": cut, **options.pop("callbacks", {})}
    with pytest.raises(CutError):
        train(trainer, epochs=3, callbacks=callbacks, project=str(folder), name="cut", **options)
    return folder / "cut" / "weights" / "last.pt"


def guests_of(trainer: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The state of the positions, and what the optimiser knows of their normalisation."""
    positions = nn.ModuleList(trainer.distiller.positions)
    weights = list(positions.parameters())
    (group,) = [each for each in trainer.optimizer.param_groups if any(weights[0] is one for one in each["params"])]
    assert group["param_group"] == "bn"
    return copy.deepcopy((positions.state_dict(), [trainer.optimizer.state[weight] for weight in weights]))


class Watch:
    """What a run begins with, and the images of its refreshes by epoch."""

    def __init__(self) -> None:
        self.images: dict[int, list[Tensor]] = {}

    def begin(self, trainer: Any) -> None:
        self.state, self.known = guests_of(trainer)
        run = trainer._run

        def watched(batch: Any) -> None:
            self.images.setdefault(trainer.epoch, []).append(batch["img"].clone())
            run(batch)

        trainer._run = watched


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "MuSGD"])
def test_a_resumed_run_goes_on(train: Train, tmp_path: Path, optimizer: str) -> None:
    """With the matching and what the optimiser knew, and over the same images at the next refresh."""
    whole, uncut, resumed, ended = teacher(tmp_path), Watch(), Watch(), {}
    train(distilling(whole), epochs=3, optimizer=optimizer, callbacks={"on_train_start": uncut.begin})

    def saved(trainer: Any) -> None:
        ended["state"], ended["known"] = guests_of(trainer)

    callbacks = {"on_model_save": saved}
    last = stopped(train, distilling(whole), 2, tmp_path / "runs", optimizer=optimizer, callbacks=callbacks)
    kept = torch.load(last, weights_only=False)["optimizer"][STATE]
    train(distilling(whole), start=last, resume=True, callbacks={"on_train_start": resumed.begin})
    for name, value in ended["state"].items():
        assert torch.equal(kept[name], value), name
        assert torch.equal(resumed.state[name], value), name
    for given, expected in zip(resumed.known, ended["known"], strict=True):
        assert given.keys() == expected.keys()
        values = {key: value for key, value in expected.items() if isinstance(value, Tensor)}
        assert values
        for key, value in values.items():
            # Ultralytics keeps some of these in half precision.
            torch.testing.assert_close(given[key].float(), value, rtol=1e-3, atol=1e-7)
    assert list(uncut.images) == [0, 1, 2]
    assert list(resumed.images) == [2]
    assert len(resumed.images[2]) == 3
    assert all(torch.equal(*both) for both in zip(uncut.images[2], resumed.images[2], strict=True))
    assert not torch.equal(uncut.images[1][0], uncut.images[2][0])
    assert torch.load(last, weights_only=False)["optimizer"] is None  # finished, and plain


def test_the_plain_training_is_the_one_without_a_teacher(train: Train, tmp_path: Path) -> None:
    """With a weight of zero the student ends bit for bit as it does without us: the same images in the same order."""
    plain = train(None, name="plain", epochs=2)
    distilled = train(distilling(teacher(tmp_path), loss_weight=0.0), name="distilled", epochs=2)
    for (name, value), (other, its) in zip(
        plain.model.state_dict().items(), distilled.model.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(value, its), name


def test_refused_before_training(train: Train, tmp_path: Path) -> None:
    whole = teacher(tmp_path)
    refused = (
        ({"taps": "neckline"}, "'auto', 'backbone', 'neck'"),
        ({"taps": [("model.4",)]}, "or pairs"),
        ({"taps": []}, "or pairs"),
        ({"online": 2}, "leave it out"),
        ({"refresh_every": "x"}, "refresh_every is 'x'"),
    )
    for options, words in refused:
        with pytest.raises(ValueError, match=words):
            distilling(whole, **options)
    with pytest.raises(TypeError, match="did you mean 'loss_weight'"):
        distilling(whole, los_weight=1.0)
    with pytest.raises(TypeError, match="the teacher is a int"):
        distilling(3)
    with pytest.raises(TypeError, match="base is 3"):
        distilling(whole, base=3)
    for options, words in (({"compile": True}, "compile=True"), ({"distill_model": "x.pt"}, "distill_model='x.pt'")):
        with pytest.raises(ValueError, match=words):
            train(distilling(whole), **options)
    gray = YOLO(str(network(tmp_path, width=2)))
    gray.model.model[0].conv = nn.Conv2d(1, 16, 3, 2, 1)
    with pytest.raises(ValueError, match=r"the teacher \(DetectionModel\) fails on an input of shape \(2, 3, 64, 64\)"):
        train(distilling(gray))
    with pytest.raises(ValueError, match="taps='neck'"):
        train(distilling(teacher(tmp_path, "classify"), taps="neck"), "classify")
    with pytest.raises(ValueError, match=r"has no module 'model\.77'"):
        train(distilling(whole, taps=[("model.2", "model.77")]))
    last = stopped(train, None, 1, tmp_path / "plain")
    with pytest.raises(ValueError, match="no matching"):
        train(distilling(whole), start=last, resume=True)
    other = stopped(train, distilling(whole), 1, tmp_path / "distilled")
    with pytest.raises(ValueError, match="another teacher, other taps or another reduction"):
        train(distilling(whole, taps="neck"), start=other, resume=True)


def test_a_failed_pass_is_tried_again(train: Train, tmp_path: Path) -> None:
    """Ultralytics halves the batch where memory ends: the step that failed leaves nothing behind."""
    sizes: list[int] = []

    class Short(DetectionTrainer):
        def _setup_train(self) -> None:
            super()._setup_train()

            def scarce(module: nn.Module, args: Any) -> None:
                if module.training and len(args[0][0]) > 2:
                    raise RuntimeError("CUDA out of memory")

            self.model.model[-1].register_forward_pre_hook(scarce)

    def ended(trainer: Any) -> None:
        sizes.append(trainer.batch_size)
        assert trainer.loss_items[COLUMN] > 0

    train(distilling(teacher(tmp_path), base=Short), callbacks={"on_train_batch_end": ended})
    assert sizes == [2] * 6


def test_other_places(train: Train, tmp_path: Path) -> None:
    whole, places = teacher(tmp_path), []

    def began(trainer: Any) -> None:
        places.append([(str(one.teacher), str(one.student)) for one in trainer.distiller.positions])
        last = trainer.distiller.teacher.model[-1]
        assert isinstance(last, Detect) == (given == head)

    head = [("model.10.cv3.0.0.1", "model.10.cv3.0.0.1")]
    for given in ("backbone", "neck", head):
        train(distilling(whole, taps=given), callbacks={"on_train_start": began})
    assert [len(each) for each in places] == [4, 2, 1]
    assert places[1] == [(f"model.{n}.cv2.bn:output", f"model.{n}.cv2.bn:output") for n in (9, 6)]


def test_a_teacher_of_timm_sees_its_own_normalisation(train: Train, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    whole, seen = timm.create_model("resnet10t.c3_in1k"), []

    class Own(DetectionTrainer):
        def preprocess_batch(self, batch: Any) -> Any:
            batch = super().preprocess_batch(batch)
            if self.distiller.has_matching and "given" not in vars(self):
                self.given = batch["img"].clone()
                first = next(module for module in self.distiller.teacher.modules() if isinstance(module, nn.Conv2d))
                first.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
            return batch

    model = train(distilling(whole, base=Own))
    mean, std = (torch.tensor(whole.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(seen[0], (model.trainer.given - mean) / std)
    assert model.trainer.loss_items[COLUMN] > 0


def test_a_teacher_of_another_family(train: Train, tmp_path: Path) -> None:
    """A student of YOLO11's blocks learns from YOLOv8's."""
    path, places = network(tmp_path, width=2, classes=5), []
    text = re.sub(r"C3k2, \[(\d+), .*?\]", r"C2f, [\1, True]", path.read_text())
    (tmp_path / "yolov8.yaml").write_text(text)
    whole = YOLO(str(tmp_path / "yolov8.yaml"))
    assert {"C2f"} <= {type(module).__name__ for module in whole.model.modules()}

    def began(trainer: Any) -> None:
        places.extend(trainer.distiller.positions)

    model = train(distilling(whole), callbacks={"on_train_start": began})
    assert len(places) == 5
    assert model.trainer.loss_items[COLUMN] > 0


def test_a_student_of_rtdetr_needs_its_own_trainer(sets: dict[str, str], tmp_path: Path) -> None:
    text = network(tmp_path).read_text().replace("Detect, [nc]", "RTDETRDecoder, [nc, 16, 5, 4, 2, 1, 16]")
    (tmp_path / "rtdetr.yaml").write_text(text)
    options = {"data": sets["detect"], "epochs": 1, "imgsz": 64, "batch": 4, "device": "cpu", "plots": False}
    with pytest.raises(ValueError, match=r"RT-DETR, which DetectionTrainer cannot train.*base=RTDETRTrainer"):
        RTDETR(str(tmp_path / "rtdetr.yaml")).train(trainer=distilling(teacher(tmp_path)), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "student", "positions"),
    [
        ("yolo11s", "yolo11n", 7),
        ("yolov8s", "yolo11n", 7),
        ("yolo26s", "yolo26n", 7),
        ("yolov10s", "yolov10n", 7),
        ("rtdetr-resnet50", "yolo11n", 7),
        ("yolo11s-seg", "yolo11n-seg", 7),
        ("yolo11s-pose", "yolo11n-pose", 7),
        ("yolo11s-obb", "yolo11n-obb", 7),
        ("yolo11s-cls", "yolo11n-cls", 4),
    ],
)
def test_positions_of_the_families(teacher: str, student: str, positions: int) -> None:
    """Backbone and neck of real networks: pairs of equal sizes, each before an activation, none in a head."""
    networks = [(RTDETR if "rtdetr" in name else YOLO)(f"{name}.yaml").model for name in (teacher, student)]
    taps = found_taps(*networks, torch.zeros(2, 3, 64, 64), "auto")
    assert len(taps) == positions
    for model, own in zip(networks, zip(*taps, strict=True), strict=True):
        head = head_of(model).i
        assert all(int(tap.module.split(".")[1]) < head for tap in own) or teacher.endswith("-cls")


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils.patches import torch_load

class OnCPU(nn.parallel.DistributedDataParallel):
    def __init__(self, model, device_ids=None, **options):
        super().__init__(model, **options)

nn.parallel.DistributedDataParallel = OnCPU
BaseTrainer._setup_ddp = lambda self: dist.init_process_group("gloo")
BaseTrainer.final_eval = lambda self: None  # for GPUs alone
torch.set_num_threads(1)
state = torch_load(sys.argv[1], map_location="cpu")
trainer = state["trainer"](overrides=state["args"], _callbacks=state["callbacks"])
trainer.model, trainer.world_size = state["model"], 2

def keep(trainer):
    positions = nn.ModuleList(trainer.distiller.positions)
    values = {"student": trainer.distiller.student.state_dict(), "positions": positions.state_dict()}
    values["trained"] = [parameter.detach() for parameter in positions.parameters()]
    torch.save(values, f"{sys.argv[2]}/{dist.get_rank()}.pt")

trainer.add_callback("on_train_epoch_end", keep)
trainer.train()
"""


@pytest.mark.slow
def test_two_processes_train_one_student(sets: dict[str, str], tmp_path: Path) -> None:
    """From the file by which Ultralytics sends a trainer to the processes of DDP, here on the CPU."""
    pytest.importorskip("cloudpickle")
    from ultralytics.utils.dist import generate_ddp_file

    options = {"model": str(network(tmp_path)), "data": sets["detect"], "epochs": 2, "imgsz": 64, "batch": 4, "nbs": 4}
    options |= {"device": "cpu", "plots": False, "optimizer": "SGD", "project": str(tmp_path / "runs")}
    path = generate_ddp_file(distilling(teacher(tmp_path))(overrides=options))
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    state = Path(path).with_suffix(".pt")
    subprocess.run([*launch, str(tmp_path / "worker.py"), str(state), str(tmp_path)], check=True)
    Path(path).unlink()
    state.unlink()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(*both) for both in zip(first["trained"], second["trained"], strict=True))
    assert any((value - 1).abs().max() > 1e-6 for value in first["trained"][::2])
    for name, value in first["student"].items():
        if not name.endswith(("running_mean", "running_var")):  # each process has its own
            assert torch.equal(value, second["student"][name]), name
    for name, value in first["positions"].items():
        if "running" not in name:
            assert torch.equal(value, second["positions"][name]), name
