import copy
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import oracles
from matchdistill.distiller import MatchingDistiller
from matchdistill.models import small_resnet
from matchdistill.runs.build import build_module
from matchdistill.runs.machine import machine_trainer
from matchdistill.runs.settings import Machine, Training
from matchdistill.tasks.classification.module import ClassificationModule
from matchdistill.tasks.optimizing import lr_factor
from records import settings

STAGES = ("layer1", "layer2", "layer3")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:You are trying to `self.log",
        "ignore:You defined a `validation_step`",
        "ignore:You have overridden",
        "ignore:.*LeafSpec",
    ),
]


def trainer(precision="32-true", **options):
    machine = Machine("cpu", precision=precision)
    return machine_trainer(machine, logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)


def ready(tiny, method, *arguments):
    """The module of a recipe after its first refresh, and a batch."""
    recipe = tiny(f"--distillation.method={method}", *arguments)
    module = build_module(recipe)
    if isinstance(module.distiller, MatchingDistiller):
        module.distiller.refresh(recipe.data.refresh_dataloader(40, 0))
    module.train()
    images, labels = next(iter(recipe.data.train_dataloader()))
    return module, images, labels


def features(network, images):
    """Logits of a SmallResNet, and what goes into the last activation of its stages."""
    taken = {}
    handles = [
        network.get_submodule(f"{stage}.relu2").register_forward_pre_hook(
            lambda _, args, stage=stage: taken.update({stage: args[0].clone()})
        )
        for stage in STAGES
    ]
    logits = network(images)
    for handle in handles:
        handle.remove()
    return logits, [taken[stage] for stage in STAGES]


def position_loss_by_hand(student, teacher, norm, index, reduction, weight):
    normalised = (student - student.mean((0, 2, 3), keepdim=True)) / torch.sqrt(
        student.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
    )
    target = oracles.reduce_channels(teacher.detach().numpy(), index.numpy(), reduction)
    margin = oracles.batchnorm_margin(norm.weight.detach().numpy(), norm.bias.detach().numpy())
    floor = oracles.reduce_margin(margin, index.numpy(), reduction)[None, :, None, None]
    goal = np.maximum(target, floor)
    values = normalised.detach().double().numpy()
    counts = (values > goal) | (goal > 0)
    return weight * ((values - goal) ** 2 * counts).sum() / values.size


@pytest.mark.parametrize("reduction", ["amp", "sm", "max", "mean"])
@pytest.mark.parametrize("kd", ["", "+kd"])
def test_losses_are_what_the_paper_says(tiny, reduction, kd):
    weights = [5.0, 2.0, 0.5]
    module, images, labels = ready(
        tiny,
        f"mgd-{reduction}{kd}",
        f"--distillation.weights.mgd={weights}",
        "--distillation.weights.kd=0.7",
        "--distillation.kd_temperature=3",
    )
    student, teacher = copy.deepcopy(module.network()), copy.deepcopy(module.teacher)
    indices = [position.index for position in module.distiller.positions]
    total = module.training_step((images, labels), 0)
    logits, maps = features(student, images)
    with torch.no_grad():
        teacher_logits, teacher_maps = features(teacher, images)
    expected = F.cross_entropy(logits, labels).item()
    for number, stage in enumerate(STAGES):
        norm = teacher.get_submodule(f"{stage}.bn2")
        loss = position_loss_by_hand(
            maps[number], teacher_maps[number], norm, indices[number], reduction, weights[number]
        )
        assert module.distiller.position_losses[number].item() == pytest.approx(loss, rel=1e-4)
        expected += loss
    if kd:
        p, q = (torch.softmax(values.double() / 3, 1) for values in (teacher_logits, logits))
        expected += 0.7 * 9 * (p * (p / q).log()).sum(1).mean().item()
    assert total.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["amp", "sm", "rd", "max", "mean"])
def test_costs_in_half_precision(tiny, reduction, precision):
    module, _, _ = ready(tiny, f"mgd-{reduction}")
    positions = module.distiller.positions
    costs = [position.matching.cost for position in positions]
    with torch.autocast("cpu", precision):
        module.distiller.refresh(tiny().data.refresh_dataloader(40, 0))
    for position, cost in zip(positions, costs, strict=True):
        torch.testing.assert_close(position.matching.cost, cost, rtol=0, atol=0.02)
        assert not torch.equal(position.matching.cost, cost)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.bfloat16, 0.2), (torch.float16, 0.04)])
@pytest.mark.parametrize(
    "method",
    [*(f"mgd-{reduction}+kd" for reduction in ("amp", "sm", "rd", "max", "mean")), "fitnets", "at", "ofd", "kd"],
)
def test_losses_and_gradients_in_half_precision(tiny, method, precision, tolerance):
    module, images, labels = ready(tiny, method)
    optimizer = torch.optim.SGD(module.parameters())
    values, gradients = [], []
    for enabled in (False, True):
        torch.manual_seed(0)  # of the random drop
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled and precision == torch.float16)
        with torch.autocast("cpu", precision, enabled=enabled):
            output, losses = module.losses(images)
            task = F.cross_entropy(output, labels)
        assert output.dtype == (precision if enabled else torch.float32)
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        optimizer.zero_grad()
        scaler.scale(task + sum(losses.values())).backward()
        scaler.unscale_(optimizer)
        positions = [] if module.distiller is None else module.distiller.position_losses.tolist()
        values.append([task.item(), *(loss.item() for loss in losses.values()), *positions])
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    assert values[1] == pytest.approx(values[0], rel=0.03)
    assert values[1] != values[0]
    assert 0 < (gradients[1] - gradients[0]).norm() < tolerance * gradients[0].norm()


def test_the_refresh_has_the_precision_of_the_training(tiny):
    recipe = tiny("--distillation.method=mgd-amp")
    module, seen = build_module(recipe), []
    module.teacher.register_forward_hook(lambda network, args, output: seen.append(output.dtype))
    trainer("bf16-mixed", max_epochs=1).fit(module, recipe.data)
    assert set(seen) == {torch.bfloat16}


def test_kd_alone(tiny):
    module, images, labels = ready(tiny, "kd")
    with torch.no_grad():
        p = torch.softmax(module.teacher(images).double() / 1.5, 1)
        logits = copy.deepcopy(module.network())(images).double()
        q = torch.softmax(logits / 1.5, 1)
    expected = F.cross_entropy(logits, labels) + 2.25 * (p * (p / q).log()).sum(1).mean()
    assert module.training_step((images, labels), 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_distillation_is_cross_entropy(tiny):
    module, images, labels = ready(tiny, "none")
    expected = F.cross_entropy(copy.deepcopy(module.network())(images), labels)
    assert torch.equal(module.training_step((images, labels), 0), expected)
    assert module.teacher is None


@pytest.mark.parametrize("method", ["kd", "mgd-amp", "mgd-rd+kd"])
def test_gradients_reach_the_student_only(tiny, method):
    module, images, labels = ready(tiny, method)
    teacher = module.teacher
    before = copy.deepcopy(teacher.state_dict())
    module.training_step((images, labels), 0).backward()
    assert all(parameter.grad is not None for parameter in module.network().parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    owned = {id(parameter) for parameter in module.parameters()}
    assert owned.isdisjoint(id(parameter) for parameter in teacher.parameters())
    assert not any(torch.equal(value, before["fc.weight"]) for value in module.state_dict().values())


@pytest.mark.parametrize("method", ["kd", "mgd-amp", "mgd-amp+kd"])
def test_the_teacher_runs_once_per_step_in_evaluation_mode_on_the_students_images(tiny, method):
    module, images, labels = ready(tiny, method)
    seen = []
    module.teacher.register_forward_pre_hook(lambda network, args: seen.append((network.training, args[0].clone())))
    module.teacher.train()
    for _ in range(2):
        module.training_step((images, labels), 0)
    assert [training for training, _ in seen] == [False, False]
    assert all(torch.equal(given, images) for _, given in seen)


class Auxiliary(nn.Module):
    """Returns further logits in training, as GoogLeNet does."""

    def __init__(self):
        super().__init__()
        self.network = small_resnet(width=2)

    def forward(self, images):
        logits = self.network(images)
        return (logits, logits + 100) if self.training else logits


@pytest.mark.parametrize("method", ["none", "kd"])
def test_auxiliary_logits_are_left_out(method):
    torch.manual_seed(0)
    student, teacher = Auxiliary(), None if method == "none" else small_resnet(width=4)
    module = ClassificationModule(student, 10, settings(method=method), teacher).train()
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    plain = ClassificationModule(copy.deepcopy(student.network), 10, settings(method=method), teacher).train()
    assert torch.equal(module.training_step((images, labels), 0), plain.training_step((images, labels), 0))


def test_a_loss_that_is_not_finite_names_the_position(tiny):
    module, images, labels = ready(tiny, "mgd-amp")
    position = module.distiller.positions[1]
    with torch.no_grad():
        position.norm.weight[0] = math.inf
    message = r"the distillation loss of position 1 \(layer2.relu2:input -> layer2.relu2:input\) is (inf|nan) at step 0"
    with pytest.raises(FloatingPointError, match=message):
        module.training_step((images, labels), 0)


def test_a_task_loss_that_is_not_finite(tiny):
    module, images, labels = ready(tiny, "none")
    with torch.no_grad():
        module.network().fc.bias[3] = math.nan
    with pytest.raises(FloatingPointError, match=r"the loss 'task' is nan at step 0 \(epoch 0\)"):
        module.training_step((images, labels), 0)


def test_losses_are_looked_at_later_where_looking_waits(tiny, monkeypatch):
    """As on a GPU, every 50 steps and at the end of the epoch; the step that is named is the one it happened in."""
    module, images, labels = ready(tiny, "none")
    monkeypatch.setattr(ClassificationModule, "device", torch.device("meta"))
    monkeypatch.setattr(ClassificationModule, "global_step", 7)
    with torch.no_grad():
        module.network().fc.bias[3] = math.nan
    module.training_step((images, labels), 0)
    monkeypatch.setattr(ClassificationModule, "global_step", 8)
    for _ in range(48):
        module.training_step((images, labels), 0)
    with pytest.raises(FloatingPointError, match="at step 7"):
        module.training_step((images, labels), 0)
    del module._unchecked[1:]
    with pytest.raises(FloatingPointError, match="at step 7"):
        module.on_train_epoch_end()


def closed_form(training, epoch):
    if epoch < training.warmup_epochs:
        return training.lr * (0.1 + 0.9 * epoch / training.warmup_epochs)
    epoch -= training.warmup_epochs
    if training.schedule == "constant":
        return training.lr
    if training.schedule == "cosine":
        return training.lr * (1 + math.cos(math.pi * epoch / training.epochs)) / 2
    if training.schedule == "poly":
        return training.lr * (1 - epoch / training.epochs) ** 0.9
    return training.lr * training.gamma ** len([milestone for milestone in training.milestones if milestone <= epoch])


@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize("schedule", ["steps", "cosine", "poly", "constant"])
@pytest.mark.parametrize(("accumulate", "steps"), [(1, [0, 1 / 3, 2 / 3]), (2, [0, 0, 1 / 2]), (3, [0, 0, 0])])
def test_learning_rate_of_every_step(schedule, warmup, accumulate, steps):
    """In parts of an epoch, that the steps of an optimiser divide it into."""
    training = Training(
        epochs=4, lr=0.3, schedule=schedule, milestones=[1, 3], gamma=0.2, warmup_epochs=warmup, weight_decay=0
    )
    training.accumulate = accumulate
    batches = DataLoader([(torch.randn(4, 3, 16, 16), torch.arange(4))] * 3, batch_size=None)
    module = ClassificationModule(small_resnet(width=1), 10, settings(training, method="none"))
    rates = []

    class Record(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    options = {"max_epochs": training.all_epochs, "accumulate_grad_batches": accumulate}
    trainer(**options, callbacks=[Record()]).fit(module, batches)
    assert rates == pytest.approx(
        [closed_form(training, epoch + step) for epoch in range(4 + warmup) for step in steps]
    )
    assert rates[0] == pytest.approx(0.03 if warmup else 0.3)


def test_learning_rate_of_the_paper():
    training = Training(warmup_epochs=10)
    assert [lr_factor(training, epoch) for epoch in (10, 40, 41, 70.99, 71, 91, 129)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.001, 0.001]
    )
    assert lr_factor(Training(epochs=10, schedule="cosine"), 11) == 0


@pytest.mark.parametrize("classes", [10, 6, 5, 2])
def test_accuracy_counts_every_image(classes):
    torch.manual_seed(1)
    student, teacher = small_resnet(classes, width=1), small_resnet(classes, width=2)
    batches = [(torch.randn(count, 3, 16, 16), torch.randint(classes, (count,))) for count in (7, 7, 3)]
    module = ClassificationModule(student, classes, settings(method="kd"), teacher)
    trainer().validate(module, DataLoader(batches, batch_size=None), verbose=False)
    for network, result in ((student, module.result), (teacher, module.teacher_result)):
        with torch.no_grad():
            places = torch.cat(
                [
                    (network.eval()(images) > network(images).gather(1, labels[:, None])).sum(1)
                    for images, labels in batches
                ]
            )
        assert result["top1"] == pytest.approx((places < 1).double().mean().item())
        assert ("top5" in result) == (classes > 5)
        if classes > 5:
            assert result["top5"] == pytest.approx((places < 5).double().mean().item())


def test_the_teacher_is_measured_once(tiny):
    recipe = tiny("--distillation.method=kd")
    module = build_module(recipe)
    calls = []
    module.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer().validate(module, recipe.data, verbose=False)
    first = len(calls)
    trainer().validate(module, recipe.data, verbose=False)
    assert (first, len(calls)) == (3, 3)
