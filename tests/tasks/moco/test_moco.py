"""Runs of MoCo-v2 with MGD: beside a slow loop from the papers, cut and resumed, in two processes, and by every command."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torchvision.utils import save_image

import oracles
from matchdistill import cli
from matchdistill.models import build_body, small_resnet
from matchdistill.runs.build import build_module
from matchdistill.runs.machine import machine_trainer
from matchdistill.runs.metrics import read_metrics
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.train import fit
from matchdistill.runs.validate import validate
from matchdistill.tasks.moco.module import MocoModule

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*no validation images", "ignore:.*estimate"),
]

NETWORK = "matchdistill.models:small_resnet"
VALUES = {
    "task": "moco",
    "data": {"batch_size": 16, "train_limit": 70, "val_limit": 30},
    "teacher": {"name": NETWORK, "options": {"width": 4}},
    "student": {"name": NETWORK, "options": {"width": 2}},
    "training": {"epochs": 2, "lr": 0.05, "schedule": "constant", "nesterov": False},
    "objective": {"queue": 48, "momentum": 0.9, "dimensions": 8},
    "distillation": {"method": "mgd-amp", "refresh_images": 40},
    "trainer": {"accelerator": "cpu", "loggers": ["csv"]},
}


@pytest.fixture
def recipe_of(tmp_path):
    path = tmp_path / "moco.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return lambda *arguments: load_recipe(path, *arguments)


@pytest.fixture
def tree(tmp_path):
    """Images without labels: in folders of no meaning."""
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        folder = tmp_path / "tree" / f"day{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 20, 24, generator=generator), folder / f"{number}.png")
    return tmp_path / "tree"


def unlabelled(tree):
    values = {
        "name": "folder",
        "root": tree,
        "image_size": 16,
        "train_limit": "null",
        "val_limit": "null",
        "batch_size": 8,
    }
    return [f"--data.{key}={value}" for key, value in values.items()]


def watched(module):
    """What a module's training steps are given, and their losses by name."""
    seen = []
    losses = module.batch_losses

    def batch_losses(batch):
        found = losses(batch)
        seen.append((batch[0].clone(), {name: loss.item() for name, loss in found.items()}))
        return found

    module.batch_losses = batch_losses
    return seen


def trained(recipe, module):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    machine_trainer(recipe.trainer, **options, max_epochs=2, limit_val_batches=0).fit(module, recipe.data)


class SlowMoco:
    """Algorithm 1 of He et al., with the head of Chen et al., in one process."""

    def __init__(self, module):
        self.query = nn.Sequential(copy.deepcopy(module.network()), copy.deepcopy(module.head)).train()
        self.key = copy.deepcopy(self.query)
        self.queue = [row.clone() for row in module.queue]  # the oldest first
        self.optimizer = torch.optim.SGD(self.query.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)

    def step(self, queries, keys):
        with torch.no_grad():
            for own, leader in zip(self.key.parameters(), self.query.parameters(), strict=True):
                own.copy_(0.9 * own + 0.1 * leader)
            k = self.key(keys)
            k = k / k.norm(dim=1, keepdim=True)
        q = self.query(queries)
        q = q / q.norm(dim=1, keepdim=True)
        losses = []
        for one, positive in zip(q, k, strict=True):
            alike = torch.stack([one @ other for other in [positive, *self.queue]]) / 0.2
            losses.append(-alike.log_softmax(0)[0])
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.queue = [*self.queue, *k][len(k) :]
        return loss.item()


def test_training_alone_equals_a_slow_loop(recipe_of):
    recipe = recipe_of("--distillation.method=none")
    module = build_module(recipe)
    slow, seen = SlowMoco(module), watched(module)
    trained(recipe, module)
    assert [crops.shape for crops, _ in seen] == 8 * [(16, 2, 3, 16, 16)]  # what is left of 70 is not seen
    expected = [slow.step(*crops.unbind(1)) for crops, _ in seen]
    assert [losses["task"] for _, losses in seen] == pytest.approx(expected, rel=1e-4)
    for own, other in (
        (module.network(), slow.query[0]),
        (module.head, slow.query[1]),
        (module.keys.body, slow.key[0]),
    ):
        for name, value in own.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-3, atol=1e-5)
    assert int(module.place) == 8 * 16 % 48
    torch.testing.assert_close(module.queue.roll(-int(module.place), 0), torch.stack(slow.queue), rtol=1e-3, atol=1e-4)
    first, second = seen[0][0].unbind(1)
    assert not torch.equal(first, second)


