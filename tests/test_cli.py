import json
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from matchdistill import cli
from matchdistill.models import small_resnet
from matchdistill.runs import compare as compare_module
from matchdistill.runs.store import AtomicCheckpoints
from matchdistill.runs.train import fit

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*LeafSpec")]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The commands run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(capfd):
    """Run a command that succeeds and says nothing on standard error; returns what it printed."""

    def run(*arguments):
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert (code, err) == (0, "")
        return out

    return run


@pytest.fixture
def mistake(capfd):
    """Run a command that is mistaken; returns the one line that it said."""

    def mistake(*arguments):
        capfd.readouterr()
        with warnings.catch_warnings():
            # Those that Python shows; pytest would keep them from standard error.
            for category in (UserWarning, FutureWarning, RuntimeWarning):
                warnings.simplefilter("error", category)
            code = cli.main([str(argument) for argument in arguments])
        err = capfd.readouterr().err
        assert code == 2
        assert re.fullmatch(r"matchdistill: error: [^\n]+\n", err), err
        return err

    return mistake


def left(path):
    return sorted(each.relative_to(path).as_posix() for each in path.rglob("*")) if path.exists() else []


def test_fit(run, tiny_file):
    out = run("fit", tiny_file, "--out", "o", "--distillation.method=mgd-amp+kd", "--training.epochs", "1")
    assert "mgd-amp+kd, 1 epochs: o" in out
    assert re.search(r"top-1 +┃ +top-5", out)
    metrics = json.loads(Path("o/metrics.json").read_text())
    for role in ("teacher", "student"):
        row = next(line for line in out.splitlines() if f"│ {role} " in line)
        assert f" {metrics[role]['top1']:.2%} " in row
        assert f"{metrics['parameters'][role]:,}" in row
    assert yaml.safe_load(Path("o/recipe.yaml").read_text())["training"]["epochs"] == 1
    assert "mgd-amp+kd, 1 epochs" in run(
        "fit", tiny_file, "--out=o", "--distillation.method=mgd-amp+kd", "--training.epochs=1", "--resume"
    )


def test_fit_writes_into_runs_by_the_name_of_the_recipe(run, tiny_file):
    run("fit", tiny_file, "--training.epochs=1", "--distillation.method=none")
    assert Path("runs/tiny/student.safetensors").is_file()


@pytest.mark.parametrize("form", ["first", "--config", "--config="])
def test_ways_to_name_the_recipe(run, tiny_file, form):
    named = {"first": [tiny_file], "--config": ["--config", tiny_file], "--config=": [f"--config={tiny_file}"]}[form]
    printed = yaml.safe_load(run("fit", *named, "--seed=7", "--print_config", "--training.lr=0.2"))
    assert (printed["seed"], printed["training"]["lr"]) == (7, 0.2)
    assert printed["training"]["epochs"] == 2


@pytest.mark.parametrize("command", ["fit", "compare", "quickstart"])
def test_the_printed_recipe_is_a_recipe(run, tiny_file, command):
    arguments = ["--training.milestones=[3, 4]", "--distillation.weights.mgd=paper", "--trainer.devices=auto"]
    printed = run(command, tiny_file, *arguments, "--print_config")
    Path("printed.yaml").write_text(printed)
    assert run(command, "printed.yaml", "--print_config") == printed
    config = yaml.safe_load(printed)
    assert config["training"]["milestones"] == [3, 4]
    assert config["distillation"]["weights"]["mgd"] == "paper"
    assert left(Path("runs")) == []


def test_the_grid_is_in_the_printed_recipe(run, tiny_file):
    config = yaml.safe_load(run("compare", tiny_file, "--methods", "none, mgd-rd", "--seeds=9", "--print_config"))
    assert config["compare"] == {"methods": ["none", "mgd-rd"], "seeds": 9}


def test_compare(run, mistake, tiny_file):
    out = run("compare", tiny_file, "--out=o", "--methods", "none,kd", "--seeds=2", "--training.epochs=1")
    assert re.search(r"none +│ +[\d.]+ ± [\d.]+ ", out)
    assert "students: o/cells/METHOD/seedN/student.safetensors" in out
    assert left(Path("o/cells")).count("kd/seed1/student.safetensors") == 1
    assert "student" in run("validate", "o/cells/kd/seed1")
    for path in ("o", "o/metrics.json"):
        said = mistake("validate", path)
        assert "o is the folder of a comparison: name one of its runs, o/cells/METHOD/seedN" in said
    report = json.loads(Path("o/metrics.json").read_text())
    assert len(report["runs"]) == 4
    assert report["recipe"]["compare"] == {"methods": ["none", "kd"], "seeds": 2}


@pytest.fixture
def grids(monkeypatch):
    """What the comparison is asked for, instead of doing it."""
    asked = []
    monkeypatch.setattr(compare_module, "compare", lambda *arguments: asked.append(arguments))
    return asked


def test_quickstart_is_the_comparison_of_the_packaged_recipe(run, grids):
    run("quickstart")
    run("compare", "quickstart", f"--jobs={max(1, min(4, os.cpu_count() or 1))}")
    (first, *rest), (second, *others) = grids
    assert first.config == second.config
    assert rest[:-1] == others[:-1]
    assert rest[0] == Path("runs/quickstart")
    assert rest[1] == ["none", "kd", "mgd-amp", "mgd-align"]
    assert rest[2] >= 3
    assert first.data.options.name == "digits"
    assert first.data.options.train_limit == 300


