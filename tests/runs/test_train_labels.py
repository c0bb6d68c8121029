"""Runs on mixed and varied images, held to loops by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_train import folder_arguments, write_images
from test_train_options import assert_weights_near, column
from test_train_resume import assert_same_end, killed

from matchdistill.data.loading import mix_seed
from matchdistill.runs.build import build_module
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.module import ClassificationModule

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


@pytest.mark.parametrize("kind", ["ce", "bce", "none"])
def test_a_run_on_mixed_images_is_that_of_a_loop_by_hand(tiny, tmp_path, kind):
    """Mixup with smoothed labels by SGD; the teacher sees the mixed images too, whatever is said about them."""
    arguments = ("--distillation.method=kd", "--training.mixup=0.4", "--training.label_smoothing=0.1")
    recipe = tiny(*arguments, f"--training.loss={kind}")
    fit(recipe, tmp_path / "run", quiet=True)
    recipe = tiny(*arguments, f"--training.loss={kind}")
    recipe.data.setup()
    loader = recipe.data.train_dataloader()
    module = build_module(recipe).train()
    student, teacher = module.network(), module.teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9, nesterov=True, weight_decay=1e-4)
    losses = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        np.random.seed(mix_seed("epoch", 0, epoch, 0))
        batches = list(loader)
        for number, (images, labels) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 + math.cos(math.pi * (epoch + number / len(batches)) / 2)) / 2
            np.random.rand()
            share = np.random.beta(0.4, 0.4)
            mixed = share * images + (1 - share) * images.flip(0)
            smooth = torch.full((len(labels), 10), 0.01)
            smooth[range(len(labels)), labels] = 0.91
            targets = share * smooth + (1 - share) * smooth.flip(0)
            output = student(mixed)
            with torch.no_grad():
                taught = (teacher(mixed) / 1.5).softmax(1)
            loss = -(taught * (output / 1.5).log_softmax(1)).sum(1).mean() + (taught * taught.log()).sum(1).mean()
            loss = loss * 1.5**2
            if kind == "ce":
                loss = loss - (targets * output.log_softmax(1)).sum(1).mean()
            elif kind == "bce":
                loss = loss - (targets * F.logsigmoid(output) + (1 - targets) * F.logsigmoid(-output)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    means = [sum(losses[start : start + 3]) / 3 for start in (0, 3)]
    assert column(tmp_path / "run", "train/loss") == pytest.approx(means, rel=1e-4)
    assert_weights_near(load_file(tmp_path / "run" / "student.safetensors"), student, 1e-4)
    assert bool(column(tmp_path / "run", "train/task_epoch")) == (kind != "none")


@pytest.mark.parametrize("method", ["kd", "mgd-amp", "fitnets+kd"])
def test_teacher_and_student_see_the_same_mixed_pixels(tiny, tmp_path, method, monkeypatch):
    seen, batches = {"student": [], "teacher": []}, []

    def step(self, batch, number, training_step=ClassificationModule.training_step):
        batches.append(batch[0].clone())
        networks = {"student": self.network(), "teacher": self.teacher}
        handles = [
            network.register_forward_pre_hook(lambda _, args, role=role: seen[role].append(args[0].clone()))
            for role, network in networks.items()
        ]
        loss = training_step(self, batch, number)
        for handle in handles:
            handle.remove()
        return loss

    monkeypatch.setattr(ClassificationModule, "training_step", step)
    arguments = ("--training.mixup=1", "--training.cutmix=1", "--data.augmentation=randaugment")
    fit(tiny(f"--distillation.method={method}", *arguments), tmp_path / "run", quiet=True)
    assert len(batches) == len(seen["student"]) == len(seen["teacher"]) == 6
    for batch, first, second in zip(batches, seen["student"], seen["teacher"], strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first, batch)


def test_nothing_varies_images_without_augment(tiny):
    varied = ("--data.augmentation=randaugment", "--data.color_jitter=0.3", "--data.random_erasing=1")
    batches = []
    for arguments in ((), varied):
        data = tiny("--data.augment=false", *arguments).data
        data.setup()
        batches.append(next(iter(data.train_dataloader()))[0])
    assert torch.equal(*batches)


VARIED = ("--data.augmentation=randaugment", "--data.color_jitter=0.3", "--data.random_erasing=0.5")
MIXED = ("--training.mixup=0.8", "--training.cutmix=1", "--training.label_smoothing=0.1", "--training.loss=bce")
ADAMW = ("--training.optimizer=adamw", "--training.lr=0.002", "--training.class_weights=balanced")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("folder", [False, True])
def test_a_killed_run_ends_as_the_uninterrupted_one(tiny, tmp_path, folder, workers):
    images = folder_arguments(write_images(tmp_path / "images")) if folder else ()
    crops = ("--data.crop_scale=[0.5,0.9]", "--training.repeated_augmentation=2") if folder else ()
    arguments = ("--distillation.method=kd", "--training.epochs=4", f"--data.workers={workers}", *images)
    arguments += (*VARIED, *MIXED, *ADAMW, *crops)
    fit(tiny(*arguments), tmp_path / "whole", quiet=True)
    killed("step", 8, tiny(*arguments), tmp_path / "run")
    fit(tiny(*arguments), tmp_path / "run", resume=True, quiet=True)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--training.mixup=-1"], "training.mixup is -1"),
        (["--training.label_smoothing=1"], "training.label_smoothing is 1"),
        (["--training.repeated_augmentation=0"], "training.repeated_augmentation is 0: expected a whole number from 1"),
        (["--training.class_weights=[1,-1]"], "training.class_weights is -1"),
        (["--training.loss=none", "--distillation.method=none"], r"training.loss is 'none': give a method with kd"),
        (["--teacher.training.loss=none"], "teacher.training.loss is 'none': a teacher learns from labels"),
        (["--data.random_erasing=2"], "data.random_erasing is 2.0: expected a share from 0 to 1"),
        (["--data.crop_scale=[0.1,1]"], "data.crop_scale is of sets that are cropped: leave it out with digits"),
        (["--data.augmentation_strength=3"], "data.augmentation_strength is of randaugment"),
        (["--data.crop_scale=[1,0.1]"], r"data.crop_scale is \[1.0, 0.1\]: expected two shares"),
    ],
)
def test_what_is_refused(tiny, arguments, said):
    with pytest.raises(ValueError, match=said) as info:
        tiny(*arguments)
    assert "\n" not in str(info.value)


def test_repeated_images_of_a_batch_are_varied_each_on_its_own(tiny):
    teacher = ("--teacher.training.epochs=1", "--teacher.training.repeated_augmentation=2", "--teacher.train_limit=60")
    recipe = tiny("--training.repeated_augmentation=4", *teacher)
    for data, repeats in ((recipe.data, 4), (recipe.for_teacher().data, 2)):
        batches = list(data.train_dataloader())
        assert len(batches) == len(list(tiny().data.train_dataloader()))
        for images, labels in batches:
            groups = images.flatten(1).split(repeats)
            assert all(len(group) == repeats for group in groups)
            assert all(len(set(own.tolist())) == 1 for own in labels.split(repeats))
            # Digits are moved to one of 25 places, so that some are alike by chance.
            assert sum(len(group.unique(dim=0)) for group in groups) > len(images) // 2 + len(groups) // 2
        seen = [image for images, _ in batches for image in images]
        assert len(seen) == 60


def test_labels_of_whole_images_are_not_what_detectors_have(small):
    with pytest.raises(ValueError, match=r"training.mixup is for images with one label each, not for detection"):
        small("--training.mixup=1")


def test_the_recipe_of_a_consistent_teacher():
    """The values are those of the paper's code, where weight decay is not multiplied by the learning rate."""
    recipe = load_recipe("consistent_teacher")
    training = recipe.training
    assert (training.optimizer, training.lr, training.lr * training.weight_decay) == ("adamw", 0.03, 0.0003)
    assert (training.epochs, training.warmup_steps, training.clip_grad_norm) == (1200, 5000, 1.0)
    assert (training.mixup, training.loss, training.schedule, recipe.data.options.batch_size) == (
        1,
        "none",
        "cosine",
        4096,
    )
    assert (recipe.distillation.method, recipe.distillation.kd_temperature) == ("kd", 1)
    assert recipe.data.options.crop_scale == [0.05, 1.0]
