"""Students to and from the Hub: the client is replaced where it sends, and what is sent is loaded from its own cache."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from matchdistill import Predictor, cli
from matchdistill.runs.hub import fetch
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.train import fit

hub = pytest.importorskip("huggingface_hub")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*LeafSpec")]

RESNET = "{embedding_size: 4, hidden_sizes: [4, 8, 16, 32], depths: [1, 1, 1, 1], layer_type: basic}"
STUDENTS = {
    "timm": ("--student.name=timm:test_resnet", "--student.options={}"),
    "transformers": ("--student.name=transformers:resnet", f"--student.options={RESNET}"),
    "own": (),
}

LABELS = ["heron", "wren"]


class Recorded:
    """The client of the Hub, at the boundary: what it is told to send, by name of a file."""

    def __init__(self) -> None:
        self.calls, self.files, self.fails, self.private = [], {}, None, None

    def __call__(self, **options):
        return self

    def create_repo(self, name, **options):
        if self.fails is not None:
            raise self.fails
        self.calls.append(("repository", name, options))
        if self.private is None:  # one that is there keeps what it is
            self.private = options["private"]

    def repo_info(self, name):
        return SimpleNamespace(private=self.private)

    def create_branch(self, name, **options):
        self.calls.append(("branch", name, options))

    def create_commit(self, name, operations, **options):
        self.calls.append(("commit", name, options))
        self.files = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}
        return SimpleNamespace(commit_url=f"https://hub/{name}/commit/1")


@pytest.fixture
def client(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(hub, "HfApi", recorded)
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    return recorded


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs by their networks' library, trained once; an export of each is made anew where it is needed."""
    return {}


@pytest.fixture
def run_of(runs, tiny, tmp_path_factory):
    def run_of(kind):
        if kind not in runs:
            place = tmp_path_factory.mktemp("runs")
            runs[kind] = place / kind
            limits = ["--training.epochs=1", "--distillation.method=none"]
            if kind == "transformers":  # of colored pictures, which its image processor prepares
                limits += ["--data.name=folder", f"--data.root={birds(place / 'birds')}", "--data.image_size=16"]
                limits += ["--data.batch_size=4", "--data.train_limit=8", "--data.val_limit=8"]
            fit(tiny(*STUDENTS[kind], *limits), runs[kind], quiet=True)
        return runs[kind]

    return run_of