def test_quickstart_takes_options_and_another_recipe(run, grids, tiny_file):
    run("quickstart", "--seeds=1", "--jobs=1", "--out=o", "--training.epochs=3")
    recipe, out, _, seeds, jobs, _ = grids[0]
    assert (recipe.training.epochs, out, seeds, jobs) == (3, Path("o"), 1, 1)
    run("quickstart", tiny_file)
    assert grids[1][0].student.options == {"width": 2}


def test_quickstart_for_real_but_small(run):
    small = ["--student.options={width: 2}", "--teacher.options={width: 4}", "--data.val_limit=50"]
    out = run("quickstart", *small, "--training.epochs=1", "--teacher.training.epochs=1", "--seeds=1", "--jobs=1")
    for method in ("none", "kd", "mgd-amp", "mgd-align"):
        assert Path(f"runs/quickstart/cells/{method}/seed0/student.safetensors").is_file()
        assert re.search(rf"│ {re.escape(method)} +│ +[\d.]+ │", out)
    assert {"metrics.json", "metrics.csv", "recipe.yaml", "teacher"} <= set(left(Path("runs/quickstart")))


def test_validate(run, mistake, tiny_file):
    run("fit", tiny_file, "--out=o", "--distillation.method=kd")
    metrics = json.loads(Path("o/metrics.json").read_text())
    run("export", "o", "--format=pt2")
    for path in ("o", "o/last.ckpt", "o/student.safetensors", "o/export/model.pt2"):
        out = run("validate", path, "--trust") if path.endswith("pt2") else run("validate", path)
        assert path in out
        assert re.search(r"top-1 +┃ +top-5", out)
        for role in ("teacher", "student"):
            row = next(line for line in out.splitlines() if f"│ {role} " in line)
            first, second = (f"{metrics[role][name]:.2%}" for name in ("top1", "top5"))
            assert re.search(f"{first} +│ +{second}", row)
    assert "student" in run("validate", "o", "--data.val_limit=20")
    Path("o/export/model.pt2").write_bytes(b"PK")
    assert "give --trust if it is your own" in mistake("validate", "o/export/model.pt2")
    assert "model.pt2: not an exported model, or a damaged one" in mistake("validate", "o/export/model.pt2", "--trust")
    Path("elsewhere").mkdir()
    Path("elsewhere/model.pt2").write_bytes(b"PK")
    assert "elsewhere is not the folder of a run" in mistake("validate", "elsewhere/model.pt2")
    assert "o/absent.onnx: there is no such file" in mistake("validate", "o/absent.onnx")


def test_validate_needs_no_weights_to_start_from(run, tiny_file):
    torch.save(small_resnet(width=2).state_dict(), "initial.pt")
    run("fit", tiny_file, "--out=o", "--distillation.method=none", "--student.weights=initial.pt")
    Path("initial.pt").unlink()
    assert "student" in run("validate", "o")


def test_validate_needs_no_weights_that_a_trained_teacher_started_from(run, tiny_file):
    torch.save(small_resnet(width=4).state_dict(), "initial.pt")
    arguments = ("--teacher.weights=initial.pt", "--teacher.training.epochs=1", "--training.epochs=1")
    run("fit", tiny_file, "--out=o", "--distillation.method=kd", *arguments)
    Path("initial.pt").unlink()
    top1 = f"{json.loads(Path('o/metrics.json').read_text())['teacher']['top1']:.2%}"
    for path, role in (("o", "teacher"), ("o/teacher", "student")):
        assert re.search(f" {role} +│ +{top1} ", run("validate", path))


def test_export(run, tiny_file):
    run("fit", tiny_file, "--out=o", "--distillation.method=mgd-amp")
    weights = load_file("o/student.safetensors")
    assert re.search(r"o/export/model.safetensors: [\d,]+ bytes, outputs within 0 of the model's; ", run("export", "o"))
    assert left(Path("o/export")) == ["config.json", "model.safetensors", "model_card.md"]
    assert all(torch.equal(value, weights[name]) for name, value in load_file("o/export/model.safetensors").items())
    run("export", "o", "--format=pt2", "--out=deployed/s.pt2")
    assert left(Path("deployed")) == ["config.json", "model_card.md", "s.pt2"]
    plain = small_resnet(width=2)
    plain.load_state_dict(weights, strict=True)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load("deployed/s.pt2").module()(images), plain.eval()(images))


def test_export_onnx(run, tiny_file):
    pytest.importorskip("onnxruntime")
    run("fit", tiny_file, "--out=o", "--distillation.method=none", "--training.epochs=1")
    assert run("export", "o", "--format=onnx").count("\n") == 1
    assert Path("o/export/model.onnx").is_file()


def test_taps(run):
    out = run("taps", "matchdistill.models:small_resnet", "matchdistill.models:small_resnet", "--image_size=16")
    assert "layer1.relu2:input" in out
    assert "layer3.bn2" in out
    assert "to any: 100%" in out


def test_taps_of_inputs_of_other_kinds(run, mistake):
    out = run("taps", "torchvision:r3d_18", "torchvision:mc3_18", "--example", "3x8x32x32")
    assert re.search(r"layer4\.1\.relu:input +│ layer4\.1\.relu:input .*1x2x2 -> 8x2x2", out)
    small = ["matchdistill.models:small_resnet"] * 2
    assert "expected a shape without the batch" in mistake("taps", *small, "--example", "3x0x4")
    assert "expected a shape without the batch" in mistake("taps", *small, "--example", "3x16x16:float")
    assert "give one of them" in mistake("taps", *small, "--example", "3x16x16", "--image_size=16")


