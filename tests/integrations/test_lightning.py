"""The callback for LightningModules, held to the same training written as a plain loop.

Axes: N images.
"""

import contextlib
import copy
import itertools
import pickle
import threading

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import BackboneFinetuning, ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from matchdistill import MatchingDistiller
from matchdistill.distributed import leave_at_exit
from matchdistill.integrations.lightning import MatchingDistillation
from matchdistill.refresh import due
from networks import Plain, as_if_trained

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*LightningModule.log"
    ),
]

BATCH, BATCHES = 6, 4
EXAMPLE = torch.zeros(2, 3, 8, 8)


def networks():
    torch.manual_seed(0)
    return as_if_trained(Plain(8)), Plain(4)


def data():
    chance = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH * BATCHES, 3, 8, 8, generator=chance)
    return TensorDataset(images, torch.randint(5, (len(images),), generator=chance))


def everything(module):
    return module.parameters()


def model_alone(module):
    return module.model.parameters()


def groups(module):
    """Weight decay for all but scales and biases, as in many training scripts."""
    parameters = list(module.model.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "lr": 0.02},
    ]


def optimised(parameters):
    """An optimiser and a scheduler with a factor for each of its groups."""
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    factors = [lambda epoch: 0.7**epoch, lambda epoch: 0.5**epoch][: len(optimizer.param_groups)]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def as_tensor(loss):
    return loss


def as_dictionary(loss):
    return {"loss": loss, "more": 3}


class Classifier(pl.LightningModule):
    """Somebody's module, which knows of no distillation."""

    def __init__(self, model, parameters=everything, returned=as_tensor):
        super().__init__()
        self.model, self._of, self._returned = model, parameters, returned

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return self._returned(loss)

    def configure_optimizers(self):
        optimizer, scheduler = optimised(self._of(self))
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def trainer(tmp_path, *callbacks, epochs=3, **options):
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1, **options}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **quiet, **options)


def fitted(tmp_path, module, callback, ckpt_path=None, loader=None, more=(), **options):
    made = trainer(tmp_path, callback, *more, **options)
    made.fit(module, loader or DataLoader(data(), BATCH), ckpt_path=ckpt_path, weights_only=True)
    return made


def callback_of(teacher, **options):
    return MatchingDistillation(teacher, **{"refresh_every": 2, "example": EXAMPLE, **options})