def birds(root: Path) -> Path:
    """Colored pictures of two classes in folders."""
    chance = np.random.default_rng(0)
    for split, name in ((split, name) for split in ("train", "val") for name in LABELS):
        (root / split / name).mkdir(parents=True)
        for number in range(4):
            pixels = chance.integers(0, 255, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((70, 50)).save(tmp_path / "one.png")
    return tmp_path / "one.png"


def cached(home: Path, name: str, files: dict[str, bytes]) -> None:
    """Files as the Hub's client keeps what it has downloaded."""
    commit = hashlib.sha1(name.encode()).hexdigest()
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    for file, content in files.items():
        (repository / "snapshots" / commit / file).write_bytes(content)


def test_what_is_sent_is_what_loaders_need(client, run_of, tmp_path, picture, capsys):
    """Pushed, put into the client's cache, and loaded by each loader by its name in a process without a network."""
    folders = {}
    for kind in STUDENTS:
        folders[kind] = tmp_path / kind
        out = f"--out={folders[kind]}/model.safetensors"
        assert cli.main(["export", str(run_of(kind)), out, f"--push=me/{kind}"]) == 0, capsys.readouterr().err
        more = {"preprocessor_config.json"} if kind == "transformers" else set()
        assert client.files.keys() == {"README.md", "config.json", "model.safetensors"} | more
        cached(tmp_path / "home", f"me/{kind}", client.files)
    script = f"""
import json
import timm, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from matchdistill import Predictor
from PIL import Image
images = torch.load({str(tmp_path / "images.pt")!r})
found = {{}}
with torch.no_grad():
    for name in ("hf-hub:me/timm", "local-dir:{folders["timm"]}"):
        found[name] = timm.create_model(name, pretrained=True).eval()(images)
    for name in ("me/transformers", {str(folders["transformers"])!r}):
        model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=False).eval()
        found[name] = model(images).logits
assert list(model.config.id2label.values()) == {LABELS}
processor = AutoImageProcessor.from_pretrained("me/transformers")
found["pixels"] = processor(Image.open({str(picture)!r}), return_tensors="pt")["pixel_values"]
torch.save(found, {str(tmp_path / "found.pt")!r})
predicted = {{kind: Predictor.from_hub(f"me/{{kind}}", top=2)({str(picture)!r})[0] for kind in {list(STUDENTS)}}}
print(json.dumps({{kind: [each.labels, each.scores] for kind, each in predicted.items()}}))
"""
    images = torch.randn(3, 3, 16, 16)
    torch.save(images, tmp_path / "images.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    predicted = json.loads(done.stdout.splitlines()[-1])
    for kind, folder in folders.items():
        ours = Predictor(run_of(kind), top=2)
        for name in (each for each in found if each.endswith((f"me/{kind}", str(folder)))):
            with torch.no_grad():
                assert torch.equal(found[name], ours.network(images))
        for each in (ours, Predictor(folder, top=2)):
            (own,) = each(picture)
            assert predicted[kind] == [list(own.labels), pytest.approx(list(own.scores), abs=1e-6)]
    own = Predictor(run_of("transformers"))
    with Image.open(picture) as image:
        # Resized by another library, which rounds elsewhere.
        torch.testing.assert_close(found["pixels"][0], own.predicting.prepare(image), atol=0.05, rtol=0)


def test_a_commit_and_its_page(client, run_of, tmp_path, capsys):
    options = ("--private", "--revision=next", "--license=mit")
    out = tmp_path / "out"
    command = ["export", str(run_of("timm")), f"--out={out}/model.safetensors", "--push=me/bird", *options]
    assert cli.main(command) == 0
    assert [call[:2] for call in client.calls] == [(kind, "me/bird") for kind in ("repository", "branch", "commit")]
    made, branch, commit = (call[2] for call in client.calls)
    assert made == {"private": True, "exist_ok": True}
    assert (branch["branch"], commit["revision"]) == ("next", "next")
    assert re.fullmatch(r"test_resnet, by matchdistill [\d.]+", commit["commit_message"])
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/bird/commit/1"
    card = hub.ModelCard(client.files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    assert "hf-hub:me/bird" in card.text
    assert "--push" not in card.text
    assert "USER/NAME" not in card.text
    page = hub.ModelCard.load(out / "model_card.md")
    assert page.data.license == "mit"
    assert "--push USER/NAME" in page.text
    # A second push says the same, over its own files.
    assert cli.main([*command, "--message=again"]) == 0
    assert client.calls[-1][2]["commit_message"] == "again"


def test_a_repository_that_is_public_is_not_taken_for_a_private_one(client, run_of, tmp_path, capsys):
    client.private = False
    command = ["export", str(run_of("own")), f"--out={tmp_path}/out/model.safetensors", "--push=me/own"]
    assert cli.main([*command, "--private"]) == 2
    assert "me/own is there already and is public: leave out --private" in capsys.readouterr().err
    assert not client.files
    assert cli.main(command) == 0
    assert client.files


def test_only_what_is_written_now_is_sent(client, run_of, tmp_path, capsys):
    run, out = str(run_of("own")), tmp_path / "out"
    for name, kind in (("model.onnx", "onnx"), ("b.safetensors", "safetensors"), ("model.safetensors", "onnx")):
        assert cli.main(["export", run, f"--out={out}/{name}", f"--format={kind}", "--push=me/own"]) == 2
        said = f"--push uploads model.safetensors, but this writes {name} as {kind}: leave out --format"
        assert said in capsys.readouterr().err
    assert not client.calls
    assert not out.exists()
    out.mkdir()
    for name in ("model.onnx", "model.pt2", "preprocessor_config.json"):  # of whatever run
        (out / name).write_text("{}")
    assert cli.main(["export", run, f"--out={out}/model.safetensors", "--push=me/own"]) == 0
    assert client.files.keys() == {"README.md", "config.json", "model.safetensors"}
    page = client.files["README.md"].decode()
    assert "InferenceSession" not in page
    assert "torch.export" not in page


def test_a_dry_run_sends_nothing_and_needs_no_token(client, run_of, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    out = tmp_path / "out"
    command = ["export", str(run_of("own")), f"--out={out}/model.safetensors", "--push=me/own", "--private"]
    assert cli.main([*command, "--dry_run"]) == 0
    assert not client.calls
    told = capsys.readouterr().out
    assert "not sent: me/own (private), 'small_resnet, by matchdistill" in told
    listed = re.findall(r"^  (\S+): ([\d,]+) bytes$", told, re.MULTILINE)
    assert {name: int(size.replace(",", "")) for name, size in listed} == {
        name: (out / name).stat().st_size for name in ("README.md", "config.json", "model.safetensors")
    }
    assert load_file(out / "model.safetensors")
    assert cli.main(command) == 2
    assert "there is no token of the Hugging Face Hub: log in by hf auth login" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "see that the name is right, and log in by hf auth login"),
        (503, "try again later"),
        (None, "check the network connection"),
    ],
)
def test_what_the_hub_says_is_one_line(client, run_of, tmp_path, capsys, status, said):
    client.fails = OSError("it was\nnot to be") if status is None else RuntimeError("no")
    if status is not None:
        client.fails.response = SimpleNamespace(status_code=status)
    out = f"--out={tmp_path}/out/model.safetensors"
    assert cli.main(["export", str(run_of("own")), out, "--push=me/own"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "me/own cannot be uploaded (" in line
    assert said in line


@pytest.mark.parametrize("name", ["own", "me/own/more", "me/o n", "-me/own", ""])
def test_names_that_are_none(name, client, tmp_path):
    with pytest.raises(ValueError, match="is not the name of a repository on the Hub: expected USER/NAME"):
        fetch(name)


def test_what_cannot_be_fetched(monkeypatch, tmp_path, run_of, client):
    with pytest.raises(ValueError, match="code that comes from the Hub is not run"):
        Predictor.from_hub("me/own", trust=True)
    with pytest.raises(ValueError, match="is not the name of a repository on the Hub"):
        Predictor.from_hub("own", trust=False)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(ValueError, match=r"me/own holds no student, it has no config.json and no model.safetensors"):
        fetch("me/own")

    def unreachable(name, **options):
        raise OSError("no route")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(
        ValueError, match=r"me/own at next cannot be fetched .*no route.*: check the network connection"
    ):
        Predictor.from_hub("me/own", revision="next")


def test_files_of_others_are_kept(client, run_of, tmp_path, capsys):
    """Only those that an export would write are in its way."""
    run, out = str(run_of("transformers")), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("my project")
    command = ["export", run, f"--out={out}/model.safetensors"]
    assert cli.main([*command, "--push=me/it"]) == 2
    assert "README.md exists already and is no export's" in capsys.readouterr().err
    (out / "preprocessor_config.json").write_text("{}")
    assert cli.main(command) == 2
    assert "preprocessor_config.json exists already and is no export's" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "preprocessor_config.json"]
    (out / "preprocessor_config.json").unlink()
    for _ in range(2):
        assert cli.main(command) == 0
    assert (out / "README.md").read_text() == "my project"


def test_a_student_of_a_saved_folder_is_exported_again(tiny, tmp_path, capsys):
    """Its config.json has its type for a name, and not the folder that it was built from."""
    import transformers

    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8, 16, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).save_pretrained(tmp_path / "saved")
    student = (f"--student.name=transformers:{tmp_path / 'saved'}", "--student.options={}")
    fit(tiny(*student, "--training.epochs=1", "--distillation.method=none"), tmp_path / "run", quiet=True)
    for _ in range(2):
        assert cli.main(["export", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    path = tmp_path / "run" / "export" / "config.json"
    assert json.loads(path.read_text())["name"] == "transformers:resnet"
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": "transformers:vit"}))
    assert cli.main(["export", str(tmp_path / "run")]) == 2
    said = "describes another student, transformers:vit, than transformers:resnet"
    assert said in capsys.readouterr().err


def exported_elsewhere(recipe, saved, tmp_path):
    """The export of a student that a saved folder names, which is not there any more; and what the run predicts."""
    picture = tmp_path / "one.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(picture)
    fit(recipe, tmp_path / "run", quiet=True)
    expected = Predictor(tmp_path / "run")(picture)
    assert cli.main(["export", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "export").rename(tmp_path / "elsewhere")
    saved.rename(tmp_path / "moved")
    return tmp_path / "elsewhere", picture, expected


def test_a_backbone_of_a_saved_folder_is_exported_whole(tmp_path, one_thread):
    import transformers

    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8, 16, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    named = {"id2label": dict(enumerate("abcde")), "label2id": {text: number for number, text in enumerate("abcde")}}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, **named))
    model.save_pretrained(tmp_path / "saved")
    birds(tmp_path / "birds")
    given = {
        "task": "features",
        "data": {"name": "folder", "root": str(tmp_path / "birds"), "image_size": 32, "batch_size": 4},
        "student": {"name": f"transformers:{tmp_path / 'saved'}", "weights": "pretrained"},
        "training": {"epochs": 1, "lr": 0.01},
        "teacher": {"name": "matchdistill.models:small_resnet", "options": {"width": 4}},
        "trainer": {"accelerator": "cpu", "loggers": []},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(given))
    export, picture, expected = exported_elsewhere(load_recipe(tmp_path / "r.yaml"), tmp_path / "saved", tmp_path)
    (found,), (own,) = Predictor(export)(picture), expected
    assert found.features == pytest.approx(own.features, abs=1e-6)
    config = json.loads((export / "config.json").read_text())
    assert config["name"] == "transformers:resnet"
    assert list(config["id2label"].values()) == list("abcde")  # of its own head, which is there still
    page = (export / "model_card.md").read_text()
    assert str(tmp_path / "saved") not in page.partition("## Use")[2]


def test_a_detector_of_a_saved_folder_is_exported_whole(small, tmp_path, capsys):
    """It loads by transformers too, with its image processor, and finds the same."""
    import transformers

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    few = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "layers")}
    few |= {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5}
    body = transformers.ResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=body, **few))
    model.save_pretrained(tmp_path / "saved")
    transformers.DetrImageProcessor(image_mean=[0.4] * 3).save_pretrained(tmp_path / "saved")
    student = [f"--student.name=transformers:{tmp_path / 'saved'}", "--student.options={min_size: 64, max_size: 96}"]
    recipe = small(*student, "--distillation.method=none", "--training.epochs=1")
    export, picture, expected = exported_elsewhere(recipe, tmp_path / "saved", tmp_path)
    (found,), (own,) = Predictor(export)(picture), expected
    torch.testing.assert_close(torch.tensor(found.boxes), torch.tensor(own.boxes))
    assert found.labels == own.labels
    page = (export / "model_card.md").read_text()
    assert 'AutoModelForObjectDetection.from_pretrained("USER/NAME")' in page

    loaded = transformers.AutoModelForObjectDetection.from_pretrained(export).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(export)
    inputs = processor(Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        (theirs,) = processor.post_process_object_detection(loaded(**inputs), 0.0, [(40, 60)])
    order = theirs["scores"].argsort(descending=True)
    # Resized by another library, which rounds elsewhere.
    assert theirs["scores"][order].tolist() == pytest.approx(own.scores, abs=0.02)
    assert {loaded.config.id2label[label] for label in theirs["labels"].tolist()} == set(own.labels)


def test_a_folder_that_names_a_function_runs_none(client, run_of, tmp_path, monkeypatch):
    assert cli.main(["export", str(run_of("own")), f"--out={tmp_path}/out/model.safetensors"]) == 0
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "name": "theirs:net"}))
    asked = {}
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **options: asked.update(options) or str(tmp_path / "out")
    )
    with pytest.raises(ValueError, match="it builds its network by importing 'theirs'"):
        Predictor.from_hub("me/own")
    assert asked["allow_patterns"] == ["config.json", "model.safetensors"]