def test_recipes(run, mistake):
    from matchdistill.recipes import packaged

    listed = run("recipes", "list")
    for name, text in packaged().items():
        assert re.search(rf"^{name} +{re.escape(text[2 : text.index(chr(10))])}$", listed, re.M)
        assert run("recipes", "show", name) == text
        assert run("recipes", "copy", name) == f"{name}.yaml\n"
        assert Path(f"{name}.yaml").read_text() == text
        assert "exists already" in mistake("recipes", "copy", name)
        run("recipes", "copy", name, f"deep/{name}-2.yaml")
        assert Path(f"deep/{name}-2.yaml").read_text() == text
    assert "did you mean 'quickstart'" in mistake("recipes", "show", "quickstrat")
    assert "usage: matchdistill recipes" in mistake("recipes")
    assert "usage: matchdistill recipes" in mistake("recipes", "list", "more")


def test_warnings_are_sentences():
    """Without the places in our code that they come from, but for whoever looks for a mistake there."""
    program = (
        "import warnings\nfrom matchdistill import cli\n"
        "def warn(_):\n  warnings.simplefilter('always')\n  for _ in range(2): warnings.warn('this\\n  and that')\n"
        "cli.COMMANDS['warn'] = warn\ncli.main(['warn'])"
    )

    def said(**environment):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
        return done.stderr

    assert said() == "warning: this and that\n"
    assert "UserWarning: this" in said(MATCHDISTILL_DEBUG="1")


def test_the_help_has_no_addresses(run, capfd):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    shown = capfd.readouterr().out
    assert "0x" not in shown
    assert "type: path" in shown


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help(run, capfd, command):
    assert f"  {command} " in run("--help")
    try:
        code = cli.main([command, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    assert f"usage: matchdistill {command}" in capfd.readouterr().out


@pytest.mark.parametrize("command", ["fit", "compare", "quickstart", "validate"])
@pytest.mark.parametrize("task", [[], ["--task=detection"]])
def test_the_short_help_fits_two_screens(run, command, task):
    shown = run(command, *([] if command == "validate" else task), "--help").splitlines()
    assert len(shown) < 48
    assert max(map(len, shown)) < 80
    options = [line.split()[0] for line in shown if line.startswith("  --")]
    assert {"--data.root", "--student.name", "--training.lr", "--distillation.method"} <= set(options)
    everything = run(command, *([] if command == "validate" else task), "--help", "all")
    assert all(option in everything for option in options)
    assert "--help all explains every option" in shown[-1]
    assert "--trainer.prepare_teacher" in everything


def test_unknown_options(mistake, tiny_file):
    assert "unrecognized arguments: --trainin.lr=1; did you mean '--training.lr'" in mistake(
        "fit", tiny_file, "--trainin.lr=1"
    )
    assert "--drw x; did you mean '--draw'" in mistake("predict", "run", "images", "--drw", "x")
    assert "did you mean '--format'" in mistake("export", "run", "--fromat=onnx")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["fit", "RECIPE", "--task=moco", "--objective.temp=0.5"], "--objective.temperature"),
        (["fit", "RECIPE", "--task=moco", "--objective.que", "3"], "--objective.queue"),
        (["fit", "RECIPE", "--teacher.training.epoch=1"], "--teacher.training.epochs"),
        (["fit", "RECIPE", "--ou=x"], "--out"),
        (["compare", "RECIPE", "--compare.seed=1"], "--compare.seeds"),
        (["export", "run", "--form=onnx"], "--format"),
        (["taps", "timm:resnet18", "timm:resnet18", "--image=32"], "--image_size"),
    ],
)
def test_the_beginning_of_an_option_is_not_taken_for_it(mistake, tiny_file, arguments, meant):
    said = mistake(*(tiny_file if argument == "RECIPE" else argument for argument in arguments))
    assert "unrecognized arguments: " in said
    assert f"did you mean '{meant}'" in said


OWN = [f"--{role}=matchdistill.models:small_resnet" for role in ("teacher", "student")]


@pytest.mark.parametrize("weights", ["train", "a: file #1.pt"])
def test_init_writes_a_recipe_that_runs(run, mistake, weights):
    torch.save(small_resnet().state_dict(), "a: file #1.pt")
    said = run("init", *OWN, "--data=digits", f"--teacher_weights={weights}", "--out=deep/own.yaml")
    assert said == "deep/own.yaml: matchdistill fit deep/own.yaml\n"
    config = yaml.safe_load(run("fit", "deep/own.yaml", "--print_config"))
    trained = weights == "train"
    assert config["teacher"]["weights"] == (None if trained else weights)
    assert config["teacher"]["training"]["epochs"] == 30 * trained
    assert Path("deep/own.yaml").read_text().startswith("# A student is distilled from its teacher.")
    tiny = ("--data.train_limit=60", "--data.val_limit=50", "--training.epochs=1")
    tiny = (*tiny, *(["--teacher.training.epochs=1"] if trained else []))
    assert "mgd-amp, 1 epochs" in run("fit", "deep/own.yaml", *tiny, "--out=o")
    assert "deep/own.yaml exists already" in mistake("init", "--out=deep/own.yaml")


