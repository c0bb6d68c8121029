"""The page: what it says is what the files say, it needs nothing beside it, and it is made of whatever there is."""

import json
import re
import shutil
import tempfile
import webbrowser
from pathlib import Path

import pytest
import torch
import yaml

from matchdistill import cli
from matchdistill.matching import Matching
from matchdistill.report import comparison_charts, run_charts, verdict
from matchdistill.report.networks import networks, si
from matchdistill.report.page import report, write_report
from matchdistill.report.runs import Run, cells
from matchdistill.runs import evidence
from matchdistill.runs.compare import compare
from matchdistill.runs.metrics import read_metrics
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.module import ClassificationModule
from matchdistill.tasks.judging import Judged
from records import run_of

pytestmark = [pytest.mark.pages, pytest.mark.filterwarnings("ignore:.*LeafSpec")]

EVERY = ("--distillation.method=mgd-amp", "--distillation.refresh_every=1")
LARGEST = 10_000_000  # bytes


def figures(page):
    """The charts of a page, as Plotly gets them."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return [json.loads(text) for text in found]


def assert_self_contained(page):
    """Nothing is fetched from anywhere, and it is small."""
    assert len(page.encode()) < LARGEST
    for address in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page.partition('id="library"')[0]):
        assert address.startswith(("data:", "cells/", "#", "../../../report.html")), address
    assert "@import" not in page


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A comparison of two methods and two seeds, two epochs each."""
    out = tmp_path_factory.mktemp("runs") / "grid"
    values = {
        "data": {"batch_size": 20, "train_limit": 60, "val_limit": 50},
        "teacher": {
            "name": "matchdistill.models:small_resnet",
            "options": {"width": 4},
            "training": {"epochs": 1, "lr": 0.05},
        },
        "student": {"name": "matchdistill.models:small_resnet", "options": {"width": 2}},
        "training": {"epochs": 2, "lr": 0.05},
        "distillation": {"refresh_every": 1, "method": "mgd-amp"},
        "trainer": {"accelerator": "cpu", "log_every": 1},
    }
    path = out.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert cli.main(["compare", str(path), "--methods=none,mgd-amp", "--seeds=2", f"--out={out}"]) == 0
    return out


def test_a_comparison_and_each_of_its_runs_have_a_page(runs):
    page = (runs / "report.html").read_text()
    assert_self_contained(page)
    metrics = json.loads((runs / "metrics.json").read_text())
    for entry in metrics["summary"]:
        assert entry["method"] in page
        assert f"{100 * entry['top1']['mean']:.2f}" in page
    links = re.findall(r'href="(cells/[^"]+)"', page)
    assert links == [f"cells/{method}/seed{seed}/report.html" for method in ("none", "mgd-amp") for seed in (0, 1)]
    for link in links:
        assert_self_contained((runs / link).read_text())
    differences, by_method, costs, *of_classes = figures(page)
    assert len(of_classes) == 3
    (found,) = [entry for entry in metrics["summary"] if entry["method"] == "mgd-amp"]
    assert differences["data"][0]["x"] == pytest.approx([100 * found["difference"]["mean"]])
    assert differences["data"][0]["error_x"]["array"] == pytest.approx([100 * found["difference"]["interval"]])
    means = [trace for trace in by_method["data"] if trace.get("name") == "mgd-amp"]
    assert means[0]["y"][-1] == pytest.approx(found["top1"]["mean"])
    assert costs["data"][0]["x"] == pytest.approx([entry["seconds"] for entry in metrics["summary"]])
    told = {method: cells(runs)[at].pictures[1]["images"] for method, at in (("none", 0), ("mgd-amp", 2))}
    for ours, theirs in zip(told["mgd-amp"], told["none"], strict=True):
        lines = [f"truth: {ours['truth']}", f"teacher: {ours['teacher']}", f"none: {theirs['student']}"]
        assert "<br>".join([*lines, f"mgd-amp: {ours['student']}"]) in page


