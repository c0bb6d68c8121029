import copy
import csv
import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from matchdistill.distiller import MatchingDistiller
from matchdistill.methods import parse_method
from matchdistill.models import small_resnet
from matchdistill.runs.metrics import read_metrics
from matchdistill.runs.store import load_student
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.checks import check_classes
from matchdistill.tasks.classification.module import ClassificationModule

METHODS = ["none", "kd", "mgd-amp", "mgd-sm", "mgd-rd", "mgd-amp+kd", "random-amp", "fitnets", "at+kd", "ofd"]

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


def checkpoint(out):
    return torch.load(out / "last.ckpt", weights_only=True)


def csv_columns(out):
    columns = {}
    for path in sorted((out / "logs").glob("version_*/metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value:
                        columns.setdefault(name, []).append(float(value))
    return columns


def tensorboard_scalars(out):
    events = EventAccumulator(str(out / "logs" / "tensorboard"))
    events.Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def same(first, second):
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_whole_results(tiny, tmp_path, method):
    out = tmp_path / "run"
    recipe = tiny(f"--distillation.method={method}", "--distillation.refresh_every=1")
    metrics = fit(recipe, out)
    assert metrics.plain() == json.loads((out / "metrics.json").read_text())
    assert metrics == read_metrics(out)
    assert (metrics.method, metrics.seed, metrics.epochs) == (method, 0, 2)
    assert metrics.parameters["student"] == sum(p.numel() for p in small_resnet(width=2).parameters())
    assert metrics.corrupt_images == []
    assert set(metrics.student) == {"top1", "top5"}
    assert set(metrics.teacher) == (set() if method == "none" else {"top1", "top5"})
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == recipe.config

    plain = small_resnet(width=2)
    plain.load_state_dict(load_file(out / "student.safetensors"), strict=True)
    images, labels = map(torch.cat, zip(*recipe.data.val_dataloader(), strict=True))
    with torch.no_grad():
        assert (plain.eval()(images).argmax(1) == labels).double().mean().item() == pytest.approx(
            metrics.student["top1"]
        )
    rebuilt, described = load_student(out)
    assert torch.equal(rebuilt.fc.weight, plain.fc.weight)
    assert not rebuilt.training
    assert described["class_names"] == [str(digit) for digit in range(10)]
    saved = checkpoint(out)
    assert saved["epoch"] == 1
    assert saved["global_step"] == 6

    columns, scalars = csv_columns(out), tensorboard_scalars(out)
    positions = 3 if parse_method(method).features else 0
    refreshes = {"mgd": 2, "random": 1}.get(parse_method(method).features, 0)
    matching = {"cost": refreshes, "churn": max(0, refreshes - 1)}
    for logged in (columns, scalars):
        found = {name for name in logged if name.startswith(("train/features", "matching/"))}
        expected = {f"train/features_{i}_{kind}" for i in range(positions) for kind in ("step", "epoch")}
        expected |= {f"matching/{name}_{i}" for i in range(positions) for name, count in matching.items() if count}
        assert found == expected | ({"train/features"} if positions else set())
        assert ("train/kd_step" in logged) == method.endswith("kd")
        assert {"train/task_step", "train/task_epoch", "train/loss", "val/top1", "val/top5"} <= set(logged)
        assert len(logged["train/task_step"]) == 6
        assert logged["val/top1"][-1] == pytest.approx(metrics.student["top1"])
        for i in range(positions):
            assert len(logged[f"train/features_{i}_step"]) == 6
            for name, count in matching.items():
                values = logged.get(f"matching/{name}_{i}", [])
                assert len(values) == count
                assert all(0 <= value < 4 for value in values)
        parts = [name for name in logged if name.startswith("train/") and name.endswith("_epoch")]
        assert logged["train/loss"] == pytest.approx(
            [sum(logged[name][epoch] for name in parts) for epoch in range(2)], rel=1e-4
        )


def write_images(root, valid="val", per_class=12, classes=("bee", "wasp")):
    for split, count in (("train", per_class), (valid, 4)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(90, (24, 20, 3), generator=torch.Generator().manual_seed(number))
                image = Image.fromarray((noise + 120 * label).byte().numpy())
                image.save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
    return root


def folder_arguments(root):
    return (
        "--data.name=folder",
        f"--data.root={root}",
        "--data.image_size=16",
        "--data.batch_size=8",
        "--data.train_limit=null",
        "--data.val_limit=null",
        "--teacher.weights=null",
    )


@pytest.mark.parametrize("valid", ["val", "valid"])
def test_an_image_folder(tiny, tmp_path, valid):
    root = write_images(tmp_path / "insects", valid)
    metrics = fit(tiny(*folder_arguments(root), "--distillation.method=mgd-amp+kd"), tmp_path / "run")
    assert set(metrics.student) == {"top1"}
    model, described = load_student(tmp_path / "run")
    assert described["class_names"] == ["bee", "wasp"]
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    assert checkpoint(tmp_path / "run")["global_step"] == 2 * 3


def test_fashion_mnist(tiny, tmp_path):
    import gzip

    def write(name, values):
        shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
        (tmp_path / name).write_bytes(
            gzip.compress(bytes([0, 0, 8, values.ndim]) + shape + values.byte().numpy().tobytes())
        )

    for prefix, count in (("train", 60), ("t10k", 20)):
        labels = torch.arange(count) % 10
        write(f"{prefix}-labels-idx1-ubyte.gz", labels)
        write(f"{prefix}-images-idx3-ubyte.gz", (labels * 25)[:, None, None].expand(count, 28, 28))
    metrics = fit(
        tiny("--data.name=fashion-mnist", f"--data.root={tmp_path}", "--data.val_limit=null"), tmp_path / "run"
    )
    assert set(metrics.student) == {"top1", "top5"}
    assert load_student(tmp_path / "run")[1]["class_names"][-1] == "Ankle boot"


def test_a_corrupt_image_is_named_and_can_be_skipped(tiny, tmp_path):
    root = write_images(tmp_path / "insects")
    damaged = root / "train" / "wasp" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    arguments = (*folder_arguments(root), "--distillation.method=mgd-amp")
    with pytest.raises(ValueError, match=rf"image {damaged} cannot be read .*--data.skip_corrupt=true"):
        fit(tiny(*arguments), tmp_path / "run")
    with pytest.warns(UserWarning, match="is skipped"):
        metrics = fit(tiny(*arguments, "--data.skip_corrupt=true"), tmp_path / "run", resume=True)
    assert metrics.corrupt_images == [str(damaged)]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["corrupt_images"] == [str(damaged)]


def test_every_method_starts_from_the_same_weights_and_sees_the_same_images(tiny, tmp_path, monkeypatch):
    seen = []
    step, start = ClassificationModule.training_step, ClassificationModule.on_train_epoch_start

    def record_step(self, batch, number):
        seen.append([value.clone() for value in batch])
        return step(self, batch, number)

    def record_start(self):
        if self.current_epoch == 0:
            seen.append(copy.deepcopy(self.network().state_dict()))
        start(self)

    monkeypatch.setattr(ClassificationModule, "training_step", record_step)
    monkeypatch.setattr(ClassificationModule, "on_train_epoch_start", record_start)
    runs = {}
    for method in METHODS:
        fit(tiny(f"--distillation.method={method}", "--seed=5"), tmp_path / method)
        runs[method] = seen[:]
        seen.clear()
    assert len(runs["none"]) == 1 + 6
    assert not torch.equal(runs["none"][1][0], runs["none"][4][0])
    for method in METHODS:
        assert same(runs[method], runs["none"]), method
    fit(tiny("--distillation.method=none", "--seed=6"), tmp_path / "other")
    assert not same(seen[0], runs["none"][0])
    assert not same(seen[1], runs["none"][1])


def test_runs_repeat(tiny, tmp_path):
    for name in ("first", "second"):
        torch.rand(1)
        fit(tiny("--distillation.method=mgd-rd+kd"), tmp_path / name)
    assert same(load_file(tmp_path / "first/student.safetensors"), load_file(tmp_path / "second/student.safetensors"))


@pytest.mark.parametrize(
    ("every", "images", "epochs"),
    [
        (0, 33, [0]),
        (1, 33, [0, 1, 2, 3, 4]),
        (2, 33, [0, 2, 4]),
        (3, 33, [0, 3]),
        ("auto", 13, [0, 3]),  # 13 of 3 x 60 images are less than a tenth, of 2 x 60 more
        ("auto", 33, [0]),
    ],
)
def test_the_matching_is_refreshed_when_it_is_due(tiny, tmp_path, monkeypatch, every, images, epochs):
    refreshed = []
    refresh = MatchingDistiller.refresh

    def record(self, loader=None, max_images=20_000, **options):
        matchings = refresh(self, loader, max_images, **options)
        of = "steps" if loader is None else (max_images, options["tolerance"])
        refreshed.append((len(steps) // 3, of, {matching.images for matching in matchings}))
        return matchings

    steps = []
    monkeypatch.setattr(MatchingDistiller, "refresh", record)
    monkeypatch.setattr(
        ClassificationModule,
        "training_step",
        lambda self, batch, number, step=ClassificationModule.training_step: (
            steps.append(1),
            step(self, batch, number),
        )[1],
    )
    arguments = ("--training.epochs=5", f"--distillation.refresh_every={every}")
    arguments += (f"--distillation.refresh_images={images}",)
    fit(tiny(*arguments, "--distillation.refresh_tolerance=0.01"), tmp_path / "run")
    assert refreshed == [(epoch, (images, 0.01), {images}) for epoch in epochs]  # too few for a check
    del refreshed[:], steps[:]
    fit(tiny(*arguments, "--distillation.refresh_online=2"), tmp_path / "online")
    epochs = range(5) if every == "auto" else epochs  # they cost nothing
    assert refreshed == [(epoch, "steps", {40}) if epoch else (0, (images, None), {images}) for epoch in epochs]


def test_the_teacher_is_trained_first(tiny, tmp_path):
    out = tmp_path / "run"
    recipe = tiny(
        "--teacher.weights=null",
        "--teacher.training.epochs=2",
        "--teacher.training.lr=0.05",
        "--teacher.train_limit=80",
        "--distillation.method=mgd-amp+kd",
    )
    metrics = fit(recipe, out)
    alone = fit(recipe.for_teacher(), tmp_path / "alone")
    assert metrics.teacher == pytest.approx(alone.student)
    assert checkpoint(out / "teacher")["global_step"] == 2 * 4
    weights = load_file(out / "teacher" / "student.safetensors")
    assert same(weights, load_file(tmp_path / "alone" / "student.safetensors"))
    small_resnet(width=4).load_state_dict(weights, strict=True)
    # The margins are those of the teacher as it was when the student's training began.
    saved = checkpoint(out)["state_dict"]
    teacher = small_resnet(width=4)
    teacher.load_state_dict(weights)
    distiller = MatchingDistiller(teacher, small_resnet(width=2), example=torch.zeros(2, 3, 16, 16))
    distiller.refresh([torch.zeros(2, 3, 16, 16)])
    distiller.load_state_dict(
        {name.removeprefix("distiller."): value for name, value in saved.items() if name.startswith("distiller.")}
    )
    for number, position in enumerate(distiller.positions):
        from matchdistill.functional import batchnorm_margin, reduce_margin

        norm = teacher.get_submodule(f"layer{number + 1}.bn2")
        expected = reduce_margin(batchnorm_margin(norm.weight, norm.bias), position.index)
        torch.testing.assert_close(position.margin, expected)


def test_a_finished_run_is_returned_and_another_recipe_refused(tiny, tmp_path):
    out = tmp_path / "run"
    recipe = tiny("--distillation.method=none")
    metrics = fit(recipe, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "recipe.yaml"}
    assert fit(recipe, out, resume=True) == metrics
    with pytest.raises(ValueError, match="already holds a run: continue it with --resume"):
        fit(recipe, out)
    for arguments, changed in (
        (("--training.lr=0.3",), "training"),
        (("--distillation.method=kd",), "distillation"),
        (("--seed=1", "--data.batch_size=30"), "seed, data"),
        (("--student.options={width: 3}",), "student"),
    ):
        with pytest.raises(ValueError, match=f"recipe.yaml differs in {changed}: resume with the same values"):
            fit(tiny("--distillation.method=none", *arguments), out, resume=True)
    assert fit(tiny("--distillation.method=none", "--compare.seeds=9"), out, resume=True) == metrics
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "recipe.yaml"} == before


def test_faults_of_the_students_data_are_found_before_the_teacher_is_trained(tiny, tmp_path):
    out, teacher = tmp_path / "run", ("--teacher.weights=null", "--teacher.training.epochs=1")
    with pytest.raises(ValueError, match="1 training image for 1 process: each needs at least 2"):
        fit(tiny(*teacher, "--data.train_limit=1", "--teacher.train_limit=60"), out)
    with pytest.raises(ValueError, match="1 validation image cannot be shared among 2 processes"):
        fit(tiny(*teacher, "--data.val_limit=1", "--trainer.devices=2", "--trainer.strategy=ddp"), out)
    assert not out.exists()
    root = write_images(tmp_path / "insects")
    for path in (root / "val" / "bee").iterdir():  # the teacher would meet them after its first epoch
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not an image that Pillow can read"):
        fit(tiny(*folder_arguments(root), *teacher), out)
    assert not (out / "teacher").exists()


def test_more_than_one_problem_of_the_folder(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit(tiny("--distillation.method=none"), tmp_path / "file" / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("[1")
    with pytest.raises(ValueError, match=r"recipe.yaml is not YAML"):
        fit(tiny("--distillation.method=none"), tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["last.ckpt", "metrics.json"])
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_something_else_are_left_alone(tiny, tmp_path, name, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(ValueError, match=f"holds {name} but no recipe.yaml: choose another --out"):
        fit(tiny("--distillation.method=none"), tmp_path / "run", resume)
    assert files(tmp_path / "run") == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student.name=timm:resnt18"], "did you mean 'resnet18'"),
        (["--teacher.name=matchdistill.models:small_resnt"], "did you mean 'small_resnet'"),
        (["--student.options={widht: 2}"], "cannot be built with these options"),
        (["--distillation.taps=[[layer1.relu2:input, layer9:input]]"], "no module 'layer9'"),
        (["--distillation.taps=[[layer9:input, layer1.relu2:input]]"], "no module 'layer9'"),
        (["--distillation.taps=[[layer1:out, layer1:input]]"], "unknown side 'out'"),
        (["--distillation.weights.mgd=[1, 2]"], "distillation.weights.mgd: loss_weight has 2 numbers for 3 positions"),
        (["--teacher.train_limit=9999"], "data.train_limit is 9999"),
        (["--data.train_limit=9999"], "data.train_limit is 9999"),
        (["--trainer.accelerator=cud"], "trainer does not fit this machine"),
        (["--trainer.accelerator=tpu"], "trainer does not fit this machine"),
        (["--trainer.devices=0"], "trainer.devices is 0: expected a whole number from 1"),
        (["--trainer.strategy=dpp"], "trainer does not fit this machine"),
        (["--trainer.precision=16-mixed"], "trainer.precision '16-mixed' needs a GPU: give 'bf16-mixed' or '32-true'"),
        (
            ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.sync_batchnorm=true"],
            "sync_batchnorm needs GPUs",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_trained_or_written(tiny, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(ClassificationModule, "training_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        fit(tiny("--teacher.training.epochs=1", "--teacher.weights=null", *arguments), tmp_path / "run")
    assert files(tmp_path / "run") == []


def fixed_head(width=2):
    return small_resnet(num_classes=7, width=width)


def no_images(num_classes):
    return nn.Sequential(nn.Linear(5, num_classes))


def several_outputs(num_classes):
    class Several(nn.Module):
        def forward(self, images):
            return [images, images]

    return Several()


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fixed_head", r"gives \(2, 7\) for 2 images, but the data has 10 classes: expected \(2, 10\)"),
        ("no_images", r"does not take images of shape \(3, 16, 16\): RuntimeError"),
        ("several_outputs", "gives list for 2 images"),
    ],
)
def test_networks_that_do_not_fit_the_data(tiny, tmp_path, role, function, message):
    arguments = [f"--{role}.name=test_train:{function}", f"--{role}.options={{}}", "--teacher.weights=null"]
    with pytest.raises(ValueError, match=f"the {role} {message}"):
        fit(tiny(*arguments), tmp_path / "run")
    assert files(tmp_path / "run") == []


def test_checking_leaves_the_network_as_it_is(tiny):
    recipe = tiny()
    recipe.data.setup()
    model = small_resnet(width=2).train()
    before = copy.deepcopy(model.state_dict())
    check_classes(model, recipe.data, "student")
    assert model.training
    assert same(model.state_dict(), before)


class Tied(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.network = small_resnet(num_classes, width=2)
        self.again = self.network.fc

    def forward(self, images):
        return self.network(images)


def test_a_student_whose_weights_are_tied(tiny, tmp_path):
    fit(tiny("--student.name=test_train:Tied", "--student.options={}"), tmp_path / "run")
    weights = load_file(tmp_path / "run" / "student.safetensors")
    Tied(10).load_state_dict(weights, strict=True)
    assert torch.equal(weights["again.weight"], weights["network.fc.weight"])


def test_student_and_teacher_start_from_files(tiny, tmp_path, monkeypatch):
    torch.manual_seed(3)
    student = small_resnet(width=2)
    torch.save(student.state_dict(), tmp_path / "student.pt")
    monkeypatch.setattr(
        ClassificationModule,
        "training_step",
        lambda self, *_: (_ for _ in ()).throw(KeyError(self.network().state_dict())),
    )
    with pytest.raises(KeyError) as info:
        fit(tiny(f"--student.weights={tmp_path / 'student.pt'}"), tmp_path / "run")
    assert same(dict(info.value.args[0]), dict(student.state_dict()))


def test_synchronised_batch_norm_leaves_the_plain_student(tiny, tmp_path):
    fit(tiny("--trainer.sync_batchnorm=true"), tmp_path / "run")
    small_resnet(width=2).load_state_dict(load_file(tmp_path / "run" / "student.safetensors"), strict=True)
    fit(tiny(), tmp_path / "plain")
    assert same(load_file(tmp_path / "run/student.safetensors"), load_file(tmp_path / "plain/student.safetensors"))


def test_bfloat16(tiny, tmp_path):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        fit(tiny("--distillation.method=mgd-amp+kd", f"--trainer.precision={precision}"), tmp_path / precision)
        losses[precision] = csv_columns(tmp_path / precision)["train/loss"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)
    assert losses["bf16-mixed"] != losses["32-true"]
    weights = load_file(tmp_path / "bf16-mixed" / "student.safetensors")
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights.values())


def test_progress_in_a_file(tiny, tmp_path, capsys):
    fit(tiny("--distillation.method=mgd-amp", "--training.epochs=3"), tmp_path / "run")
    shown, said = capsys.readouterr()
    assert said == ""
    assert "layer1.relu2:input -> layer1.relu2:input" in shown
    lines = [line for line in shown.splitlines() if line.startswith(("epoch", "matching"))]
    assert [line.split("  ")[0] for line in lines] == [
        "matching of 60 images",
        "epoch 1/3",
        "epoch 2/3",
        "matching of 60 images",
        "epoch 3/3",
    ]
    assert "churn" not in lines[0]
    assert "churn" in lines[3]
    for line in lines[1:3]:
        assert all(part in line for part in ("loss ", "features ", "top-1 "))
    fit(tiny("--distillation.method=mgd-amp"), tmp_path / "quiet", quiet=True)
    assert capsys.readouterr() == ("", "")