def test_init_of_folders_and_pretrained_networks(run, mistake):
    options = ("--teacher=timm:resnet50", "--teacher_weights=pretrained", "--student=timm:mobilenetv1_100")
    run("init", *options, "--student_weights=pretrained", "--data=~/my birds: 1")
    config = yaml.safe_load(run("fit", "recipe.yaml", "--print_config"))
    assert (config["data"]["name"], config["data"]["root"]) == ("folder", "~/my birds: 1")
    assert (config["student"]["weights"], config["training"]["lr"]) == ("pretrained", 0.01)
    Path("recipe.yaml").unlink()
    assert "unknown method 'mgd'" in mistake("init", *options, "--data=x", "--method=mgd")
    assert "no.pt" in mistake("init", *OWN, "--data=x", "--teacher_weights=no.pt")
    assert left(Path()) == []


def test_init_asks_on_a_terminal(run, mistake, monkeypatch):
    assert "give --teacher_weights, --data: there is no terminal to ask on" in mistake("init", *OWN)
    answers = iter(["", "train", "digits"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    run("init", *OWN)
    assert yaml.safe_load(run("fit", "recipe.yaml", "--print_config"))["data"]["name"] == "digits"


def test_completion(run, mistake):
    ask = 'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _matchdistill; echo "${COMPREPLY[@]}"; }\n'
    asked = {
        "matchdistill fi": "fit",
        "matchdistill fit quick": "quickstart",
        "matchdistill fit mine.yaml --training.ep": "--training.epochs",
        "matchdistill recipes sh": "show",
        "matchdistill recipes copy quick": "quickstart",
        "matchdistill predict runs/mine --dr": "--draw",
        "matchdistill predict runs/mine photos": "",  # files, which bash completes
        "matchdistill completion z": "zsh",
    }
    script = run("completion", "bash") + ask + "".join(f"ask {words}\n" for words in asked)
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines(), done.stderr) == ([*asked.values()], "")
    assert run("completion", "zsh").startswith("autoload")
    assert "usage: matchdistill completion bash|zsh" in mistake("completion", "fish")


def test_version(run):
    assert re.fullmatch(r"\d+\.\d+.*\n", run("--version"))
    assert cli.main([]) == 2


def test_mistakes_in_commands(mistake):
    assert "unknown command 'fti'; did you mean 'fit'" in mistake("fti")
    assert "no recipe: name a YAML file or a packaged recipe first" in mistake("fit")
    assert "no recipe 'nothing.yaml'" in mistake("fit", "nothing.yaml")
    assert "expected one argument" in mistake("fit", "quickstart", "--seed")
    assert "--unknown" in mistake("fit", "quickstart", "--unknown=1")
    assert "--jobs 0: expected at least 1" in mistake("compare", "quickstart", "--jobs=0")
    assert "unknown method 'kdd'" in mistake("compare", "quickstart", "--methods=none,kdd")
    assert "compare.seeds is 0: expected a whole number from 1" in mistake("quickstart", "--seeds=0")
    assert "the last of the seeds is 4294967296" in mistake("quickstart", "--seeds=3", "--seed=4294967294")
    assert "no run: name the folder" in mistake("validate")
    assert "nowhere: there is no such file or folder" in mistake("validate", "nowhere")
    assert ". is not the folder of a run: it has no recipe.yaml" in mistake("validate", ".")
    assert "nowhere holds no finished run" in mistake("export", "nowhere")
    assert "required" in mistake("export")
    assert "required" in mistake("taps")
    assert "did you mean 'torchvision:resnet18' or 'timm:resnet18'" in mistake("taps", "resnet18", "resnet18")
    assert "unknown reduction 'amq'" in mistake(
        "taps", *["matchdistill.models:small_resnet"] * 2, "--reduction=amq", "--image_size=16"
    )
    assert left(Path()) == []


@pytest.mark.parametrize("command", ["fit", "compare", "quickstart"])
def test_unknown_keys_are_named_all_at_once(mistake, command):
    Path("r.yaml").write_text("data: {nmae: digits}\ntrianing: {}\nstudent: {nme: x}\ntraining: {epochs: many}\n")
    said = mistake(command, "r.yaml", "--out=o")
    for part in (
        "unknown key 'data.nmae'; did you mean 'data.name'",
        "unknown key 'trianing'; did you mean 'training",
        "unknown key 'student.nme'; did you mean 'student.name'",
        "training.epochs is 'many': expected a whole number",
        "student.name is missing",
    ):
        assert part in said
    assert not Path("o").exists()


def test_models_and_taps_that_do_not_exist(mistake, tiny_file):
    for arguments, message in (
        (["--student.name=timm:resnt18"], "did you mean 'resnet18'"),
        (["--student.name=torchvision:resnt18"], "did you mean 'resnet18'"),
        (["--teacher.name=matchdistill.models:small_resnt"], "did you mean 'small_resnet'"),
        (["--teacher.name=matchdistil.models:small_resnet"], "did you mean 'matchdistill'"),
        (
            ["--distillation.taps=[[layer1.relu2:input, layer1.relu3:input]]"],
            "no module 'layer1.relu3'; did you mean 'layer1.relu2'",
        ),
        (["--student.options={widht: 3}"], "it takes num_classes, width, in_channels"),
    ):
        assert message in mistake("fit", tiny_file, "--out=o", "--teacher.weights=null", *arguments)
        assert not Path("o").exists()


def test_weights_of_another_architecture(mistake, tiny_file):
    torch.save(small_resnet(width=5).state_dict(), "wide.pt")
    torch.save(torch.nn.Linear(3, 2).state_dict(), "linear.pt")
    torch.save(small_resnet(num_classes=7, width=4).state_dict(), "seven.pt")
    Path("text.pt").write_text("no weights")
    for file, message in (
        ("wide.pt", "wide.pt does not fit SmallResNet"),
        ("linear.pt", "this looks like another architecture"),
        ("seven.pt", "these weights are for 7 classes, the model has 10"),
        ("text.pt", "text.pt is refused: not a weights file of tensors and plain values alone"),
        ("absent.pt", "teacher.weights absent.pt: there is no such file"),
    ):
        assert message in mistake("fit", tiny_file, "--out=o", f"--teacher.weights={file}")
        assert not Path("o").exists()


def test_class_counts(mistake, tiny_file, monkeypatch):
    Path("mine.py").write_text(
        "from matchdistill.models import small_resnet\ndef seven():\n    return small_resnet(num_classes=7, width=2)\n"
    )
    said = mistake("fit", tiny_file, "--out=o", "--student.name=mine:seven", "--student.options={}")
    assert "the student gives (2, 7) for 2 images, but the data has 10 classes" in said
    assert not Path("o").exists()


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed").absolute(),)


@pytest.mark.parametrize("kind", ["torch", "pickle", "legacy"])
def test_weights_that_would_execute_code(mistake, tiny_file, kind):
    content = {**small_resnet(width=4).state_dict(), "more": Payload()}
    if kind == "pickle":
        Path("teacher.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, "teacher.pt", _use_new_zipfile_serialization=kind == "torch")
    for arguments in (["--teacher.weights=teacher.pt"], ["--student.weights=teacher.pt"]):
        assert "teacher.pt" in mistake("fit", tiny_file, "--out=o", *arguments)
        assert not Path("o").exists()
        assert not Path("executed").exists()


def write_images(root):
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("bee", "wasp")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 20), (100 * label, 20 * number, 0)).save(root / split / name / f"{number}.png")


