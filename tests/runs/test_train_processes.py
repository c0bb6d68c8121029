import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train_options import assert_weights_near, by_hand

from matchdistill.data import ImageData
from matchdistill.data import module as data_module
from matchdistill.models import small_resnet
from matchdistill.runs.averaging import TRAINED
from matchdistill.runs.build import build_module
from matchdistill.runs.metrics import METRICS
from matchdistill.runs.store import load_student

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*LeafSpec")]

# The command, and what each of its processes saw. Lightning starts the second process by this script too.
RUNNER = """
import os, signal, sys, torch
from matchdistill.distiller import MatchingDistiller
from matchdistill.tasks.classification.module import ClassificationModule
from matchdistill import cli

rank, seen = int(os.environ.get("LOCAL_RANK", 0)), {}
seen.update({name: [] for name in ("validation", "training", "losses", "seeds", "matchings")})
validate, step, refresh = ClassificationModule.validation_step, ClassificationModule.training_step, MatchingDistiller.refresh
kill_at = int(os.environ.get("KILL_AT", 0))

def validation_step(self, batch, number):
    seen["validation"].append(batch[0])
    return validate(self, batch, number)

def training_step(self, batch, number):
    seen["training"].append(batch[0])
    if len(seen["training"]) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    seen["seeds"].append(torch.initial_seed())
    loss = step(self, batch, number)
    seen["losses"].append(loss.item())
    return loss

def recorded_refresh(self, loader, max_images, **options):
    batches = list(loader)
    loader = type("Loader", (), {"sampler": loader.sampler, "__iter__": lambda _: iter(batches)})()
    matchings = refresh(self, loader, max_images, **options)
    seen["matchings"].append([
        (matching.index, matching.cost, matching.images, sum(len(images) for images, _ in batches),
         position.margin.clone()) for matching, position in zip(matchings, self.positions)
    ])
    return matchings

ClassificationModule.validation_step, ClassificationModule.training_step = validation_step, training_step
MatchingDistiller.refresh = recorded_refresh
torch.set_num_threads(1)
code = cli.main(sys.argv[1:])
torch.save(seen, f"rank{int(os.environ.get('LOCAL_RANK', 0))}.pt")
sys.exit(code)
"""


# A student with a head that only trains along where its logits have a loss of their own, as GoogLeNet's.
AUXILIARY = """
from torch import nn
from matchdistill.models import small_resnet

class Auxiliary(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.network, self.head = small_resnet(num_classes, width=2), nn.Linear(3 * 16 * 16, num_classes)

    def forward(self, images):
        logits = self.network(images)
        return (logits, self.head(images.flatten(1))) if self.training else logits
"""


@pytest.fixture
def launch(tmp_path, tiny_file):
    (tmp_path / "runner.py").write_text(RUNNER)

    def run(*arguments, kill_at=0, program=("runner.py",)):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL_AT": str(kill_at), "COLUMNS": "200"}
        command = [sys.executable, *program, "fit", str(tiny_file), "--trainer.devices=2"]
        if not any("strategy" in argument for argument in arguments):
            command.append("--trainer.strategy=ddp")
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


def share(recipe, rank, monkeypatch):
    """The images that one of two processes refreshes the matching with."""
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "rank_and_world", lambda: (rank, 2))
        return recipe.data.refresh_dataloader(41, 0)


def test_two_processes(tmp_path, launch, tiny, monkeypatch):
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
    shares = [list(loader) for loader in (share(recipe, rank, monkeypatch) for rank in (0, 1))]
    images = torch.cat([images for images, _ in recipe.data.refresh_dataloader(41, 0)])
    for rank, batches in enumerate(shares):
        assert torch.equal(torch.cat([images for images, _ in batches]), images[rank::2])
    # In the batches of the processes: features of single precision depend a little on what else is in a batch.
    alone = module.distiller.refresh([batch for batches in shares for batch in batches])
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


AVERAGED = ("--training.ema=0.8", "--training.validate_every=4", "--distillation.refresh_every=1")


@pytest.mark.parametrize("options", [(), AVERAGED], ids=["", "averaged"])
def test_a_killed_run_of_two_processes(tmp_path, launch, options):
    arguments = ("--distillation.method=mgd-rd+kd", "--training.epochs=4", "--data.batch_size=10", *options)
    assert launch(*arguments, "--out=whole").returncode == 0
    expected = torch.load(tmp_path / "rank0.pt", weights_only=True)["matchings"]
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
    if options:
        assert_equal(run[TRAINED], whole[TRAINED])
    # The costs too, which depend on the running statistics that each process has.
    found = torch.load(tmp_path / "rank0.pt", weights_only=True)["matchings"]
    assert 0 < len(found) < len(expected)
    for ours, theirs in zip(found, expected[-len(found) :], strict=True):
        assert all(torch.equal(one[1], other[1]) for one, other in zip(ours, theirs, strict=True))


def losses_of(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True)["losses"] for rank in (0, 1)]


