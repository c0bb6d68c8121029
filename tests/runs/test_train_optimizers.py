"""Optimisers and schedules, held to loops by hand."""

import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_train_options import assert_weights_near, column
from test_train_resume import assert_same_end, killed

from matchdistill.runs import train as training
from matchdistill.runs.build import build_module
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.train import fit

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")

ADAMW = ("--training.optimizer=adamw", "--training.lr=0.01", "--training.weight_decay=0.3")
SMALL_VIT = "{img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}"


def adamw_by_hand(recipe, clip=math.inf, options=(0.9, 0.999, 1e-8), decays=lambda value: value.ndim > 1):
    """The run of a recipe with Adam as Kingma and Ba, and Loshchilov and Hutter, have it; its losses and its student."""
    recipe.data.setup()
    loader = recipe.data.train_dataloader()
    module = build_module(recipe).train()
    chosen = recipe.training
    parameters = [value for value in module.parameters() if value.requires_grad]
    means, squares = (
        [torch.zeros_like(value) for value in parameters],
        [torch.zeros_like(value) for value in parameters],
    )
    first, second, epsilon = options
    losses, done = [], 0
    for epoch in range(chosen.epochs):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        for number, (images, labels) in enumerate(batches):
            lr = (
                chosen.final_lr
                + (chosen.lr - chosen.final_lr)
                * (1 + math.cos(math.pi * (epoch + number / len(batches)) / chosen.epochs))
                / 2
            )
            output, distilled = module.losses(images)
            loss = F.cross_entropy(output, labels) + sum(distilled.values())
            gradients = torch.autograd.grad(loss, parameters)
            norm = math.sqrt(sum(float(value.square().sum()) for value in gradients))
            done += 1
            with torch.no_grad():
                for value, gradient, mean, square in zip(parameters, gradients, means, squares, strict=True):
                    taken = gradient * min(1.0, clip / norm)
                    mean.copy_(first * mean + (1 - first) * taken)
                    square.copy_(second * square + (1 - second) * taken**2)
                    if decays(value):
                        value -= lr * 0.3 * value
                    corrected = (square / (1 - second**done)).sqrt() + epsilon
                    value -= lr * (mean / (1 - first**done)) / corrected
            losses.append(float(loss.detach()))
    return losses, module.network()


@pytest.mark.parametrize(
    ("arguments", "by_hand"),
    [
        ([], {}),
        (["--training.clip_grad_norm=0.5", "--training.final_lr=0.004"], {"clip": 0.5}),
        (["--training.decay_norms=true"], {"decays": lambda value: True}),
        (["--training.optimizer_options={betas: [0.8, 0.9], eps: 0.01}"], {"options": (0.8, 0.9, 0.01)}),
    ],
    ids=["plain", "clipped, final", "all decay", "options"],
)
def test_adamw_is_that_of_a_loop_by_hand(tiny, tmp_path, arguments, by_hand):
    arguments = ["--distillation.method=kd", *ADAMW, *arguments]
    fit(tiny(*arguments), tmp_path / "run", quiet=True)
    losses, student = adamw_by_hand(tiny(*arguments), **by_hand)
    steps = [sum(losses[start : start + 3]) / 3 for start in (0, 3)]
    assert column(tmp_path / "run", "train/loss") == pytest.approx(steps, rel=1e-4)
    assert_weights_near(load_file(tmp_path / "run" / "student.safetensors"), student, 1e-4)


def test_what_is_distilled_besides_the_student_is_trained_too(tiny, tmp_path):
    """The norms of the positions belong to no layer of the network."""
    recipe = tiny("--distillation.method=mgd-amp", *ADAMW, "--training.layer_decay=0.5")
    fit(recipe, tmp_path / "run", quiet=True)
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    groups = saved["optimizer_states"][0]["param_groups"]
    module = build_module(recipe)
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


class Rates(pl.Callback):
    def __init__(self):
        self.groups, self.found = [], []

    def on_train_batch_start(self, trainer, *_):
        self.groups = trainer.optimizers[0].param_groups
        self.found.append(self.groups[0]["lr"])


@pytest.fixture
def rates(monkeypatch):
    """The learning rates of a run by step, and the optimiser's groups."""
    record, trainer = Rates(), training.machine_trainer
    monkeypatch.setattr(
        training,
        "machine_trainer",
        lambda *args, callbacks=(), **options: trainer(*args, callbacks=[*callbacks, record], **options),
    )
    return record


@pytest.mark.parametrize("every", [1, 2])
def test_a_plateau_lowers_the_rate_after_validations_that_are_no_better(tiny, tmp_path, rates, every):
    arguments = ("--training.lr=1e-9", "--training.epochs=9", "--training.patience=1", "--training.gamma=0.5")
    recipe = tiny(
        "--distillation.method=none",
        *arguments,
        "--training.schedule=plateau",
        "--training.warmup_steps=4",
        f"--training.validate_every={every}",
    )
    fit(recipe, tmp_path / "run", quiet=True)
    measured = iter(column(tmp_path / "run", "val/top1"))
    expected, best, bad, rate = [], 0.0, 0, 1e-9
    for epoch in range(9):
        expected += [rate * (0.001 + 0.999 * min(1, (3 * epoch + step) / 4)) for step in range(3)]
        if (epoch + 1) % every == 0 or epoch == 8:
            value = next(measured)
            bad, best = 0 if value > best else bad + 1, max(best, value)
            if bad > 1:
                rate, bad = rate / 2, 0
    assert rates.found == pytest.approx(expected, rel=1e-6)
    assert rates.found[-1] < 0.6e-9


