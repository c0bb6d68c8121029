"""A run that was made in another folder: its data and its code are found again, or their absence is explained."""

import sys

import pytest
import torch
import yaml
from torchvision.utils import save_image

from matchdistill.cli import main
from records import TINY

NETWORKS = """
from matchdistill.models import small_resnet

def small(num_classes):
    return small_resnet(num_classes, width=2)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run whose recipe names a folder of images and a module by relative names, and another folder to be in."""
    made_in, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    made_in.mkdir()
    elsewhere.mkdir()
    (made_in / "nets22.py").write_text(NETWORKS)
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = made_in / "pets" / split / label
            folder.mkdir(parents=True)
            for number in range(8):
                save_image(torch.rand(3, 16, 16, generator=generator), folder / f"{number}.png")
    recipe = {
        **TINY,
        "data": {"name": "folder", "root": "pets", "image_size": 16, "batch_size": 4},
        "student": {"name": "nets22:small"},
        "training": {"epochs": 1},
        "distillation": {"method": "none"},
    }
    (made_in / "mine.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(made_in)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["fit", "mine.yaml", "--out", "run"]) == 0
    _forget(made_in)
    monkeypatch.chdir(elsewhere)
    yield made_in / "run"
    _forget(made_in)


def _forget(folder):
    sys.modules.pop("nets22", None)
    sys.path[:] = [path for path in sys.path if path != str(folder)]


def test_a_run_is_measured_and_exported_from_any_folder(run, capfd):
    assert main(["validate", str(run), "--trust"]) == 0
    assert "student" in capfd.readouterr().out
    _forget(run.parent)
    assert main(["export", str(run), "--trust"]) == 0
    assert (run / "export" / "model.safetensors").is_file()


def test_without_trust_no_code_is_looked_for(run, capfd):
    assert main(["validate", str(run)]) == 2
    assert "--trust" in capfd.readouterr().err
    assert str(run.parent) not in sys.path


def test_code_that_is_gone_is_explained(run, capfd):
    (run.parent / "nets22.py").unlink()
    for command in (["validate"], ["export"]):
        assert main([*command, str(run), "--trust"]) == 2
        told = capfd.readouterr().err
        assert "there is no library or module 'nets22'" in told
        assert f"The run was made in {run.parent}, where it is not now" in told


def test_what_is_given_anew_is_meant_as_it_is(run, capfd):
    assert main(["validate", str(run), "--trust", "--data.root", "nowhere"]) == 2
    assert "nowhere" in capfd.readouterr().err
