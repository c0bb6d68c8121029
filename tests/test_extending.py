"""What CONTRIBUTING's table "To add a ..." promises: each is added here from outside, and the commands know it."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from plotly import graph_objects as go
from torchmetrics import MeanAbsoluteError, MetricCollection

from matchdistill import cli
from matchdistill.data import ImageData
from matchdistill.methods import METHODS, FeatureMethod
from matchdistill.models import build_model
from matchdistill.position import FeaturePosition
from matchdistill.reduction import REDUCTIONS, Reduction
from matchdistill.report import tables
from matchdistill.report.charts import Chart
from matchdistill.runs.metrics import read_metrics
from matchdistill.tasks import TASKS
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.module import DistilledModule
from matchdistill.tasks.task import Card, Task, weights_code

pytestmark = [pytest.mark.filterwarnings("ignore:.*LeafSpec"), pytest.mark.pages]


class CountingModule(DistilledModule):
    """Learns a digit as a number, and features where there is a distiller."""

    def batch_losses(self, batch):
        images, digits = batch
        if self.distiller is None:
            return {"task": F.mse_loss(self.network()(images)[:, 0], digits / 9)}
        with self.distiller.capture(images) as captured:
            output = self.network()(images)
        return {"task": F.mse_loss(output[:, 0], digits / 9), "features": self.distiller.loss(captured)}

    def measure(self, measure, network, batch):
        images, digits = batch
        measure.update(9 * network(images)[:, 0], digits.float())

    def one_image(self, batch):
        return batch[0][:1]


class Counting(Task):
    """Digits as numbers: the best error is the lowest, and no share of anything."""

    name = "counting"
    data = ImageData
    metrics = (Metric("off", "mean error", higher_is_better=False, share=False),)

    def build(self, model, num_classes, class_names=()):
        return build_model(model.name, 1, model.weights, model.fresh_head, **model.options)

    def example(self, data):
        return torch.zeros(2, 3, data.image_size, data.image_size)

    def check(self, network, data, role):
        pass

    def module(self, settings, data, student, teacher, distiller=None, tried=None):
        measures = [MetricCollection({"off": MeanAbsoluteError()}) for _ in range(2 * len(self.metrics))]
        return CountingModule(student, settings, self.metrics, measures, distiller)

    def card(self, student, described, data):
        def use(kind, file):
            return weights_code("build_model", described, file)

        return Card("image-to-number", "matchdistill", {"name": described["name"]}, {}, "Digits.", use)


class Watching(Counting):
    """The same, but nothing is measured."""

    name = "watching"
    metrics = ()


class Means(FeaturePosition):
    """The student's mean activation is to be the teacher's."""

    def loss(self, student, teacher, loss_reduction, mask=None):
        return (student.mean() - teacher.detach().mean()) ** 2


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert cli.main(list(map(str, arguments))) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def recipe_of(task, path="recipe.yaml", **distillation):
    network = {"name": "matchdistill.models:small_resnet"}
    values = {
        "task": task,
        "data": {"batch_size": 20, "train_limit": 60, "val_limit": 40},
        "teacher": {**network, "options": {"width": 4}},
        "student": {**network, "options": {"width": 2}},
        "training": {"epochs": 2, "lr": 0.01},
        "distillation": distillation,
        "trainer": {"accelerator": "cpu"},
    }
    Path(path).write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("task", [Counting(), Watching()], ids=lambda task: task.name)
def test_a_task(run, monkeypatch, task):
    monkeypatch.setitem(TASKS, task.name, task)
    recipe = recipe_of(task.name, method="mgd-amp")
    shown = run("fit", recipe, "--out=one")
    measured = {metric.name for metric in task.metrics}
    assert ("mean error" in shown) == bool(measured)
    metrics = read_metrics(Path("one"))
    assert (metrics.task, set(metrics.student), set(metrics.teacher)) == (task.name, measured, measured)
    assert set(run("validate", "one").split()) >= {"student"}
    compared = run("compare", recipe, "--methods=none,mgd-amp", "--seeds=2", "--out=all")
    assert ("gap recovered" in compared) == bool(measured)
    summary = json.loads(Path("all/metrics.json").read_text())["summary"]
    assert [("off" in entry, entry["difference"] is not None) for entry in summary] == [
        (bool(measured), False),
        (bool(measured), bool(measured)),
    ]
    for folder in ("one", "all"):
        run("report", folder)
        assert ("mean error" in Path(folder, "report.html").read_text()) == bool(measured)
    assert "outputs within 0" in run("export", "one")
    card = Path("one/export/model_card.md").read_text()
    assert "image-to-number" in card
    assert ("mean error" in card) == bool(measured)


def test_the_lowest_error_is_the_best(run, monkeypatch):
    monkeypatch.setitem(TASKS, "counting", Counting())
    run("fit", recipe_of("counting", method="none"), "--training.epochs=3", "--out=one")
    errors = [each["val/off"] for each in json.loads(Path("one/evidence/epochs.json").read_text())["epochs"]]
    page = Path("one/report.html").read_text()
    assert f"mean error ends at {errors[-1]:.4g} (best {min(errors):.4g})" in page


def test_a_method(run, monkeypatch):
    monkeypatch.setitem(METHODS, "means", FeatureMethod("its mean activations", 2.0, Means))
    recipe = recipe_of("classification", method="means")
    assert "means" in run("fit", recipe, "--out=one", "--distillation.weights.means=3")
    assert yaml.safe_load(Path("one/recipe.yaml").read_text())["distillation"]["weights"]["means"] == 3
    assert "means" in run("compare", recipe, "--methods=none,means,means+kd", "--seeds=1", "--out=all")
    run("report", "one", "all/cells/means+kd/seed0", "--out=both.html")
    run("export", "one")
    assert "of the teacher its mean activations: method `means`" in Path("one/export/model_card.md").read_text()


def test_a_reduction(run, monkeypatch):
    def least(teacher, index, generator):
        return torch.stack([teacher[:, group].amin(1) for group in index], 1)

    monkeypatch.setitem(REDUCTIONS, "least", Reduction(least, lambda margins, _: margins.amin(1)))
    recipe = recipe_of("classification", method="mgd-least")
    assert "mgd-least" in run("fit", recipe, "--out=one")
    assert "mgd-least" in run("compare", recipe, "--methods=none,mgd-least", "--seeds=1", "--out=all")
    run("report", "one")
    run("export", "one")
    assert "reduced by `least`" in Path("one/export/model_card.md").read_text()


def bars(caption, values):
    return Chart(go.Figure(go.Bar(y=values)), caption)


def test_a_chart(run, monkeypatch):
    """One in each table."""
    of_runs = {"RUNS": "Epochs by run.", "COMPARISON": "Epochs by run of the grid."}
    for table, caption in of_runs.items():
        chart = lambda runs, caption=caption: bars(caption, [len(each.curves["train/loss"]) for each in runs])  # noqa: E731
        monkeypatch.setattr(tables, table, [*getattr(tables, table), chart])
    monkeypatch.setattr(tables, "RUN", [*tables.RUN, lambda run: bars("Refreshes.", [len(run.refreshes)])])
    chart = lambda run, number: [bars(f"Place {number}.", [number])]  # noqa: E731
    monkeypatch.setattr(tables, "POSITION", [*tables.POSITION, chart])
    recipe = recipe_of("classification", method="mgd-amp")
    run("fit", recipe, "--out=one")
    page = Path("one/report.html").read_text()
    assert [caption in page for caption in ("Epochs by run.", "Refreshes.", "Place 2.", "Epochs by run of the grid.")] == [
        True, True, True, False,
    ]  # fmt: skip
    run("compare", recipe, "--methods=none", "--seeds=1", "--out=all")
    assert "Epochs by run of the grid." in Path("all/report.html").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--distillation.method=kd",
            "method 'kd' distils the output of classifiers: choose one without kd for counting",
        ),
        ("--distillation.pyramid=true", "distillation.pyramid is not for counting"),
        ("--trainer.compile=true", "trainer.compile is not for counting"),
    ],
)
def test_what_a_task_does_not_support_is_refused(tmp_path, monkeypatch, capsys, option, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TASKS, "counting", Counting())
    assert cli.main(["fit", recipe_of("counting", method="none"), option, "--out=one"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("one").exists()