def plain_loop(parameters=everything, epochs=3, accumulate=1, autocast=contextlib.nullcontext, scaled=False, clip=None):
    """The same training by hand: the distiller with the normalisation in the group of the scales."""
    teacher, student = networks()
    distiller = MatchingDistiller(teacher, student, example=EXAMPLE)
    optimizer, scheduler = optimised(parameters(Classifier(student)))
    optimizer.param_groups[-1]["params"] += distiller.positions.parameters()
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    distiller.train()
    for epoch in range(epochs):
        if due(epoch, 2):
            with autocast():
                distiller.refresh(DataLoader(data(), BATCH))
        for number, (images, labels) in enumerate(DataLoader(data(), BATCH)):
            with autocast():
                output, loss = distiller(images)
                scaler.scale((F.cross_entropy(output, labels) + loss).div(accumulate)).backward()
            if (number + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(
                        [each for group in optimizer.param_groups for each in group["params"]], clip
                    )
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        scheduler.step()
    return distiller


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def assert_as_by_hand(module, callback, distiller):
    assert_same(module.model.state_dict(), distiller.student.state_dict())
    assert_same(callback.state_dict(), distiller.positions.state_dict())


@pytest.mark.parametrize("returned", [as_tensor, as_dictionary])
@pytest.mark.parametrize("parameters", [everything, model_alone, groups])
def test_the_weights_are_those_of_a_plain_loop(tmp_path, parameters, returned):
    teacher, student = networks()
    before = copy.deepcopy(teacher.state_dict())
    module, callback = Classifier(student, parameters, returned), callback_of(teacher)
    made = fitted(tmp_path, module, callback)
    distiller = plain_loop(parameters)
    assert_as_by_hand(module, callback, distiller)
    assert not torch.equal(distiller.positions[0].norm.weight, torch.ones(4))
    assert_same(teacher.state_dict(), before)
    assert made.callback_metrics["distillation_loss"] > 0
    assert {"matching/cost_2", "matching/churn_2"} <= made.callback_metrics.keys()


def test_a_step_of_several_batches(tmp_path):
    teacher, student = networks()
    module, callback = Classifier(student), callback_of(teacher)
    fitted(tmp_path, module, callback, accumulate_grad_batches=2)
    assert_as_by_hand(module, callback, plain_loop(accumulate=2))


def test_mixed_precision(tmp_path):
    teacher, student = networks()
    module, callback = Classifier(student), callback_of(teacher)
    fitted(tmp_path, module, callback, precision="bf16-mixed")
    expected = plain_loop(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert_as_by_hand(module, callback, expected)
    assert not torch.equal(expected.student.fc.weight, plain_loop().student.fc.weight)


def test_half_precision_with_scaled_gradients(tmp_path):
    teacher, student = networks()
    module, callback = Classifier(student), callback_of(teacher)
    precision = MixedPrecision(
        "16-mixed", "cpu", torch.amp.GradScaler("cpu")
    )  # which the trainer offers for GPUs alone
    fitted(tmp_path, module, callback, plugins=[precision])
    expected = plain_loop(autocast=lambda: torch.autocast("cpu", torch.float16), scaled=True)
    assert_as_by_hand(module, callback, expected)
    assert torch.isfinite(expected.student.fc.weight).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    teacher, student = networks()
    module, callback = Classifier(student), callback_of(teacher)
    made = fitted(tmp_path, module, callback, accelerator="gpu", precision="16-mixed")
    assert next(teacher.parameters()).is_cuda
    assert torch.isfinite(made.callback_metrics["distillation_loss"])


def test_double_precision(tmp_path):
    teacher, student = networks()
    module, callback = Classifier(student), callback_of(teacher)
    fitted(tmp_path, module, callback, precision="64-true")
    assert module.model.fc.weight.dtype == callback.state_dict()["0.norm.weight"].dtype == torch.float64
    for name, value in plain_loop().student.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[name], value, check_dtype=False, atol=1e-3, rtol=1e-3)


class Counted(MatchingDistillation):
    """Notes the epochs and steps of its refreshes."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.at = []

    def _refresh(self, trainer, pl_module):
        self.at.append((trainer.current_epoch, trainer.global_step))
        super()._refresh(trainer, pl_module)


@pytest.mark.parametrize(("every", "whole", "resumed"), [(2, [0, 2, 4], [4]), ([3], [0, 3], [3]), (0, [0], [])])
def test_a_resumed_run_ends_as_the_whole_one(tmp_path, every, whole, resumed):
    teacher, student = networks()
    module, callback = Classifier(student), Counted(teacher, refresh_every=every, example=EXAMPLE)
    fitted(tmp_path, module, callback, epochs=5)
    assert [epoch for epoch, _ in callback.at] == whole

    teacher, student = networks()
    first = Classifier(student)
    fitted(tmp_path, first, callback_of(teacher, refresh_every=every)).save_checkpoint(tmp_path / "three.ckpt")
    saved = torch.load(tmp_path / "three.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Classifier(networks()[1]).state_dict().keys()
    Classifier(networks()[1]).load_state_dict(saved["state_dict"], strict=True)

    teacher, student = networks()
    second, again = Classifier(student), Counted(teacher, refresh_every=every, example=EXAMPLE)
    # The callback's part of a checkpoint is found by the name of its class.
    saved["callbacks"]["Counted"] = saved["callbacks"].pop("MatchingDistillation")
    torch.save(saved, tmp_path / "three.ckpt")
    fitted(tmp_path, second, again, tmp_path / "three.ckpt", epochs=5)
    assert [epoch for epoch, _ in again.at] == resumed
    assert_same(second.model.state_dict(), module.model.state_dict())
    assert_same(again.state_dict(), callback.state_dict())


def test_a_checkpoint_within_an_epoch(tmp_path):
    teacher, student = networks()
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=BATCHES + 2, save_top_k=-1)
    fitted(
        tmp_path, Classifier(student), Counted(teacher, example=EXAMPLE), more=[checkpoints], enable_checkpointing=True
    )
    teacher, student = networks()
    again = Counted(teacher, example=EXAMPLE)
    fitted(tmp_path, Classifier(student), again, tmp_path / f"step={BATCHES + 2}.ckpt")
    assert again.at == [(2, 2 * BATCHES)]


@pytest.mark.parametrize("cut", [BATCHES, BATCHES + 2])
def test_going_on_from_a_checkpoint_without_a_matching(tmp_path, cut):
    """Of a run without the callback: Lightning loads its weights alone, as the optimiser had less to train."""
    _, student = networks()
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=cut, save_top_k=-1)
    made = trainer(tmp_path, checkpoints, enable_checkpointing=True)
    made.fit(Classifier(student), DataLoader(data(), BATCH))
    saved = torch.load(tmp_path / f"step={cut}.ckpt", weights_only=True)
    saved["optimizer_states"] = []
    torch.save(saved, tmp_path / "plain.ckpt")
    teacher, student = networks()
    callback = Counted(teacher, refresh_every=[], example=EXAMPLE)
    fitted(tmp_path, Classifier(student), callback, tmp_path / "plain.ckpt")
    assert callback.at == [(1, cut)]


def test_a_checkpoint_of_another_reduction(tmp_path):
    teacher, student = networks()
    fitted(tmp_path, Classifier(student), callback_of(teacher)).save_checkpoint(tmp_path / "amp.ckpt")
    teacher, student = networks()
    module = Classifier(student)
    with pytest.raises(ValueError, match="saved for other taps or another reduction"):
        fitted(tmp_path, module, callback_of(teacher, reduction="max"), tmp_path / "amp.ckpt", epochs=4)
    assert "training_step" not in vars(module)


def test_fitting_on_and_anew(tmp_path):
    teacher, student = networks()
    module, callback = Classifier(student), Counted(teacher, refresh_every=2, example=EXAMPLE)
    made = fitted(tmp_path, module, callback, epochs=1)
    made.fit_loop.max_epochs = 2
    made.fit(module, DataLoader(data(), BATCH))
    assert callback.at == [(0, 0)]
    _, student = networks()
    module = Classifier(student)
    fitted(tmp_path, module, callback)
    assert_as_by_hand(module, callback, plain_loop())


def test_the_module_is_afterwards_as_before(tmp_path):
    teacher, student = networks()
    module, plain = Classifier(student), Classifier(networks()[1])
    fitted(tmp_path, module, callback_of(teacher))
    trainer(tmp_path).fit(plain, DataLoader(data(), BATCH))
    assert vars(module).keys() == vars(plain).keys()
    for network in (module, teacher):
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in network.modules())
    module.trainer = None
    again = pickle.loads(pickle.dumps(module))
    assert_same(again.state_dict(), module.state_dict())


def test_a_run_that_fails_leaves_the_module_as_before(tmp_path):
    teacher, student = networks()
    steps = itertools.count()

    def failing(loss):
        if next(steps) == 5:
            raise RuntimeError("out of luck")
        return loss

    module = Classifier(student, returned=failing)
    own = module.training_step
    module.training_step = own  # somebody's own change
    callback = callback_of(teacher)
    with pytest.raises(RuntimeError, match="out of luck"):
        fitted(tmp_path, module, callback)
    assert module.training_step is own
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert callback.state_dict()["0.index"].min() >= 0


def test_steps_without_a_loss_are_skipped(tmp_path):
    """With the last two batches of each epoch left out, the others train as if these alone were there."""
    steps = itertools.count()

    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if next(steps) % BATCHES >= 2 else super().training_step(batch, batch_idx)

    teacher, student = networks()
    module = Skipping(student)
    loader = DataLoader(data(), BATCH)
    fitted(tmp_path, module, callback_of(teacher), epochs=1)
    distiller = MatchingDistiller(*networks(), example=EXAMPLE)
    optimizer, _ = optimised(distiller.parameters())
    distiller.train().refresh(loader)
    for images, labels in itertools.islice(loader, 2):
        output, loss = distiller(images)
        optimizer.zero_grad()
        (F.cross_entropy(output, labels) + loss).backward()
        optimizer.step()
    assert_same(module.model.state_dict(), distiller.student.state_dict())


class Itself(Classifier):
    """A module that is the student itself."""

    def __init__(self):
        super().__init__(networks()[1])

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class ByName(pl.Callback):
    """Looks every parameter of the optimiser up by its name, wherever Lightning lets it."""

    def __init__(self):
        self.looked = 0

    def look(self, pl_module, optimizer):
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        assert all(names[parameter] for group in optimizer.param_groups for parameter in group["params"])
        assert all(parameter in names for parameter in optimizer.state)
        self.looked += 1

    def on_train_epoch_start(self, trainer, pl_module):
        self.look(pl_module, trainer.optimizers[0])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.look(pl_module, optimizer)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.look(pl_module, trainer.optimizers[0])


@pytest.mark.parametrize("first", [True, False])
def test_callbacks_that_know_the_parameters_by_name(tmp_path, first):
    teacher, student = networks()
    module, callback, other = Classifier(student), callback_of(teacher), ByName()
    more, callbacks = ((other,), callback) if first else ((callback,), other)
    made = trainer(tmp_path, callbacks, *more, gradient_clip_val=0.5)
    made.fit(module, DataLoader(data(), BATCH))
    assert other.looked == 3 * (1 + 2 * BATCHES)
    made.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert len(group["params"]) == len(list(module.parameters()))
    assert [sorted(state) for state in saved["matching_distillation_optimizer"]] == [["momentum_buffer"]] * 6
    assert "configure_gradient_clipping" not in vars(module)


def test_clipped_gradients_are_those_of_a_plain_loop(tmp_path):
    teacher, student = networks()
    module, callback = Classifier(student), callback_of(teacher)
    fitted(tmp_path, module, callback, gradient_clip_val=0.1)
    assert_as_by_hand(module, callback, plain_loop(clip=0.1))


def test_a_backbone_that_is_unfrozen_later(tmp_path):
    teacher, student = networks()

    class Module(Classifier):
        def __init__(self):
            super().__init__(student)
            self.backbone = nn.ModuleList(
                [student.conv0, student.bn0, student.conv1, student.bn1, student.conv2, student.bn2]
            )

        def configure_optimizers(self):
            return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], 0.05, momentum=0.9)

    module, before = Module(), copy.deepcopy(student.state_dict())
    seen = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(student.conv0.weight.equal(before["conv0.weight"]))

    with pytest.warns(UserWarning, match="provided params to be frozen already exist"):  # the norms, which stay trained
        trainer(tmp_path, callback_of(teacher), BackboneFinetuning(1), Watch()).fit(module, DataLoader(data(), BATCH))
    assert seen == [True, False, False]


@pytest.mark.parametrize("method", ["weight norm", "lock"])
def test_teachers_that_deepcopy_refuses(tmp_path, method):
    teacher, student = networks()
    if method == "lock":
        teacher.lock = threading.Lock()
        with pytest.raises(ValueError, match="Plain cannot be copied"):
            fitted(tmp_path, Classifier(student), callback_of(teacher))
        return
    torch.nn.utils.weight_norm(teacher.conv0)
    teacher(torch.randn(2, 3, 8, 8))
    fitted(tmp_path, Classifier(student), callback_of(teacher), epochs=1)


def test_the_module_itself_as_the_student(tmp_path):
    module = Itself()
    fitted(tmp_path, module, callback_of(networks()[0], student=""))
    assert_same(module.model.state_dict(), plain_loop().student.state_dict())


class Late(Classifier):
    """Makes its network only when it is set up."""

    def configure_model(self):
        self.model = networks()[1]


def test_a_student_that_is_made_late(tmp_path):
    module = Late(None)
    fitted(tmp_path, module, callback_of(networks()[0]))
    assert_same(module.model.state_dict(), plain_loop().student.state_dict())


class Batched(Classifier):
    """Batches as dictionaries whose first tensor is no image, prepared on the device."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {"label": batch[1], "image": batch[0] / 2}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "image": 2 * batch["image"]}

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["image"], batch["label"]), batch_idx)