def test_the_page_of_a_run(runs):
    """The summary, curves with the refreshes, and each position's charts and maps."""
    folder = runs / "cells/mgd-amp/seed1"
    page = (folder / "report.html").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    alone = json.loads((runs / "cells/none/seed1/metrics.json").read_text())
    table = page[page.index('<table id="summary"') :].partition("</table>")[0]
    for shown in (metrics["student"], metrics["teacher"], alone["student"]):
        assert f"{shown['top1']:.2%}" in table
    gap = metrics["teacher"]["top1"] - alone["student"]["top1"]
    if gap > 0:
        assert f"{(metrics['student']['top1'] - alone['student']['top1']) / gap:.0%}" in table
    assert f"{metrics['parameters']['student']:,}" in table
    curves, times, by_class, confusion, reliability, churn, ignored, *of_positions = figures(page)
    assert [trace["name"] for trace in by_class["data"]] == ["student alone", "mgd-amp", "teacher"]
    assert confusion["data"][0]["type"] == "heatmap"
    assert [trace.get("name") for trace in reliability["data"]] == ["student alone", "mgd-amp", "teacher", None]
    run = Run.of(folder)
    assert [shape["x0"] for shape in curves["layout"]["shapes"]] == [0, 3]
    by_name = {trace["name"]: trace for trace in curves["data"] if trace["yaxis"] == "y"}
    assert by_name["loss"]["y"] == [point.value for point in run.curves["train/loss"]]
    assert {trace["name"] for trace in times["data"]} == {"teacher's training", "steps", "refreshes", "validation"}
    assert len(churn["data"]) == len(ignored["data"][0]["y"]) == 3
    assert len(of_positions) == 3 * 4  # two heat maps, similarity and margins
    assert len(re.findall(r'<option value="\d+"', page)) >= 3 + 3 * 2
    assert page.count('class="maps"') == sum(len(each["channels"]) for each in run.pictures[1]["positions"])
    assert "torch: " in page
    assert "refresh_every: 1" in page


def test_a_page_says_when_an_image_is_won(runs):
    """And pages of runs from before it was written down do not."""
    said = "An image is won if this student is right and the other network is wrong."
    assert said in (runs / "cells/mgd-amp/seed1/report.html").read_text()
    assert said in (runs / "report.html").read_text()
    assert Judged("accuracy", "images", *[torch.zeros(1)] * 3).graded == ""