@pytest.mark.parametrize("method", ["mgd-amp", "none"])
def test_losses_of_two_processes_are_those_of_a_plain_loop(tmp_path, launch, tiny, monkeypatch, method):
    arguments = (f"--distillation.method={method}", "--distillation.refresh_every=0", "--data.batch_size=10")
    done = launch(*arguments, "--training.ema=0", "--out=run")
    assert (done.returncode, done.stderr) == (0, "")
    losses, student = by_hand(tiny(*arguments), monkeypatch, processes=2)
    for rank, found in enumerate(losses_of(tmp_path)):
        assert found == pytest.approx([loss for epoch in losses for loss in epoch[rank::2]], rel=1e-5)
    assert_weights_near(load_file(tmp_path / "run" / "student.safetensors"), student, 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", ["mgd-amp", "none"])
def test_synchronised_batch_norms_make_one_batch_of_two(tmp_path, launch, tiny, monkeypatch, method):
    arguments = (f"--distillation.method={method}", "--distillation.refresh_every=0", "--data.augment=false")
    done = launch(
        *arguments, "--data.batch_size=10", "--trainer.accelerator=gpu", "--trainer.sync_batchnorm=true", "--out=run"
    )
    assert done.returncode == 0, done.stderr
    losses, student = by_hand(tiny(*arguments, "--data.batch_size=20"), monkeypatch)
    found = [(first + second) / 2 for first, second in zip(*losses_of(tmp_path), strict=True)]
    assert found == pytest.approx([loss for epoch in losses for loss in epoch], rel=1e-2)
    assert_weights_near(load_file(tmp_path / "run" / "student.safetensors"), student, 1e-2)


def test_started_by_torchrun(tmp_path, launch):
    arguments = ("--teacher.weights=null", "--teacher.training.epochs=1", "--distillation.method=mgd-amp+kd")
    program = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "matchdistill")
    done = launch(*arguments, "--out=torchrun", program=program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert done.stdout.count("2 epochs: torchrun") == 1
    assert launch(*arguments, "--out=run").returncode == 0
    first, second = (checkpoint(tmp_path / name) for name in ("torchrun", "run"))
    assert_equal(first["state_dict"], second["state_dict"])
    assert first["results"] == second["results"]
    assert_equal(*(load_file(tmp_path / name / "student.safetensors") for name in ("torchrun", "run")))
    again = launch(*arguments, "--out=torchrun", "--resume", program=program)
    assert again.stdout.count("2 epochs: torchrun") == 1


def test_the_processes_vary_their_images_differently(tmp_path, launch):
    """All images are the same one, so that batches differ by nothing else."""
    from PIL import Image

    noise = torch.randint(256, (40, 40, 3), generator=torch.Generator().manual_seed(0))
    for split in ("train", "val"):
        for label in ("bee", "wasp"):
            folder = tmp_path / "insects" / split / label
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(noise.byte().numpy()).save(folder / f"{number}.png")
    values = {"name": "folder", "root": str(tmp_path / "insects"), "image_size": 16, "batch_size": 4}
    arguments = [f"--data.{key}={value}" for key, value in values.items()]
    arguments += ["--data.train_limit=null", "--data.val_limit=null", "--distillation.method=none", "--out=run"]
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    trained = torch.cat([*first["training"], *second["training"]]).flatten(1)
    assert len(trained) == 2 * 2 * 4
    assert len(trained.unique(dim=0)) == len(trained)
    # What is drawn within a step (dropout, random reductions) differs too, and from epoch to epoch.
    assert len({*first["seeds"], *second["seeds"]}) == 2 * 2


def test_parameters_that_no_loss_needs(tmp_path, launch):
    (tmp_path / "auxiliary.py").write_text(AUXILIARY)
    arguments = ("--student.name=auxiliary:Auxiliary", "--student.options={}", "--distillation.method=kd")
    done = launch(*arguments, "--out=run")
    assert done.returncode == 2
    assert "strategy='ddp_find_unused_parameters_true'" in done.stderr
    done = launch(*arguments, "--trainer.strategy=ddp_find_unused_parameters_true", "--out=found")
    assert done.returncode == 0, done.stderr


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


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "teacher", [(), ("--teacher.weights=null", "--teacher.training.epochs=1")], ids=["", "teacher"]
)
def test_one_of_two_processes_is_told_to_end(tmp_path, tiny_file, rank, teacher):
    """Neither waits for the other for ever."""
    command = [sys.executable, "-m", "matchdistill", "fit", str(tiny_file), "--out=run", *teacher]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--training.epochs=300", "--data.batch_size=10"]
    command += ["--teacher.train_limit=60"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 3/300"):
            break
    started = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (child,) = [each for each in map(int, started) if b"matchdistill" in Path(f"/proc/{each}/cmdline").read_bytes()]
    os.kill(child if rank else process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error.count("matchdistill: terminated by SIGTERM") == 1
    assert "Traceback" not in error
    assert not Path(f"/proc/{child}").exists()
    assert not list((tmp_path / "run").rglob(".*"))
    assert checkpoint(tmp_path / "run")["epoch"] >= 1