@pytest.fixture
def insects(tiny_file):
    """A recipe of an image folder, in a file."""
    write_images(Path("insects"))
    values = yaml.safe_load(tiny_file.read_text())
    values["data"] = {"name": "folder", "root": "insects", "image_size": 16, "batch_size": 8}
    values["distillation"]["method"] = "none"
    Path("insects.yaml").write_text(yaml.safe_dump(values))
    return "insects.yaml"


def test_image_folders(mistake, insects):
    assert "image folder nowhere does not exist" in mistake("fit", insects, "--data.root=nowhere", "--out=o")
    Path("empty").mkdir()
    assert "empty has no folder train" in mistake("fit", insects, "--data.root=empty", "--out=o")
    Path("empty/train").mkdir()
    assert "has no class folders" in mistake("fit", insects, "--data.root=empty", "--out=o")
    Path("insects/val/wasp").rename("insects/val/hornet")
    assert "must have the same class folders" in mistake("fit", insects, "--out=o")
    assert not Path("o").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_streams_that_do_not_have_every_character(tiny_file, encoding, tmp_path):
    command = [
        sys.executable,
        "-m",
        "matchdistill",
        "compare",
        tiny_file.name,
        "--methods=none",
        "--seeds=2",
        "--out=ö",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode(encoding)
    assert ("+- half of the 95%" if encoding == "ascii" else "± half of the 95%") in said
    assert ("results: \\xf6/metrics" if encoding == "ascii" else "results: ö/metrics") in said


def test_closed_streams(tiny_file, tmp_path):
    command = f"{sys.executable} -m matchdistill fit {tiny_file.name} --distillation.method=none --out=o >&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "o" / "metrics.json").is_file()


@pytest.mark.pages
def test_names_that_are_not_utf_8(insects):
    """Of the data, of a class and of an image, which all come into the files of the run and onto its page."""
    for place in (b"insects/train/wasp", b"insects/val/wasp"):
        os.rename(place, place[:-4] + b"gu\xeape")  # noqa: PTH104
    os.rename(b"insects", b"insect\xe9s")  # noqa: PTH104
    os.rename(b"insect\xe9s/val/gu\xeape/0.png", b"insect\xe9s/val/gu\xeape/\xff.png")  # noqa: PTH104
    Path(os.fsdecode(b"insect\xe9s/val/gu\xeape/\xff.png")).write_bytes(b"damaged")
    options = [b"--data.root=insect\xe9s", "--data.skip_corrupt=true", "--distillation.method=none", "--out=o"]
    command = [sys.executable, "-m", "matchdistill", "fit", insects, *options]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"could not" not in done.stderr
    assert "gu\\xeape" in Path("o/report.html").read_text(encoding="utf-8")
    assert json.loads(Path("o/model.json").read_text())["class_names"][-1] == "gu\\xeape"
    command = [sys.executable, "-m", "matchdistill", "validate", "o", "--teacher.name=null"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_corrupt_images(mistake, insects, capfd):
    damaged = Path("insects/train/wasp/3.png")
    damaged.write_bytes(damaged.read_bytes()[:40])
    said = mistake("fit", insects, "--out=o")
    assert f"image {damaged} is not an image that Pillow can read" in said
    assert "--data.skip_corrupt=true" in said
    assert not Path("o/metrics.json").exists()
    with pytest.warns(UserWarning, match=f"image {damaged} is not an image that Pillow can read and is skipped"):
        assert cli.main(["fit", insects, "--out=o", "--resume", "--data.skip_corrupt=true"]) == 0
    assert json.loads(Path("o/metrics.json").read_text())["corrupt_images"] == [str(damaged)]


def test_folders_that_hold_a_run(run, mistake, tiny_file):
    run("fit", tiny_file, "--out=o", "--distillation.method=none")
    before = {path: path.stat().st_mtime_ns for path in Path("o").rglob("*")}
    assert "o already holds a run: continue it with --resume, or choose another --out" in mistake(
        "fit", tiny_file, "--out=o", "--distillation.method=none"
    )
    for arguments, changed in ((["--training.lr=0.9"], "training"), (["--distillation.method=kd"], "distillation")):
        said = mistake("fit", tiny_file, "--out=o", "--distillation.method=none", "--resume", *arguments)
        assert f"o/recipe.yaml differs in {changed}: resume with the same values" in said
    assert "o already holds a run" in mistake("compare", tiny_file, "--out=o", "--methods=none")
    assert {path: path.stat().st_mtime_ns for path in Path("o").rglob("*")} == before
    Path("file").write_text("")
    assert "file" in mistake("fit", tiny_file, "--out=file", "--distillation.method=none")
    assert Path("file").read_text() == ""


@pytest.mark.parametrize("spoil", ["truncated", "malicious", "pickle"])
def test_checkpoints_that_are_refused(run, mistake, tiny_file, spoil):
    arguments = ("fit", tiny_file, "--out=o", "--distillation.method=none")
    run(*arguments)
    path = Path("o/last.ckpt")
    Path("o/metrics.json").unlink()
    if spoil == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif spoil == "malicious":
        torch.save({**torch.load(path, weights_only=True), "more": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps(Payload()))
    content = path.read_bytes()
    said = mistake(*arguments, "--resume")
    assert ("o/last.ckpt: not a checkpoint, or a damaged" if spoil == "truncated" else "o/last.ckpt is refused") in said
    assert "weights_only" not in said
    assert "last.ckpt" in mistake("validate", "o/last.ckpt")
    assert not Path("executed").exists()
    assert not Path("o/metrics.json").exists()
    assert path.read_bytes() == content


@pytest.mark.parametrize("place", ["__init__", "forward"])
@pytest.mark.parametrize("error", ["KeyError", "TypeError", "AttributeError"])
def test_a_network_of_the_user_that_fails(mistake, tiny_file, monkeypatch, place, error):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    Path("failing.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.at('__init__')\n"
        "    def forward(self, images):\n        self.at('forward')\n"
        f"    def at(self, place):\n        if place == '{place}':\n            raise {error}('depth')\n"
    )
    said = mistake("fit", tiny_file, "--out=o", "--student.name=failing:Net", "--student.options={}")
    assert ("'failing:Net' cannot be built" if place == "__init__" else "the student does not take images") in said
    assert f"{error}: " in said
    assert not Path("o").exists()


def test_a_section_from_a_file(run, tiny_file):
    Path("data.yaml").write_text("train_limit: 40\n")
    run("fit", tiny_file, "--out=o", "--distillation.method=none", "--data", "data.yaml")
    data = yaml.safe_load(Path("o/recipe.yaml").read_text())["data"]
    assert data["train_limit"] == 40
    assert "__path__" not in data


def test_a_loss_that_is_not_finite(mistake, tiny_file):
    said = mistake("fit", tiny_file, "--out=o", "--distillation.method=none", "--training.lr=1e30")
    assert re.search(r"the loss 'task' is (nan|inf) at step 1 \(epoch 0\)", said)
    assert not Path("o/last.ckpt").exists()
    assert not Path("o/metrics.json").exists()


def test_a_full_disk(mistake, tiny_file, monkeypatch):
    saved = []
    write = AtomicCheckpoints.save_checkpoint

    def save(self, content, path, storage_options=None):
        if saved:
            monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saved.append(path)
        write(self, content, path, storage_options)

    monkeypatch.setattr(AtomicCheckpoints, "save_checkpoint", save)
    assert "No space left on device" in mistake("fit", tiny_file, "--out=o", "--distillation.method=none")
    assert torch.load("o/last.ckpt", weights_only=True)["epoch"] == 0
    assert [name for name in left(Path("o")) if "/." in f"/{name}"] == []


def test_a_failing_run_of_a_comparison(mistake, tiny_file, monkeypatch):
    def sometimes(recipe, out, resume=False, quiet=False):
        if recipe.distillation.method == "kd":
            raise ValueError("bad\nluck")
        return fit(recipe, out, resume, quiet)

    monkeypatch.setattr(compare_module, "fit", sometimes)
    said = mistake("compare", tiny_file, "--out=o", "--methods=none,kd", "--seeds=1")
    assert "1 of 2 runs failed, the others are kept in o; " in said
    assert "ValueError: bad luck (kd seed 0)" in said
    assert Path("o/cells/none/seed0/metrics.json").exists()
    assert not Path("o/metrics.json").exists()


def test_exports_that_fail_leave_no_file(run, mistake, tiny_file):
    Path("mine.py").write_text(
        "import torch\nfrom matchdistill.models.small import SmallResNet\n"
        "class Branching(SmallResNet):\n"
        "    def forward(self, images):\n"
        "        logits = super().forward(images)\n"
        "        return logits if images.sum().item() > 0.5 else logits.cumsum(1)\n"
        "class Another(SmallResNet):\n"
        "    def forward(self, images):\n"
        "        return super().forward(images) + (1.0 if torch.compiler.is_exporting() else 0.0)\n"
        "def branching(num_classes): return Branching(num_classes, 2, 3)\n"
        "def another(num_classes): return Another(num_classes, 2, 3)\n"
    )
    sys.modules.pop("mine", None)
    for name, message in (("branching", "cannot take the model"), ("another", "outputs differ by")):
        run(
            "fit",
            tiny_file,
            f"--out={name}",
            "--distillation.method=none",
            *(f"--student.name=mine:{name}", "--student.options={}", "--training.epochs=1"),
        )
        for kind in ("onnx", "pt2"):
            assert message in mistake("export", name, f"--format={kind}", "--trust")
        assert left(Path(name, "export")) == []


def test_long_errors_are_cut(mistake, monkeypatch):
    def compiler(arguments):
        raise RuntimeError(" ".join(arguments) + "\n" + 10_000 * "in a header\n")

    monkeypatch.setitem(cli.COMMANDS, "taps", compiler)
    said = mistake("taps", "what matters")
    assert said.startswith("matchdistill: error: what matters in a header in a")
    assert said.endswith("… (MATCHDISTILL_DEBUG=1 shows the rest)\n")
    assert 1_000 < len(said) < 1_100


def test_debugging_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setenv("MATCHDISTILL_DEBUG", "1")
    with pytest.raises(ValueError, match="no recipe 'nothing'"):
        cli.main(["fit", "nothing"])


@pytest.mark.slow
def test_the_command_itself(tiny_file, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def call(*arguments, command=(str(Path(sys.executable).parent / "matchdistill"),)):
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=300, check=False, env=environment
        )

    assert call("--version", command=(sys.executable, "-m", "matchdistill")).stdout == call("--version").stdout
    done = call("fit", str(tiny_file), "--out=o", "--distillation.method=mgd-amp+kd")
    assert (done.returncode, done.stderr) == (0, "")
    done = call("fit", str(tiny_file), "--out=o2", "--training.lr=1e30")
    assert done.returncode == 2
    assert re.fullmatch(r"matchdistill: error: [^\n]* at step 1 \(epoch 0\)[^\n]*\n", done.stderr)
    done = call("export", "o", "--format=onnx")
    assert (done.returncode, done.stderr) == (0, "")
    torch.save({"more": Payload()}, "teacher.pt")
    done = call("fit", str(tiny_file), "--out=o3", "--teacher.weights=teacher.pt")
    assert done.returncode == 2
    assert re.fullmatch(r"matchdistill: error: teacher.pt is refused[^\n]*\n", done.stderr)
    assert not Path("executed").exists()


@pytest.mark.slow
def test_the_command_is_killed_and_resumed(tiny_file, folder):
    """By another process, whenever that happens to be."""
    arguments = ["fit", str(tiny_file), "--distillation.method=mgd-rd+kd", "--training.epochs=60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "matchdistill", *arguments]
    assert subprocess.run([*command, "--out=whole"], env=environment, capture_output=True, check=False).returncode == 0
    process = subprocess.Popen([*command, "--out=o"], env=environment, stdout=subprocess.DEVNULL)
    while not Path("o/last.ckpt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path("o/metrics.json").exists()
    resumed = subprocess.run([*command, "--out=o", "--resume"], env=environment, capture_output=True, check=False)
    assert (resumed.returncode, resumed.stderr) == (0, b"")
    first, second = (torch.load(f"{out}/last.ckpt", weights_only=True) for out in ("o", "whole"))
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    assert first["results"] == second["results"]


SHORT = ("--training.epochs=1", "--distillation.method=none")


@pytest.mark.parametrize("name", ["runs[/old]", "a$HOME", "ünï ß", ":smile:", "a::b", "./~/z", "a*?", "~/run"])
def test_paths_are_what_they_say(run, tiny_file, monkeypatch, folder, name):
    """Of `~` a home is made, nothing of anything else, in every command and by Lightning too."""
    monkeypatch.setenv("HOME", str(folder / "home"))
    out = folder / "home" / "run" if name == "~/run" else folder / name
    printed = run("fit", tiny_file, f"--out={name}", *SHORT)
    told = str(out) if name.startswith("~") else str(Path(name))
    assert "".join(told.split()) in "".join(printed.split())
    assert {"last.ckpt", "recipe.yaml"} <= set(left(out))
    assert {path.name for path in (out / "logs").iterdir()} == {"tensorboard", "version_0"}
    assert "epoch 1/1" not in run("fit", tiny_file, f"--out={name}", *SHORT, "--resume")
    exported = f"{name}/x/model.safetensors"
    assert "model.safetensors" in run("export", name, f"--out={exported}")
    assert left(out / "x") == ["config.json", "model.safetensors", "model_card.md"]
    assert "student" in run("validate", exported.removesuffix("/x/model.safetensors"))
    run("report", name, f"--out={name}/page.html")
    assert (out / "page.html").is_file()
    torch.save(small_resnet(width=2).state_dict(), out / "w.pt")
    assert "top-1" in run("fit", tiny_file, "--out=other", *SHORT, f"--student.weights={name}/w.pt")
    beside = {path.name for path in folder.iterdir()} - {"tiny.yaml", "other", "home", out.relative_to(folder).parts[0]}
    assert beside == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "quickstart", "--out", ""),
        ("fit", "quickstart", "--out="),
        ("fit", ""),
        ("fit", "quickstart", "--data.root="),
        ("fit", "quickstart", "--student.weights", ""),
        ("compare", "quickstart", "--out", ""),
        ("report", ""),
        ("report", "x", "--out="),
        ("export", ""),
        ("export", "x", "--out", ""),
        ("validate", ""),
        ("taps", "", "timm:resnet18"),
        ("recipes", "copy", "quickstart", ""),
    ],
)
def test_empty_values_are_refused(mistake, arguments):
    assert "is given an empty value: is a variable of the shell not set?" in mistake(*arguments)
    assert left(Path()) == []


def test_empty_values_in_a_recipe_are_refused(mistake):
    Path("r.yaml").write_text('data: {name: folder, root: ""}\nstudent: {name: "timm:resnet18", weights: ""}\n')
    said = mistake("fit", "r.yaml")
    assert "data.root is empty" in said
    assert "student.weights is empty" in said


def test_a_home_of_nobody(mistake):
    assert "there is no home of ~nobody-has-this-name" in mistake("fit", "quickstart", "--out=~nobody-has-this-name/x")


def test_a_folder_of_somebody_else_runs_no_code(run, mistake, tiny_file):
    """What export and validate read names functions: only those of known libraries are called."""
    run("fit", tiny_file, "--out=o", *SHORT)
    described = json.loads(Path("o/model.json").read_text())
    Path("o/model.json").write_text(
        json.dumps(described | {"name": "os:system", "options": {"command": "touch executed"}})
    )
    values = yaml.safe_load(Path("o/recipe.yaml").read_text())
    said = mistake("export", "o")
    assert "o: it builds its network by importing 'os' and calling 'system' of it" in said
    for role in ("student", "teacher"):
        changed = {**values, role: {**values[role], "name": "os:system", "options": {"command": "touch executed"}}}
        Path("o/recipe.yaml").write_text(yaml.safe_dump(changed))
        assert "--trust" in mistake("validate", "o")
    # Weights of a package are found without importing what is around it.
    Path("around/inner").mkdir(parents=True)
    Path("around/__init__.py").write_text("open('executed', 'w')")
    Path("o/recipe.yaml").write_text(
        yaml.safe_dump({**values, "teacher": {**values["teacher"], "weights": "around.inner:w.pt"}})
    )
    assert "around.inner" in mistake("validate", "o")
    run("report", "o")
    assert not Path("executed").exists()


def test_code_of_ones_own_is_trusted_by_name(run, mistake, tiny_file):
    Path("mine_too.py").write_text("from matchdistill.models import small_resnet as net\n")
    run("fit", tiny_file, "--out=o", *SHORT, "--student.name=mine_too:net")
    for command in ("export", "validate"):
        assert "importing 'mine_too' and calling 'net'" in mistake(command, "o")
        assert run(command, "o", "--trust")


COMMAND = [sys.executable, "-m", "matchdistill"]


def begun(*arguments, until, **options):
    """A command in a process of its own that has printed some words."""
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, text=True, **options)
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError("it has ended before")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_end(tiny_file, number, code):
    arguments = ("fit", tiny_file, "--out=o", "--training.epochs=300", "--distillation.method=none")
    process = begun(
        *arguments,
        until="epoch 3/300",
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.count("\n") == 1
    assert error.startswith("matchdistill: ")
    assert "--resume" in error
    assert not list(Path("o").glob(".*"))
    assert torch.load("o/last.ckpt", weights_only=True)["epoch"] >= 1
    assert not Path("o/metrics.json").exists()


def test_a_second_writer_is_refused(tiny_file, mistake):
    arguments = ("fit", tiny_file, "--out=o", "--training.epochs=300", "--distillation.method=none")
    process = begun(*arguments, until="epoch 2/300")
    try:
        for more in ((), ("--resume",), ("--seed=4",)):
            assert f"o is in use by process {process.pid} on " in mistake(*arguments, *more)
        assert "o is in use by process" in mistake("compare", tiny_file, "--out=o")
        # Reading is no writing.
        assert cli.main(["report", "o"]) == 0
        assert cli.main(["validate", "o/last.ckpt"]) == 0
        assert "holds no finished run" in mistake("export", "o")
    finally:
        process.kill()
        process.wait()
    assert cli.main([*map(str, arguments[:3]), *SHORT, "--training.epochs=300", "--resume", "--print_config"]) == 0
    assert Path("o/.lock").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "3"},
        {"LOCAL_RANK": "2"},
        {
            **{"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "0"},
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"},
        },
        {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "sweep",
            "SLURM_NTASKS": "4",
            "SLURM_NTASKS_PER_NODE": "4",
            "SLURM_NNODES": "1",
            "SLURM_NODEID": "0",
            "SLURM_PROCID": "3",
            "SLURM_LOCALID": "3",
        },
    ],
    ids=["RANK", "LOCAL_RANK", "torchrun", "SLURM"],
)
def test_a_rank_in_the_environment_of_a_single_process(tiny_file, environment):
    done = subprocess.run(
        [*COMMAND, "fit", str(tiny_file), "--out=o", *SHORT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 1/1" in done.stdout
    assert "page: o/report.html" in done.stdout
    assert {"recipe.yaml", "metrics.json", "model.json"} <= set(left(Path("o")))
    assert Path("o/logs/version_0/metrics.csv").read_text().count("\n") > 1