def test_a_verdict_names_backbones(runs, tmp_path):
    folder = Path(shutil.copytree(runs / "cells/mgd-amp/seed0", tmp_path / "run"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    options = {"architecture": "retinanet", "backbone": "torchvision:resnet50"}
    recipe["teacher"] = {"name": "matchdistill.models:detector", "options": options}
    recipe["student"] = {"name": "matchdistill.models:segmenter", "options": {"backbone": "timm:resnet10t"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sentence = verdict.of_run(Run.of(folder)).sentence
    assert sentence.startswith("retinanet (resnet50) → segmenter (resnet10t) on ")


def test_methods_with_the_same_mean_are_all_the_best(runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "grid")
    own = {}
    for path in sorted(folder.glob("cells/*/*/metrics.json")):
        metrics = json.loads(path.read_text())
        own.setdefault(path.parent.name, metrics["student"])
        path.write_text(json.dumps({**metrics, "student": own[path.parent.name]}))
    write_report([folder])
    assert (folder / "report.html").read_text().count('<tr class="best">') == 2
    assert (runs / "report.html").read_text().count('<tr class="best">') == 1


def test_the_time_adds_up(runs):
    """Steps, refreshes and validation make the epochs; the teacher's training comes from its own run."""
    run = Run.of(runs / "cells/mgd-amp/seed0")
    spent = run_charts.seconds(run)
    assert spent["teacher's training"] == json.loads((runs / "teacher/metrics.json").read_text())["seconds"]
    del spent["teacher's training"]
    epochs = sum(point.value for point in run.curves["seconds/epoch"])
    assert sum(spent.values()) == pytest.approx(epochs)
    assert epochs <= run.metrics.seconds
    assert "teacher's training" not in run_charts.seconds(Run.of(runs / "cells/none/seed0"))
    assert run.seconds == run.metrics.seconds  # the teacher was trained by the comparison


def test_the_time_of_a_run_is_without_its_teachers(tiny, tmp_path):
    fit(tiny("--teacher.weights=null", "--teacher.training.epochs=1"), tmp_path, resume=True, quiet=True)
    run = Run.of(tmp_path)
    assert 0 < run.seconds == pytest.approx(run.metrics.seconds - run.teacher.metrics.seconds)


def test_runs_side_by_side(runs, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    folders = [str(runs / "cells" / method / "seed0") for method in ("none", "mgd-amp")]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *folders, "--open"]) == 0
    assert capsys.readouterr().out == "page: report.html\n"
    assert opened == [(tmp_path / "report.html").as_uri()]
    page = Path("report.html").read_text()
    assert_self_contained(page)
    curves = figures(page)[0]
    losses = [trace["name"] for trace in curves["data"] if trace["yaxis"] == "y"]
    assert losses == ["none, seed 0", "mgd-amp, seed 0"]
    found = networks([Run.of(Path(folder)) for folder in folders])
    assert [row["role"] for row in found["rows"]] == [
        "teacher, small_resnet",
        "student alone (none, seed 0)",
        "mgd-amp, seed 0",
    ]


def test_the_best_student_and_the_throughput(tiny, tmp_path):
    out = tmp_path / "run"
    fit(tiny("--training.keep_best=true", "--distillation.method=none"), out, quiet=True)
    best, costs = (json.loads((out / "evidence" / name).read_text()) for name in ("best.json", "costs.json"))
    page = (out / "report.html").read_text()
    shown = f"top-1 {100 * best['student']['top1']:.2f}% after epoch {best['epoch'] + 1} (best.safetensors)"
    assert f'<p class="note">best student: {shown}</p>' in page
    assert f"throughput: {costs['throughput']['images_per_second']:.4g} images per second, " in page
    for name in ("best.json", "costs.json"):
        (out / "evidence" / name).unlink()
    assert 'class="note">best' not in report([out])
    assert "images per second" not in report([out])


def test_a_run_that_is_not_finished(tiny, tmp_path, monkeypatch):
    """Cut in its first epoch, and again in its second: losses are by step before there are epochs."""
    out = tmp_path / "run"
    losses = ClassificationModule.batch_losses
    arguments = (*EVERY, "--training.epochs=4")
    for at, expected in ((2, [0, 1]), (5, [2])):
        seen = []

        def cut(self, batch, seen=seen, at=at):
            seen.append(batch)
            if len(seen) > at:
                raise KeyError("cut")
            return losses(self, batch)

        monkeypatch.setattr(ClassificationModule, "batch_losses", cut)
        with pytest.raises(KeyError):
            fit(tiny(*arguments), out, resume=True, quiet=True)
        page = write_report([out]).read_text()
        assert_self_contained(page)
        assert "Not finished:" in page
        shown = figures(page)
        assert len(shown) >= 4
        assert [trace["x"] for trace in shown[0]["data"] if trace["name"] == "loss"] == [expected]
    monkeypatch.setattr(ClassificationModule, "batch_losses", losses)
    fit(tiny(*arguments), out, resume=True, quiet=True)
    assert "Not finished:" not in (out / "report.html").read_text()
    for name in ("train/loss", "val/top1", "seconds/epoch"):
        assert [point.epoch for point in Run.of(out).curves[name]] == [0, 1, 2, 3]


def test_the_total_of_the_losses_by_step(tmp_path):
    folder = tmp_path / "logs" / "version_0"
    folder.mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("distillation: {method: mgd-amp}")
    (folder / "metrics.csv").write_text(
        "epoch,step,train/task_step,train/features_0_step,train/features_1_step\n0,0,1,2,3\n0,1,4,5,6\n"
    )
    (tmp_path / "logs" / "version_0_old").mkdir()
    (tmp_path / "logs" / "version_0_old" / "metrics.csv").write_text("what, ever\n")
    assert run_charts.losses(Run.of(tmp_path)) == [(0, 0, 6.0), (1, 0, 15.0)]
    assert "the loss goes from 6 to 15 in 2 steps" in run_charts.curves([Run.of(tmp_path)]).caption


def test_a_run_that_has_only_begun(tiny, tmp_path):
    from matchdistill.runs.store import claim

    claim(tiny(), tmp_path)
    page = report([tmp_path])
    assert "Not finished:" in page
    assert figures(page) == []


def test_a_comparison_that_has_only_begun(runs, tmp_path, tiny):
    shutil.copytree(runs, tmp_path / "grid")
    for name in ("metrics.json", "cells/mgd-amp/seed1/metrics.json", "cells/mgd-amp/seed1/report.html"):
        (tmp_path / "grid" / name).unlink()
    page = report([tmp_path / "grid"])
    assert "not finished" in page
    assert "cells/mgd-amp/seed1/report.html" not in page
    assert [run.name for run in cells(tmp_path / "grid")][-1] == "mgd-amp, seed 1"
    for run in cells(tmp_path / "grid"):
        (run.folder / "metrics.json").unlink(missing_ok=True)
    assert "No run is finished so far." in report([tmp_path / "grid"])


def test_a_folder_near_the_root(tiny):
    with tempfile.TemporaryDirectory() as folder:
        fit(tiny(*EVERY), Path(folder), resume=True, quiet=True)
        assert (Path(folder) / "report.html").exists()


def test_the_page_of_a_cell_knows_the_student_alone_whatever_came_first(tiny, tmp_path, monkeypatch):
    """Its page is written anew with that of the comparison; by whatever name its folder is given."""
    compare(tiny(), tmp_path, ["mgd-amp", "none"], 1)
    cell = tmp_path / "cells/mgd-amp/seed0"
    assert "student alone (none, seed 0)" in (cell / "report.html").read_text()
    monkeypatch.chdir(cell)
    assert "student alone (none, seed 0)" in report([Path()])


def test_a_comparison_whose_runs_failed_has_a_page(tiny, tmp_path, monkeypatch):
    def fails(recipe, *_, **__):
        if recipe.distillation.method == "mgd-amp":
            raise ValueError("no luck")
        return fit(recipe, *_, **__)

    monkeypatch.setattr("matchdistill.runs.compare.fit", fails)
    with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
        compare(tiny(), tmp_path, ["none", "mgd-amp"], 1)
    assert "cells/none/seed0/report.html" in (tmp_path / "report.html").read_text()


def test_means_are_of_finished_runs(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "grid")
    (tmp_path / "grid/cells/none/seed1/metrics.json").unlink()
    done = [run for run in cells(tmp_path / "grid") if run.name == "none, seed 0"]
    figure = comparison_charts.by_method(cells(tmp_path / "grid")).figure
    (mean,) = [trace for trace in figure.data if trace.name == "none"]
    assert list(mean.y) == [point.value for point in done[0].curves["val/top1"]]


def test_a_run_cut_as_its_page_was_made(tiny, tmp_path, monkeypatch):
    """Nothing of its page is missing when it is resumed."""
    out = tmp_path / "run"

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr("matchdistill.runs.train.look", cut)
        with pytest.raises(KeyboardInterrupt):
            fit(tiny(*EVERY), out, quiet=True)
    assert not (out / "metrics.json").exists()
    assert fit(tiny(*EVERY), out, resume=True, quiet=True) == read_metrics(out)
    page = (out / "report.html").read_text()
    assert "Not finished:" not in page
    assert "after training, by the matching in force" in page
    assert "What they find" in page


DAMAGE = {
    "recipe.yaml": "distillation: abc",
    "evidence/costs.json": '{"student": {"operations": 3}}',
    "evidence/refreshes.json": '{"refreshes": [{"step": 0, "epoch": 0, "images": 3, "seconds": 1, "cost": [1, 2, 3]}]}',
    "evidence/epochs.json": '{"epochs": [{"train/loss": 1}]}',
    "evidence/pictures.safetensors": "no tensors",
    "evidence/final.safetensors": "",
    "logs/version_0/metrics.csv": "epoch,step,train/loss\n0,0,5.95e-\n",
    "metrics.json": '{"method": "x", "seed": 0, "epochs": 1, "student": {"top1": null}, "teacher": {}, "parameters": {}, '
    '"corrupt_images": [], "seconds": 1}',
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_told_in_one_line(runs, tmp_path, capsys, name):
    shutil.copytree(runs / "cells/mgd-amp/seed0", tmp_path / "run")
    if name.startswith("logs"):  # which are read of an older version, that kept no epochs
        (tmp_path / "run/evidence/epochs.json").unlink()
    (tmp_path / "run" / name).write_text(DAMAGE[name])
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("matchdistill: error: ")
    assert str(tmp_path / "run") in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("missing", ["first", "last", "final", "pictures"])
def test_what_is_missing_is_left_out(runs, tmp_path, missing):
    shutil.copytree(runs / "cells/mgd-amp/seed0", tmp_path / "run")
    (tmp_path / "run" / f"evidence/{missing}.safetensors").unlink()
    assert len(figures(report([tmp_path / "run"]))) > 10


def test_a_run_whose_evidence_is_gone(runs, tmp_path):
    """Its logs have the curves."""
    shutil.copytree(runs / "cells/mgd-amp/seed0", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "evidence")
    curves, times = figures(report([tmp_path / "run"]))
    assert curves["data"]
    assert {trace["name"] for trace in times["data"]} == {"steps", "validation"}


def test_a_page_that_cannot_be_written(runs, tmp_path, capsys):
    assert cli.main(["report", str(runs / "cells/none/seed0"), "--out", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


class Matched:
    """What is kept of a position, of this width."""

    def __init__(self, students, teachers):
        self.partners, self.index = "teacher channels", torch.randperm(teachers).reshape(students, -1)
        self.margin, self.margin_norm = torch.zeros(students), None
        self.name, self.teacher, self.student = "teacher -> student", "teacher", "student"
        self.teacher_channels, self.student_channels = teachers, students


def test_pages_of_large_networks_are_small(runs, tmp_path):
    """ResNet-50 to ResNet-18 at 224 px and with more positions; two runs, and six."""
    torch.manual_seed(0)
    widths, sides = [64, 64, 128, 128, 256, 256, 512, 512], [56, 56, 28, 28, 14, 14, 7, 7]
    positions = [Matched(width, 4 * width) for width in widths]
    folders = [tmp_path / f"run{number}" for number in range(6)]
    for folder in folders:
        shutil.copytree(runs / "cells/mgd-amp/seed0", folder)
        costs = [torch.rand(width, 4 * width) * 4 for width in widths]
        found = [Matching(each.name, each.index, cost, 1) for each, cost in zip(positions, costs, strict=True)]
        for name in (evidence.FIRST, evidence.LAST, evidence.FINAL):
            evidence.save_matched(folder / name, positions, found, {"ignored": [0.5] * 8, "images": 1})
        tensors = {f"image{number}": torch.randint(256, (3, 224, 224), dtype=torch.uint8) for number in range(4)}
        for number, side in enumerate(sides):
            tensors |= {f"{name}{number}": torch.randn(8, 4, side, side) for name in ("student", "target")}
            tensors[f"members{number}"] = torch.randn(8, 4, 4, side, side)
        about = {"channels": list(range(8)), "similarity": [0.5] * 8, "members": [[1, 2, 3, 4]] * 8, "group": 4}
        told = {"images": [{"truth": "x"}] * 4, "positions": [about] * 8}
        evidence.save(folder / evidence.PICTURES, tensors, told)
    for count in (1, 2, 4, 6):
        assert_self_contained(report(folders[:count]))


def test_names_are_text_and_not_markup(tiny, tmp_path):
    out = tmp_path / "<b>run & <a href='x'>"
    fit(tiny(*EVERY), out, quiet=True)
    tensors, told = evidence.load(out / evidence.PICTURES)
    told["images"][0]["truth"] = "<i>cat</i></script>"
    evidence.save(out / evidence.PICTURES, tensors, told)
    page = write_report([out]).read_text()
    assert "<b>run" not in page
    assert "<i>cat" not in page
    assert "&lt;i&gt;cat" in page
    assert "&lt;b&gt;run" in page
    assert "&amp;lt;" not in page  # nothing is escaped twice
    assert page.count("</script>") == len(figures(page)) + 3
    times = figures(page)[1]  # Plotly would make a link of it
    assert times["data"][0]["y"] == ["&lt;b&gt;run &amp; &lt;a href=&#x27;x&#x27;&gt;"]


def measured(method, top1, teacher):
    metrics = run_of(method, 0, {"top1": top1}, {"top1": teacher} if teacher else {})
    recipe = {"distillation": {"method": method}, "teacher": {"name": "x:net"}}
    return Run(Path(f"/runs/{method}"), method, recipe, metrics)


def test_the_gap_that_is_recovered():
    """From 0.5 alone and 0.9 of the teacher, 0.6 is a quarter; of several students alone none is the one."""
    alone, distilled = measured("none", 0.5, None), measured("mgd-amp", 0.6, 0.9)
    assert [row["gap"] for row in networks([alone, distilled])["rows"]] == ["", "", "25%"]
    assert [row["gap"] for row in networks([distilled])["rows"]] == ["", ""]
    other = measured("none", 0.4, None)
    other.folder = Path("/runs/other")
    assert not networks([alone, other, distilled])["has_gap"]
    assert not networks([measured("none", 0.95, None), distilled])["has_gap"]


def test_a_detection_run(small, tmp_path, monkeypatch):
    fit(small(), tmp_path / "run", quiet=True)
    path = tmp_path / "run" / evidence.PICTURES
    tensors, told = evidence.load(path)
    told["images"][0]["student"] = [["<i>disc", 0.5, 0.25, 0.5, 0.75, 1.0]]
    evidence.save(path, tensors, told)
    page = write_report([tmp_path / "run"]).read_text()
    assert_self_contained(page)
    height, width = tensors["image0"].shape[1:]
    assert f'<rect x="{0.25 * width}" y="{0.5 * height}" width="{0.5 * width}" height="{0.5 * height}">' in page
    assert "<title>&lt;i&gt;disc 50%</title>" in page
    assert page.count('class="boxes"') == 3 * len(told["images"])
    assert "AP" in page


def test_what_is_no_run_is_an_error(runs, tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not the folder of a run: it has no recipe.yaml" in capsys.readouterr().err
    assert cli.main(["report", str(runs), str(runs / "cells/none/seed0")]) == 2
    assert "is a comparison" in capsys.readouterr().err
    (tmp_path / "cells").mkdir()
    (tmp_path / "recipe.yaml").write_text("task: classification")
    with pytest.raises(ValueError, match="without a run so far"):
        report([tmp_path])


def test_a_page_that_fails_does_not_fail_the_run(tiny, tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("no ink")

    monkeypatch.setattr("matchdistill.runs.train.write_report", fails)
    with pytest.warns(UserWarning, match="could not write the page: ValueError: no ink"):
        fit(tiny(), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "metrics.json").exists()
    monkeypatch.setattr("matchdistill.runs.compare.write_report", fails)
    monkeypatch.setattr("matchdistill.runs.train.write_report", lambda folders: None)
    with pytest.warns(UserWarning, match="could not write the page: ValueError: no ink"):
        compare(tiny(), tmp_path / "grid", ["none"], 1)
    assert (tmp_path / "grid" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (950, "950 FLOP"), (24_562_176, "24.6 MFLOP"), (4.1e9, "4.1 GFLOP")]
)
def test_numbers_of_operations(value, text):
    assert si(value) == text
