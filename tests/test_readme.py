"""What the README shows is run as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from torch import nn

from matchdistill import cli
from matchdistill.models import small_resnet
from matchdistill.recipe import Recipe, plain_config, recipe_parser, resolve_recipe

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [line for _, text in BLOCKS for line in text.splitlines() if line.startswith("matchdistill")]
PYTHON = [text for language, text in BLOCKS if language == "python"]


class Detector(nn.Module):
    """A larger model around a backbone, which gives a list of images as a batch to it."""

    def __init__(self, width):
        super().__init__()
        self.backbone = small_resnet(width=width)

    def forward(self, images, targets=None):
        output = self.backbone(torch.stack(images))
        return {"classification": output.square().mean()} if targets else output


def test_the_loop_of_five_lines_trains_the_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    teacher, student = small_resnet(width=16), small_resnet(width=8)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    loader = [(torch.randn(4, 3, 16, 16), torch.randint(10, (4,))) for _ in range(2)]
    exec(PYTHON[0], {"torch": torch, "F": F, "teacher": teacher, "student": student, "loader": loader, "epochs": 2})
    saved = torch.load("student.pt", weights_only=True)
    assert saved.keys() == before.keys()
    assert not saved["fc.weight"].equal(before["fc.weight"])


def test_taps_of_ones_own():
    from matchdistill import MatchingDistiller

    names = {"MatchingDistiller": MatchingDistiller}
    names |= {"teacher": torchvision.models.resnet50(), "student": torchvision.models.mobilenet_v2()}
    exec(PYTHON[1], names)
    (position,) = names["distiller"].positions
    assert (position.teacher_channels, position.student_channels) == (1024, 384)


def test_parts_of_larger_models():
    from matchdistill import MatchingDistiller

    images = [torch.randn(3, 16, 16) for _ in range(4)]
    names = {
        "torch": torch,
        "MatchingDistiller": MatchingDistiller,
        "teacher": Detector(16),
        "detector": Detector(8),
        "loader": [(images, [{}] * 4)] * 2,
        "images": images,
        "targets": [{}] * 4,
    }
    exec(PYTHON[2], names)
    assert names["loss"].requires_grad
    assert names["distiller"].positions[0].matching.images == 8


def test_the_recipe_resolves():
    (text,) = [text for language, text in BLOCKS if language == "yaml"]
    values = yaml.safe_load(text)
    assert values["teacher"].pop("weights") == "teacher.pth"
    parser = recipe_parser()
    Recipe.of(plain_config(resolve_recipe(values, parser)))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["recipes", "copy", "quickstart", "mine.yaml"])
    arguments = shlex.split(line)[1:]
    if arguments[0] == "recipes":
        arguments[-1] = "another.yaml"
    else:
        arguments.append("--print_config")
    assert cli.main(arguments) == 0, capsys.readouterr().err