def test_batches_of_ones_own(tmp_path):
    teacher, student = networks()
    module = Batched(student)
    callback = callback_of(teacher, forward=lambda batch: student(batch["image"]))
    fitted(tmp_path, module, callback)
    assert_as_by_hand(module, callback, plain_loop())


def test_a_loader_for_the_refreshes(tmp_path):
    teacher, student = networks()
    module = Classifier(student)
    callback = callback_of(teacher, loader=[data()[:2][0]], refresh_every=0)
    fitted(tmp_path, module, callback, epochs=1, limit_train_batches=0.25)
    distiller = MatchingDistiller(*networks(), example=EXAMPLE)
    distiller.refresh([data()[:2][0]])
    assert torch.equal(callback.state_dict()["2.index"], distiller.positions[2].index)


def test_several_training_loaders(tmp_path):
    teacher, student = networks()
    loaders = {"a": DataLoader(data(), BATCH), "b": DataLoader(data(), BATCH)}
    with pytest.raises(ValueError, match="trains on a dict of loaders, a refresh takes batches of one: give loader="):
        fitted(tmp_path, Classifier(student), callback_of(teacher), loader=loaders)


def test_workers_that_stay_are_left_to_the_training(tmp_path):
    teacher, student = networks()
    module, callback = Classifier(student), callback_of(teacher)
    loader = DataLoader(data(), BATCH, num_workers=1, persistent_workers=True)
    fitted(tmp_path, module, callback, loader=loader)
    assert_as_by_hand(module, callback, plain_loop())


