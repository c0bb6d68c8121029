"""What the README shows, and what pages show of loops, is run as it stands there."""

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
from matchdistill.runs.recipe import Recipe, plain_config, recipe_parser, resolve_recipe

ROOT = Path(__file__).parent.parent


def blocks(path):
    """The kind and the text of every block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


BLOCKS = blocks("README.md")
SHELL = [line for language, text in BLOCKS if language in ("", "bash") for line in text.splitlines()]
COMMANDS = [found[0] for line in SHELL if (found := re.search(r"\bmatchdistill .*", line))]


def python(word, path="README.md"):
    """The one block of Python of a page that has a word."""
    (text,) = [text for language, text in blocks(path) if language == "python" and word in text]
    return text


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
    names = {"torch": torch, "F": F, "teacher": teacher, "student": student, "loader": loader, "epochs": 2}
    exec(python("epochs"), names)
    saved = torch.load("student.pt", weights_only=True)
    assert saved.keys() == before.keys()
    assert not saved["fc.weight"].equal(before["fc.weight"])


@pytest.mark.filterwarnings("ignore:.*gather along dimension 0")
def test_the_loop_with_data_parallel():
    from matchdistill import MatchingDistiller

    torch.manual_seed(0)
    teacher, student = small_resnet(width=4), small_resnet(width=2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    loader = [(torch.randn(8, 3, 16, 16), torch.randint(10, (8,))) for _ in range(2)]
    names = {"torch": torch, "F": F, "MatchingDistiller": MatchingDistiller, "loader": loader}
    names |= {"teacher": teacher, "student": student}
    exec(python(" = torch.nn.DataParallel(", "docs/howto/processes.md"), names)
    assert torch.isfinite(names["losses"]).all()
    assert not student.state_dict()["fc.weight"].cpu().equal(before["fc.weight"])
    if not torch.cuda.is_available():
        assert names["losses"].shape == ()
        assert not names["parallel"].device_ids


def test_taps_of_ones_own():
    from matchdistill import MatchingDistiller

    names = {"MatchingDistiller": MatchingDistiller}
    names |= {"teacher": torchvision.models.resnet50(), "student": torchvision.models.mobilenet_v2()}
    exec(python("taps=[", "docs/howto/models.md"), names)
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
    exec(python("detector.backbone", "docs/howto/models.md"), names)
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
