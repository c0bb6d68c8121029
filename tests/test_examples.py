"""The examples are run, smaller than they are by default."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from matchdistill.data import ImageData
from matchdistill.models import load_weights, small_resnet

FOLDER = Path(__file__).parent.parent / "examples"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*logging interval"),
]


@pytest.fixture
def example(tmp_path, monkeypatch):
    """An example's names, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_each_says_how_to_run_it(path):
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]


def test_the_plain_loop_and_the_callback_train_the_same(example, tmp_path):
    by_hand = example("plain_loop")["main"](epochs=6, width=8)
    assert by_hand.keys() == {"teacher", "student alone", "student with MGD"}
    assert by_hand["student alone"] != by_hand["student with MGD"]
    assert by_hand["teacher"] > 0.8
    assert example("lightning_callback")["main"](epochs=6, width=8) == pytest.approx(by_hand)
    (checkpoint,) = tmp_path.glob("runs/lightning_callback/checkpoints/epoch=11-step=72.ckpt")
    load_weights(small_resnet(width=2), checkpoint)


def test_accelerate(example, tmp_path):
    accuracy, distiller = example("accelerate_loop")["main"](epochs=8, train_limit=600, cpu=True)
    assert accuracy > 0.3
    assert distiller.positions[0].matching.images == 600
    teacher = small_resnet(width=32)
    load_weights(teacher, tmp_path / "runs" / "accelerate_loop" / "teacher.pt")
    images, labels = next(iter(ImageData(batch_size=500).val_dataloader()))
    with torch.no_grad():
        assert (teacher.eval()(images).argmax(1) == labels).float().mean() > 0.5


def test_the_trainer_of_transformers(example, tmp_path):
    transformers = pytest.importorskip("transformers")
    accuracies = example("transformers_trainer")["main"](epochs=4, width=16)
    assert accuracies.keys() == {"teacher", "student alone", "student with MGD"}
    assert accuracies["student alone"] != accuracies["student with MGD"]
    transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "runs/transformers_trainer/student")


@pytest.mark.slow
def test_accelerate_on_two_processes(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    ran = subprocess.run(
        [*command, str(FOLDER / "accelerate_loop.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert float(re.fullmatch(r"student: ([\d.]+)%\n", ran.stdout)[1]) > 70


@pytest.fixture
def pictures(tmp_path):
    """Pictures of two colours, in folders."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for channel, name in ((0, "red"), (2, "blue")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = chance.integers(0, 120, (40, 48, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.jpg")
    return tmp_path


def test_the_reference_of_torchvision(example, pictures, capsys):
    main = example("torchvision_reference")["main"]
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), "teacher.pth")
    arguments = ["--teacher=resnet18", "--teacher-weights=teacher.pth", "--model=shufflenet_v2_x0_5", "--lr=0.01"]
    sizes = ["--image-size=32", "--batch-size=4", "--epochs=2", "--output-dir=out"]
    accuracy = main([f"--data-path={pictures}", *arguments, *sizes])
    assert 0 <= accuracy <= 1
    assert re.findall(
        r"epoch (\d): loss [\d.]+, of which distillation (?!0\.000)[\d.]+\n", capsys.readouterr().out
    ) == [
        "0",
        "1",
    ]
    student = torchvision.models.shufflenet_v2_x0_5(num_classes=2)
    student.load_state_dict(torch.load("out/model.pth", weights_only=True), strict=True)


def test_the_command_of_the_reference_of_torchvision(example):
    names = example("torchvision_reference")
    (command,) = re.findall(r"python examples/torchvision_reference.py (.*?)\n\n", names["__doc__"], re.DOTALL)
    args = names["get_args_parser"]().parse_args(shlex.split(command.replace("\\\n", " ")))
    assert (args.model, args.teacher, args.epochs) == ("mobilenet_v2", "resnet50", 90)