def test_teacher_and_student_see_the_same_query_crop(recipe_of):
    recipe = recipe_of()
    module = build_module(recipe)
    module.distiller.refresh(recipe.data.refresh_dataloader(40, 0))
    seen = {}
    for name, network in (("student", module.network()), ("teacher", module.teacher), ("keys", module.keys.body)):
        network.register_forward_pre_hook(lambda own, args, name=name: seen.update({name: (args[0], own.training)}))
    module.train()
    batch = next(iter(recipe.data.train_dataloader()))
    trainer = machine_trainer(recipe.trainer, logger=False, enable_checkpointing=False)
    module.trainer = trainer
    losses = module.batch_losses(batch)
    queries, keys = batch[0].unbind(1)
    assert torch.equal(seen["student"][0], queries)
    assert torch.equal(seen["teacher"][0], queries)
    assert (seen["student"][1], seen["teacher"][1], seen["keys"][1]) == (True, False, True)
    assert sorted(seen["keys"][0].sum((1, 2, 3)).tolist()) == pytest.approx(sorted(keys.sum((1, 2, 3)).tolist()))
    sum(losses.values()).backward()
    for parameter in (*module.teacher.parameters(), *module.keys.parameters()):
        assert parameter.grad is None
    assert all(parameter.grad is not None for parameter in (*module.network().parameters(), *module.head.parameters()))
    names = {name for name, _ in module.named_parameters()}
    assert not any("teacher" in name for name in names)


def test_the_papers_weights_are_those_of_the_images_of_one_process(recipe_of):
    recipe = recipe_of("--distillation.weights.mgd=paper")
    module = build_module(recipe)
    module.distiller.refresh(recipe.data.refresh_dataloader(40, 0))
    images = next(iter(recipe.data.train_dataloader()))[0][:, 0]
    distiller = module.distiller.eval()
    with torch.no_grad():
        _, loss = distiller(images)
        captured, _ = distiller.run(images)
        expected = 0.0
        for number, position in enumerate(distiller.positions):
            arguments = position.loss_arguments(captured.values[number], distiller.teacher_values(captured)[number])
            summed = oracles.partial_loss(*(value.double().numpy() for value in arguments[:3]), "sum")
            expected += summed / 2 ** (len(distiller.positions) - 1 - number) / (len(images) * 1e4)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def save_as_moco(path, width=4):
    """A checkpoint as MoCo publishes it, of a network with its own numbers."""
    torch.manual_seed(1)
    encoders = {}
    for name in ("encoder_q", "encoder_k"):
        network = small_resnet(8, width)
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 1.0)
        network.fc = nn.Sequential(nn.Linear(4 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 8))
        encoders[name] = network
    state = {f"module.{name}.{key}": value for name, own in encoders.items() for key, value in own.state_dict().items()}
    state |= {"module.queue": torch.randn(8, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"param_groups": []}}, path)
    return encoders["encoder_q"].state_dict()


@pytest.mark.filterwarnings("error")
def test_a_published_checkpoint_gives_its_query_encoder(tmp_path):
    expected = save_as_moco(tmp_path / "moco.pth.tar")
    body = build_body(NETWORK, tmp_path / "moco.pth.tar", width=4)
    assert isinstance(body.fc, nn.Identity)
    state = body.state_dict()
    assert state.keys() == {name for name in expected if not name.startswith("fc.")}
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    with pytest.raises(ValueError, match="entries differ"):
        build_body(NETWORK, tmp_path / "moco.pth.tar", width=2)


def test_margins_come_from_the_teachers_weights_as_loaded(recipe_of, tmp_path):
    expected = save_as_moco(tmp_path / "moco.pth.tar")
    recipe = recipe_of(f"--teacher.weights={tmp_path / 'moco.pth.tar'}")
    module = build_module(recipe)
    module.distiller.refresh(recipe.data.refresh_dataloader(40, 0))
    for number, position in enumerate(module.distiller.positions):
        name = f"layer{number + 1}.bn2"
        assert position.margin_norm == name
        margin = oracles.batchnorm_margin(expected[f"{name}.weight"].numpy(), expected[f"{name}.bias"].numpy())
        reduced = oracles.reduce_margin(margin, position.index.numpy(), "amp")
        np.testing.assert_allclose(position.margin.numpy(), reduced, rtol=1e-4)
        assert len(position.margin.unique()) > 1


def test_the_student_is_the_body_and_the_embedding_is_not_distilled(recipe_of):
    module = build_module(recipe_of())
    assert [str(position.student) for position in module.distiller.positions] == [
        f"layer{number}.relu2:input" for number in (1, 2, 3)
    ]
    assert [type(layer) for layer in module.head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(module.head[place].weight.shape) for place in (0, 2)] == [(8, 8), (8, 8)]
    assert module.network()(torch.zeros(2, 3, 16, 16)).shape == (2, 8)
    torch.testing.assert_close(module.keys.head.state_dict(), module.head.state_dict())