class Manual(Classifier):
    automatic_optimization = False


def of_nothing(module):
    return [torch.nn.Parameter(torch.zeros(1))]


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Manual, {}, "Manual optimises manually"),
        (Classifier, {"student": "modle"}, "Classifier has no module 'modle'; did you mean 'model'?"),
        (lambda model: Classifier(model, of_nothing), {}, "trains no parameter of the student"),
    ],
)
def test_modules_that_cannot_be_distilled(tmp_path, module, options, message):
    teacher, student = networks()
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, module(student), callback_of(teacher, **options))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in student.modules())


def test_matching_by_steps_is_not_for_the_callback():
    with pytest.raises(ValueError, match="online: the callback matches over the images of a loader"):
        MatchingDistillation(networks()[0], online=10)
    with pytest.raises(ValueError, match="max_images is 0"):
        MatchingDistillation(networks()[0], max_images=0)


def test_other_stages_do_nothing(tmp_path):
    teacher, student = networks()
    module = Classifier(student)
    module.validation_step = module.training_step
    trainer(tmp_path, callback_of(teacher)).validate(module, DataLoader(data(), BATCH), verbose=False)
    assert not any(each._forward_hooks for each in module.modules())


class Leaving(pl.Callback):
    """Ends the workers' group of gloo, which Lightning leaves to the end of the interpreter: that can abort a worker."""

    def setup(self, trainer, module, stage):
        leave_at_exit()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.slow
