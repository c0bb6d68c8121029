import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from matchdistill.data import ImageData
from matchdistill.folder import METRICS, load_student
from matchdistill.models import small_resnet
from matchdistill.training import build_module

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*LeafSpec")]

# The command, and what each of its processes saw. Lightning starts the second process by this script too.
RUNNER = """
import os, signal, sys, torch
from matchdistill.distiller import MatchingDistiller
from matchdistill.tasks.classification import Classification
from matchdistill import cli

rank, seen = int(os.environ.get("LOCAL_RANK", 0)), {"validation": [], "training": [], "matchings": []}
validate, step, refresh = Classification.validation_step, Classification.training_step, MatchingDistiller.refresh
kill_at = int(os.environ.get("KILL_AT", 0))

def validation_step(self, batch, number):
    seen["validation"].append(batch[0])
    return validate(self, batch, number)

def training_step(self, batch, number):
    seen["training"].append(batch[0])
    if len(seen["training"]) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, number)

def recorded_refresh(self, loader, max_images):
    batches = list(loader)
    loader = type("Loader", (), {"sampler": loader.sampler, "__iter__": lambda _: iter(batches)})()
    matchings = refresh(self, loader, max_images)
    seen["matchings"].append([
        (matching.index, matching.cost, matching.images, sum(len(images) for images, _ in batches),
         position.margin.clone()) for matching, position in zip(matchings, self.positions)
    ])
    return matchings

Classification.validation_step, Classification.training_step = validation_step, training_step
MatchingDistiller.refresh = recorded_refresh
torch.set_num_threads(1)
code = cli.main(sys.argv[1:])
torch.save(seen, f"rank{int(os.environ.get('LOCAL_RANK', 0))}.pt")
sys.exit(code)
"""


@pytest.fixture
def launch(tmp_path, tiny_file):
    (tmp_path / "runner.py").write_text(RUNNER)

    def run(*arguments, kill_at=0):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL_AT": str(kill_at), "COLUMNS": "200"}
        command = [sys.executable, "runner.py", "fit", str(tiny_file), "--trainer.devices=2", "--trainer.strategy=ddp"]
        return subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def checkpoint(out):
    return torch.load(out / "last.ckpt", weights_only=True)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_two_processes(tmp_path, launch, tiny):
    arguments = (
        "--teacher.weights=null",
        "--teacher.training.epochs=2",
        "--distillation.method=mgd-amp+kd",
        "--distillation.refresh_images=41",
        "--data.augment=false",
        "--data.val_limit=51",
        "--training.epochs=4",
    )
    done = launch(*arguments, "--out=run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("epoch 4/4") == 1
    assert done.stdout.count("4 epochs: run") == 1
    out = tmp_path / "run"
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob(METRICS)) == [METRICS, f"teacher/{METRICS}"]
    metrics = json.loads((out / METRICS).read_text())
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))

    assert len(first["matchings"]) == 2
    for ours, theirs in zip(first["matchings"], second["matchings"], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
            assert torch.equal(one[4], other[4])
            assert (one[2], one[3] + other[3]) == (41, 41)
            assert (one[3], other[3]) == (21, 20)
    # One process over the same images gets the same matching.
    recipe = tiny(*arguments[2:], "--teacher.weights=" + str(out / "teacher" / "student.safetensors"))
    module = build_module(recipe)
    alone = module.distiller.refresh(recipe.data.refresh_dataloader(41, 0))
    for matching, position, (index, cost, _, _, margin) in zip(
        alone, module.distiller.positions, first["matchings"][0], strict=True
    ):
        assert torch.equal(matching.index, index)
        torch.testing.assert_close(matching.cost, cost, rtol=1e-6, atol=0)
        assert torch.equal(position.margin, margin)

    data = ImageData(val_limit=51, train_limit=60, augment=False, batch_size=51)
    images, labels = next(iter(data.val_dataloader()))
    validations = len(first["validation"]) // 6
    seen = torch.cat([*first["validation"][:validations], *second["validation"][:validations]])
    assert len(seen) == 51
    assert sorted(seen.flatten(1).tolist()) == sorted(images.flatten(1).tolist())
    trained = torch.cat([first["training"][-1], second["training"][-1]])
    assert len(trained.flatten(1).unique(dim=0)) == len(trained) == 2 * 20
    teacher = small_resnet(width=4).eval()
    teacher.load_state_dict(load_file(out / "teacher" / "student.safetensors"))
    for role, network in (("student", load_student(out)[0]), ("teacher", teacher)):
        with torch.no_grad():
            expected = (network(images).argmax(1) == labels).double().mean().item()
        assert metrics[role]["top1"] == pytest.approx(expected)


def test_a_killed_run_of_two_processes(tmp_path, launch):
    arguments = ("--distillation.method=mgd-rd+kd", "--training.epochs=4", "--data.batch_size=10")
    assert launch(*arguments, "--out=whole").returncode == 0
    assert launch(*arguments, "--out=run", kill_at=8).returncode != 0
    assert checkpoint(tmp_path / "run")["epoch"] == 1
    done = launch(*arguments, "--out=run", "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    run, whole = checkpoint(tmp_path / "run"), checkpoint(tmp_path / "whole")
    assert_equal(run["state_dict"], whole["state_dict"])
    states = [content["optimizer_states"][0]["state"] for content in (run, whole)]
    for number, state in states[0].items():
        assert torch.equal(state["momentum_buffer"], states[1][number]["momentum_buffer"])
    assert run["results"] == whole["results"]
    assert run["global_step"] == 4 * 3


def test_a_mistake_is_said_once_before_the_second_process_starts(tmp_path, launch):
    done = launch("--distillation.taps=[[layer9:input, layer1:input]]", "--out=run")
    assert done.returncode == 2
    assert done.stderr.startswith("matchdistill: error: SmallResNet has no module 'layer9'")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_corrupt_images_of_all_processes_are_counted(tmp_path, launch):
    from PIL import Image

    damaged = []
    for split, count in (("train", 8), ("val", 6)):
        for label, name in enumerate(("bee", "wasp")):
            folder = tmp_path / "insects" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 20), (100 * label, 30 * number, 0)).save(folder / f"{number}.png")
        for path in sorted(folder.iterdir())[:2]:
            path.write_bytes(b"")
            damaged.append(str(path))
    values = {"name": "folder", "root": str(tmp_path / "insects"), "image_size": 16, "batch_size": 4}
    arguments = [f"--data.{key}={value}" for key, value in values.items()]
    arguments += ["--data.train_limit=null", "--data.val_limit=null", "--distillation.method=none", "--out=run"]
    done = launch(*arguments, "--data.skip_corrupt=true")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / METRICS).read_text())
    assert metrics["corrupt_images"] == sorted(damaged)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"]["skip_corrupt"] is True
    assert load_student(tmp_path / "run")[1]["class_names"] == ["bee", "wasp"]