class Cut(Exception):  # noqa: N818
    """A run ends here."""


@pytest.mark.parametrize("given", [["--distillation.method=none"], ["--training.ema=0.6"]])
def test_a_cut_run_ends_as_an_uncut_one(recipe_of, tmp_path, monkeypatch, given):
    given = [*given, "--training.epochs=3"]
    fit(recipe_of(*given), tmp_path / "whole", quiet=True)
    step, count = MocoModule.training_step, []

    def cut(self, batch, batch_idx):
        count.append(batch_idx)
        if len(count) == 7:  # in the second epoch
            raise Cut
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MocoModule, "training_step", cut)
    with pytest.raises(Cut):
        fit(recipe_of(*given), tmp_path / "cut", quiet=True)
    monkeypatch.undo()
    fit(recipe_of(*given), tmp_path / "cut", resume=True, quiet=True)
    states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "cut")]
    assert {"queue", "place", "head.0.weight", "keys.head.0.weight"} <= states[0].keys()
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    metrics = [read_metrics(tmp_path / name) for name in ("whole", "cut")]
    assert metrics[0].student == metrics[1].student


def test_the_average_is_of_the_head_too(recipe_of, tree, tmp_path, monkeypatch):
    """Held-out images are told apart by a body and a head of the same steps, while training and by `validate`."""
    given = ("--distillation.method=none", *unlabelled(tree), "--objective.queue=16")
    states = []

    def record(self, *_):
        whole = nn.ModuleDict({"body": self.network(), "head": self.head})
        states.append({name: value.double().clone() for name, value in whole.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(MocoModule, "on_train_batch_end", record)
        fit(recipe_of(*given), tmp_path / "plain", quiet=True)
    averaged = recipe_of(*given, "--training.ema=0.7")
    metrics = fit(averaged, tmp_path / "run", quiet=True)
    assert len(states) > 2
    expected = states[0]
    for state in states[1:]:
        expected = {name: 0.7 * value + 0.3 * state[name] for name, value in expected.items()}
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        found = saved["state_dict"][f"head.{name}"].double()
        torch.testing.assert_close(found, expected[f"head.{name}"], rtol=1e-5, atol=1e-6)
        trained = saved["trained_head"][name].double()
        torch.testing.assert_close(trained, states[-1][f"head.{name}"], rtol=1e-5, atol=1e-6)
    found = load_file(tmp_path / "run" / "student.safetensors")["stem.0.weight"].double()
    torch.testing.assert_close(found, expected["body.stem.0.weight"], rtol=1e-5, atol=1e-6)
    assert validate(averaged, tmp_path / "run")["student"] == pytest.approx(metrics.student)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, recipe_of):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert cli.main(list(map(str, arguments))) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.mark.pages
def test_every_command_without_labels(run, tree):
    shown = run(
        "fit", "moco.yaml", *unlabelled(tree), "--out=one", "--trainer.precision=bf16-mixed", "--objective.queue=16"
    )
    assert "InfoNCE" in shown
    metrics = read_metrics(Path("one"))
    assert (set(metrics.student), metrics.teacher) == ({"info_nce"}, {})
    assert f"{metrics.student['info_nce']:.4g}" in run("validate", "one")
    for kind in ("safetensors", "onnx", "pt2"):
        run("export", "one", f"--format={kind}")
    card = Path("one/export/model_card.md").read_text()
    assert "from what two crops of an image have in common, and of the teacher" in card
    assert "build_body('matchdistill.models:small_resnet', **{'width': 2})" in card
    program = torch.export.load("one/export/model.pt2").module()
    body = build_body(NETWORK, "one/export/model.safetensors", width=2).eval()
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(program(images), body(images))
    run("predict", "one", tree, "--out=found.json")
    found = json.loads(Path("found.json").read_text())
    assert [len(each["features"]) for each in found] == 24 * [8]
    run("report", "one")
    page = Path("one/report.html").read_text()
    assert "InfoNCE" in page
    assert "teacher: nearest training image, cosine " in page
    assert '<th scope="col">image</th>' in page  # beside the maps of matched channels
    Path("one/last.ckpt").unlink()
    assert cli.main(["validate", "one"]) == 2  # the head and the keys are there alone


@pytest.mark.pages
def test_a_comparison_with_labels_is_by_neighbours(run):
    shown = run("compare", "moco.yaml", "--seeds=1", "--training.epochs=1", "--out=all")
    assert "20-NN" in shown
    summary = json.loads(Path("all/metrics.json").read_text())["summary"]
    assert [entry["method"] for entry in summary] == ["none", "mgd-amp"]
    cell = Path("all/cells/mgd-amp/seed0")
    metrics = read_metrics(cell)
    assert set(metrics.student) == set(metrics.teacher) == {"knn", "probe"}
    assert f"{metrics.student['knn']:.2%}" in run("validate", cell)
    assert "of 20)" in (cell / "report.html").read_text() or "of 20)" in Path("all/report.html").read_text()


def test_neighbours_are_those_of_scikit_learn(recipe_of, tmp_path):
    from sklearn.neighbors import KNeighborsClassifier

    recipe = recipe_of("--distillation.method=none", "--training.epochs=1")
    metrics = fit(recipe, tmp_path / "one", quiet=True)
    body = build_body(NETWORK, tmp_path / "one" / "student.safetensors", width=2).eval()

    def features(loader):
        batches = [(body(images), labels) for images, labels in loader]
        return [torch.cat(each).detach().numpy() for each in zip(*batches, strict=True)]

    neighbours = KNeighborsClassifier(20, metric="cosine").fit(*features(recipe.data.bank_dataloader()))
    assert metrics.student["knn"] == pytest.approx(neighbours.score(*features(recipe.data.val_dataloader())))


def test_a_linear_probe_takes_the_student_of_a_run(recipe_of, tmp_path):
    fit(recipe_of("--distillation.method=none", "--training.epochs=1"), tmp_path / "moco", quiet=True)
    data = [f"--data.{key}={value}" for key, value in {**VALUES["data"], "name": "digits", "workers": 0}.items()]
    network = [f"--student.name={NETWORK}", "--student.options={width: 2}", f"--student.weights={tmp_path / 'moco'}"]
    probe = load_recipe("moco_linear", *data, *network, "--training.epochs=2", "--trainer.accelerator=cpu")
    fit(probe, tmp_path / "probe", quiet=True)
    body, whole = (load_file(tmp_path / name / "student.safetensors") for name in ("moco", "probe"))
    assert whole.keys() - body.keys() == {"fc.weight", "fc.bias"}
    assert [name for name, value in body.items() if not torch.equal(value, whole[name])] == []  # statistics among them


FROZEN_NORMS = """
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from matchdistill.models import small_resnet

def frozen(num_classes=10, width=2):
    network = small_resnet(num_classes, width)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, FrozenBatchNorm2d(child.num_features))
    return network
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "mgd-amp"])
def test_two_processes_train_as_one_where_batch_norm_is_frozen(recipe_of, tmp_path, method):
    (tmp_path / "frozen_norms.py").write_text(FROZEN_NORMS)

    def run(out, processes):
        arguments = {
            "student.name": "frozen_norms:frozen",
            "data.train_limit": 64,
            "data.augment": "false",
            "data.batch_size": 16 // processes,
            "distillation.method": method,
            "distillation.norm": "group",  # of each image alone
            "trainer.devices": processes,
            "trainer.strategy": "ddp" if processes > 1 else "auto",
            "training.epochs": 1,
            "objective.queue": 64,
            "out": out,
        }
        command = [sys.executable, "-m", "matchdistill", "fit", "moco.yaml"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command += [f"--{key}={value}" for key, value in arguments.items()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / out / "last.ckpt", weights_only=True)["state_dict"], read_metrics(tmp_path / out)

    (one, measured), (two, measured_by_two) = run("one", 1), run("two", 2)
    start = build_module(recipe_of()).head.state_dict()
    assert not torch.allclose(one["head.0.weight"], start["0.weight"], atol=1e-4)  # something was learned
    keys = [torch.cat([step[0::2], step[1::2]]) for step in one.pop("queue").split(16)]  # rank by rank
    torch.testing.assert_close(two.pop("queue"), torch.cat(keys), rtol=1e-3, atol=1e-4)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert measured.student["knn"] == pytest.approx(measured_by_two.student["knn"], abs=0.04)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--objective.queue=50"],
            "objective.queue is 50: expected a multiple of the 16 keys of a step (data.batch_size 16)",
        ),
        (
            ["--data.batch_size=128", "--objective.queue=128"],
            "a batch of 128 images is more than the 70 training images",
        ),
        (["--distillation.method=kd"], "method 'kd' distils the output of classifiers: choose one without kd for moco"),
        (["--data.augmentation=randaugment"], "data.augmentation does not apply to contrasted crops"),
        (["--objective.temperature=0"], "objective.temperature is 0.0"),
        (
            ["--training.label_smoothing=0.1"],
            "training.label_smoothing is for images with one label each, not for moco",
        ),
        (["--training.frozen=true"], "training.frozen is for images with one label each, not for moco"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_starts(recipe_of, tmp_path, capsys, arguments, message):
    assert cli.main(["fit", str(tmp_path / "moco.yaml"), *arguments, f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