RESUMED = {
    "plateau": ("--training.schedule=plateau", "--training.patience=0", "--training.lr=1e-7"),
    "adamw, plateau": (*ADAMW, "--training.schedule=plateau", "--training.patience=0", "--training.lr=1e-7"),
    "lamb": ("--training.optimizer=lamb", "--training.weight_decay=0.1", "--training.clip_grad_norm=1"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_ends_as_the_uninterrupted_one(tiny, tmp_path, name):
    arguments = ("--distillation.method=kd", "--training.epochs=4", *RESUMED[name])
    fit(tiny(*arguments), tmp_path / "whole", quiet=True)
    killed("step", 8, tiny(*arguments), tmp_path / "run")
    fit(tiny(*arguments), tmp_path / "run", resume=True, quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    saved = [torch.load(tmp_path / each / "last.ckpt", weights_only=True) for each in ("run", "whole")]
    assert saved[0].get("plateau") == saved[1].get("plateau")
    assert ("plateau" in saved[0]) == ("plateau" in name)


@pytest.fixture
def open_file(tmp_path, tiny_file):
    """The tiny recipe of a vision transformer without anything of its optimiser."""
    import yaml

    values = yaml.safe_load(tiny_file.read_text())
    values |= {"training": {"epochs": 2}}
    values["student"] = {"name": "timm:vit_tiny_patch16_224", "options": yaml.safe_load(SMALL_VIT)}
    values["distillation"]["method"] = "kd"
    tiny_file.write_text(yaml.safe_dump(values))
    return tiny_file


def test_a_transformer_gets_adamw_and_a_cosine_unless_a_recipe_says_otherwise(open_file, tmp_path, rates, capsys):
    fit(load_recipe(open_file), tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if "transformer" in line]
    assert said == [
        "timm:vit_tiny_patch16_224 is a transformer: adamw, learning rate 0.0005, weight decay 0.05, cosine (give "
        "training.optimizer, training.lr, training.weight_decay, training.schedule for others)"
    ]
    assert rates.found == pytest.approx([5e-4 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])
    assert [group["weight_decay"] for group in rates.groups] == [0.0, 0.05]
    fit(load_recipe(open_file), tmp_path / "run", resume=True)
    fit(load_recipe(open_file, "--training.lr=0.05"), tmp_path / "given")
    assert "transformer" not in capsys.readouterr().out
    assert (rates.groups[0]["weight_decay"], rates.groups[0]["momentum"], len(rates.groups)) == (1e-4, 0.9, 1)
    assert rates.found[6:] == [0.05] * 6  # the steps of SGD


def test_layers_learn_by_their_depth(open_file, tmp_path, rates):
    recipe = load_recipe(open_file, "--training.optimizer=adamw", "--training.layer_decay=0.5")
    fit(recipe, tmp_path / "run", quiet=True)
    network = build_module(recipe).network()
    by_name = {}
    names = [name for name, _ in network.named_parameters()]
    assert sum(len(group["params"]) for group in rates.groups) == len(names)
    for group in rates.groups:
        shapes = [tuple(value.shape) for value in group["params"]]
        by_name[group["initial_lr"], group["weight_decay"] > 0] = shapes
    assert sorted({rate for rate, _ in by_name}) == pytest.approx([5e-4 / 8, 5e-4 / 4, 5e-4 / 2, 5e-4])
    assert (1, 1, 24) in by_name[5e-4 / 8, False]  # the class token, by the network's own word
    assert by_name[5e-4, True] == [(10, 24)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--training.optimizer=adamv"],
            r"training.optimizer is 'adamv', which is none that timm has; did you mean 'ad",
        ),
        (["--training.optimizer=adahessian"], "training.optimizer is 'adahessian', which is none"),
        (
            ["--training.optimizer=adamw", "--training.optimizer_options={beta: 1}"],
            r"training.optimizer_options do not fit 'adamw' \(TypeError: .*'beta'\)",
        ),
        (["--training.optimizer_options={foreach: word, x: 1}"], "training.optimizer_options do not fit 'sgd'"),
        (["--training.optimizer_options={lr: 1}"], "optimizer_options.lr cannot be given: use training.lr"),
        (["--training.optimizer=lamb"], "training.optimizer is 'lamb': give training.weight_decay, as fits it"),
        (["--teacher.training.clip_grad_norm=0"], "teacher.training.clip_grad_norm is 0"),
        (["--training.layer_decay=1.5"], "training.layer_decay is 1.5"),
        (["--training.patience=-1"], "training.patience is -1"),
        (["--training.final_lr=-1"], "training.final_lr is -1"),
    ],
)
def test_what_is_refused(tiny, arguments, said):
    with pytest.raises(ValueError, match=said) as info:
        tiny(*arguments)
    assert "\n" not in str(info.value)


def test_a_run_of_an_older_version_that_left_all_to_sgd_goes_on(open_file, tmp_path):
    """Its recipe has the values that SGD had by default then."""
    import yaml

    resnet = ("--student.name=matchdistill.models:small_resnet", "--student.options={width: 2}")
    metrics = fit(load_recipe(open_file, *resnet), tmp_path / "run", quiet=True)
    path = tmp_path / "run" / "recipe.yaml"
    config = yaml.safe_load(path.read_text())
    for section in (config["training"], config["teacher"]["training"]):
        for name in ("optimizer", "decay_norms", "layer_decay", "optimizer_options", "clip_grad_norm", "patience"):
            del section[name]
        section |= {"lr": 0.1, "weight_decay": 1e-4, "schedule": "steps"}
    path.write_text(yaml.safe_dump(config))
    assert fit(load_recipe(open_file, *resnet), tmp_path / "run", resume=True) == metrics