def test_two_processes(tmp_path, accumulate):
    """Gradients are the mean over the processes, whose batch norms see their own images, in double precision."""
    teacher, student = networks()
    module = Classifier(student.double())
    options = {"strategy": "ddp_spawn", "devices": 2, "precision": "64-true", "accumulate_grad_batches": accumulate}
    loader = DataLoader(data(), BATCH // 2)
    fitted(tmp_path, module, callback_of(teacher), loader=loader, more=[Leaving()], **options)

    teacher, student = (network.double() for network in networks())
    distiller = MatchingDistiller(teacher, student, example=EXAMPLE.double())
    optimizer, scheduler = optimised(distiller.parameters())
    images, labels = data()[:]
    images = images.double()
    distiller.train()
    samplers = [DistributedSampler(data(), 2, rank) for rank in range(2)]  # as Lightning puts them into the loader
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        if due(epoch, 2):
            distiller.refresh([images])
        for step in range(BATCHES):
            for rank in range(2):
                own = list(samplers[rank])[step * BATCH // 2 :][: BATCH // 2]
                output, loss = distiller(images[own])
                (F.cross_entropy(output, labels[own]) + loss).div(2 * accumulate).backward()
                if rank == 0:
                    kept = [buffer.clone() for buffer in distiller.buffers()]
            for buffer, value in zip(distiller.buffers(), kept, strict=True):  # DDP goes on with those of the first
                buffer.copy_(value)
            if (step + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[name], value)


def test_the_other_package(tmp_path):
    other = pytest.importorskip("lightning.pytorch")
    teacher, student = networks()

    class Other(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = student

        training_step, configure_optimizers = Classifier.training_step, Classifier.configure_optimizers
        _of, _returned = staticmethod(everything), staticmethod(as_tensor)

    module, callback = Other(), callback_of(teacher)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    made = other.Trainer(max_epochs=3, callbacks=[callback], accelerator="cpu", devices=1, **quiet)
    made.fit(module, DataLoader(data(), BATCH))
    assert_as_by_hand(module, callback, plain_loop())
