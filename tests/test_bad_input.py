"""Every kind of bad input that we know, and what each gets: one line that says what is wrong, and exit code 2.

`python tests/test_bad_input.py` writes the list as docs/bad-input.md, which docs/reliability.md includes.
"""

import json
import os
import shutil
import sys
import tarfile
import unicodedata
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from matchdistill import cli
from matchdistill.models import small_resnet

PAGE = Path(__file__).parents[1] / "docs" / "bad-input.md"
NET = "matchdistill.models:small_resnet"
RECIPE: dict[str, Any] = {
    "data": {"train_limit": 40, "val_limit": 20, "batch_size": 20},
    "student": {"name": NET, "options": {"width": 2}},
    "training": {"epochs": 1, "lr": 0.05},
    "distillation": {"method": "none"},
    "trainer": {"accelerator": "cpu"},
}
FIT = ("fit", "r.yaml", "--out=out")


class Case(NamedTuple):
    """A kind of bad input.

    Attributes:
        group: heading of the list.
        given: what is given, in words.
        said: what the one line says of it.
        command: what is run.
        make: makes the files that it takes, in the working directory.
    """

    group: str
    given: str
    said: str
    command: Sequence[str]
    make: Callable[[], object] = lambda: None


def recipe(given: str, said: str, content: str | bytes) -> Case:
    text = content if isinstance(content, bytes) else content.encode()
    return Case("Recipes", given, said, FIT, lambda: Path("r.yaml").write_bytes(text))


def option(given: str, said: str) -> Case:
    return Case("Settings", f"`--{given}`", said, (*FIT, f"--{given}"))


def line(command: str, said: str) -> Case:
    return Case("Command lines", f"`matchdistill {command}`", said, command.split())


def weights(given: str, said: str, make: Callable[[Path], object]) -> Case:
    return Case("Weights", given, said, (*FIT, "--student.weights=w.pt"), lambda: make(Path("w.pt")))


def saved(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    return lambda path: torch.save(change(small_resnet(width=2).state_dict()), path)


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return saved(lambda state: {key: change(value) if "num_b" not in key else value for key, value in state.items()})


class Call:
    """Pickled as the call of a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1",)


def write_images() -> None:
    for place in ("train/ant", "train/bee", "val/ant", "val/bee"):
        Path("images", place).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 20), (90 * number, 0, 0)).save(f"images/{place}/{number}.png")


def images(given: str, said: str, change: Callable[[Path], object], *options: str) -> Case:
    data = {"name": "folder", "root": "images", "image_size": 16, "batch_size": 2}
    make = lambda: (write_images(), change(Path("images")), write_recipe(data=data))  # noqa: E731
    return Case("Image folders", given, said, FIT + options, make)


def table(given: str, said: str, content: str, *options: str) -> Case:
    """A table of the images in class folders."""
    data = {"name": "csv", "root": "images/t.csv", "image_size": 16, "batch_size": 2}
    make = lambda: (write_images(), Path("images/t.csv").write_text(content), write_recipe(data=data))  # noqa: E731
    return Case("Tables of images", given, said, FIT + options, make)


def labels(given: str, said: str, label: str) -> Case:
    """A table of images with several labels, the first of which is changed."""
    case = table(given, said, TABLE.replace(",ant,train", f",{label},train").replace(",ant,val", ",bee,val"))
    return case._replace(command=(*case.command, "--task=multilabel"))


def shard(given: str, said: str, files: Sequence[str], *options: str) -> Case:
    """A shard of files that all have the same content."""

    def make() -> None:
        Path("content").write_text("0")
        with tarfile.open("s.tar", "w") as archive:
            for name in files:
                archive.add("content", name)
        write_recipe(data={"name": "webdataset", "root": "s.tar", "image_size": 16, "batch_size": 2})

    return Case("Shards", given, said, FIT + options, make)


def saved_set(given: str, said: str, *options: str) -> Case:
    """Options of a data set of Hugging Face that is saved."""

    def make() -> None:
        from datasets import ClassLabel, Dataset, DatasetDict, Features
        from datasets import Image as ImageColumn

        write_images()
        features = Features(
            image=ImageColumn(), label=ClassLabel(names=["ant"]), note=ClassLabel(names=["good", "bad"])
        )
        rows = {"image": ["images/train/ant/0.png"], "label": [0], "note": [0]}
        DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk("set")
        write_recipe(data={"name": "datasets", "root": "set", "image_size": 16, "batch_size": 2})

    return Case("Data sets of Hugging Face", given, said, FIT + options, make)


def own(given: str, said: str, expression: str, *options: str) -> Case:
    """What a function of the user's own returns."""

    def make() -> None:
        code = f"from PIL import Image\nRED = Image.new('RGB', (20, 20), 'red')\ndef birds(): return {expression}\n"
        Path("ownbirds.py").write_text(code)
        sys.modules.pop("ownbirds", None)
        sys.path_importer_cache.clear()
        write_recipe(data={"name": "ownbirds:birds", "image_size": 16, "batch_size": 2})

    return Case("Data sets of your own", given, said, FIT + options, make)


def coco(given: str, said: str, change: Callable[[dict[str, Any]], object], *options: str, **values: Any) -> Case:
    """A change of the training annotations, which may write the file itself."""

    def make() -> None:
        Path("coco/annotations").mkdir(parents=True)
        for split in ("val2017", "train2017"):
            Path("coco", split).mkdir()
            Image.new("RGB", (40, 30)).save(f"coco/{split}/a.png")
            box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 10]}
            content: dict[str, Any] = {
                "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
                "annotations": [{**box, "segmentation": [[5, 5, 25, 5, 25, 15]]}],
                "categories": [{"id": 1, "name": "bar"}],
            }
            path = Path(f"coco/annotations/instances_{split}.json")
            if split == "val2017" or change(content) is None:
                path.write_text(json.dumps(content))
        student = {"name": "torchvision:retinanet_resnet50_fpn", "options": values.get("student", {})}
        if "name" in values:
            student["name"] = values["name"]
        write_recipe(task="detection", data={"root": "coco", "batch_size": 1}, student=student)

    return Case("COCO files", given, said, FIT + options, make)


def pixels(given: str, said: str, change: Callable[[Path], object], *options: str) -> Case:
    """Images with masks of three classes."""

    def make() -> None:
        for split in ("train", "val"):
            for kind, mode in (("images", "RGB"), ("masks", "L")):
                Path("pixels", split, kind).mkdir(parents=True)
                for number in range(2):
                    Image.new(mode, (40, 30)).save(f"pixels/{split}/{kind}/{number}.png")
        Path("pixels/classes.txt").write_text("ground\ncross\ndisc\n")
        change(Path("pixels"))
        student = {"name": "torchvision:lraspp_mobilenet_v3_large"}
        write_recipe(task="segmentation", data={"root": "pixels", "crop": [32, 32], "batch_size": 2}, student=student)

    return Case("Masks of pixels", given, said, FIT + options, make)


def masked(
    value: int = 0, size: tuple[int, int] = (40, 30), mode: str = "L", name: str = "1.png"
) -> Callable[[Path], object]:
    return lambda root: Image.new(mode, size, value).save(root / "train/masks" / name)


ANNOTATIONS = Path("coco/annotations/instances_train2017.json")


def contrast(given: str, said: str, *options: str) -> Case:
    return Case("Momentum contrast", given, said, (*FIT, "--task=moco", "--objective.queue=40", *options))


def features(given: str, said: str, *options: str, change: Callable[[Path], object] = lambda root: None) -> Case:
    data = {"name": "folder", "root": "images", "image_size": 16, "batch_size": 2}
    values = {"task": "features", "teacher": RECIPE["student"], "distillation": {"method": "mgd-amp"}}
    make = lambda: (write_images(), change(Path("images")), write_recipe(data=data, **values))  # noqa: E731
    return Case("Features without labels", given, said, FIT + options, make)


def first(part: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content[part][0].update(changes)


def run(given: str, said: str, change: Callable[[Path], object], *command: str) -> Case:
    """A change of a finished run."""
    return Case("Folders of runs", given, said, command, lambda: change(Path("run")))


def edited(name: str, /, **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changes}))

    return change


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


def checkpoint(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / "metrics.json").unlink()
        content = torch.load(folder / "last.ckpt", weights_only=True)
        torch.save(change(content), folder / "last.ckpt")

    return damage


def write_recipe(**changes: Any) -> None:
    Path("r.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}))


TABLE = "path,label,split\n" + "".join(
    f"{split}/{name}/0.png,{name},{split}\n" for split in ("train", "val") for name in ("ant", "bee")
)
LABEL = "--data.label_column=label"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
)
RESUME = ("fit", "r.yaml", "--out=run", "--resume")
AGAIN = ("fit", "r.yaml", "--out=run")

CASES = [
    recipe("no YAML", "r.yaml is not YAML", "a: [1\nb: {"),
    recipe("a list", "expected a mapping of sections, got list", "- 1"),
    recipe("an empty file", "expected a mapping of sections, got NoneType", ""),
    recipe("an unknown key", "unknown key 'data.nmae'; did you mean 'data.name'", "data: {nmae: digits}"),
    recipe("a key that is there twice", "has the key 'data' twice", "data: {}\nstudent: {}\ndata: {seed: 1}"),
    recipe("aliases of aliases of aliases", "its aliases expand to more than 100000 values", BOMB),
    recipe("a list that holds itself", "contains itself through an alias", "a: &a [*a]"),
    recipe("lists in lists in lists ...", "it is nested too deeply", "a: " + "[" * 5000),
    recipe("a tag that makes an object", "could not determine a constructor", "a: !!python/object/apply:os.getcwd []"),
    recipe("a date", "it has a date, datetime.date(2026, 1, 1): expected numbers, text", "a: 2026-01-01"),
    recipe("another encoding than UTF-8 or UTF-16", "r.yaml is not YAML", "a: größer".encode("latin-1")),
    recipe("a megabyte", "characters, more than 1000000", "#" * 1_000_001),
    recipe("a number where a section is", "trainer is 3: expected a mapping of accelerator", "trainer: 3"),
    recipe("a list as the task", "task is ['a']: expected", "task: [a]"),
    recipe(
        "null where there must be a number",
        "training.momentum is None: expected a number",
        "training: {momentum: null}",
    ),
    recipe(
        "text where there must be a number", "training.lr is 'high': expected a number or null", "training: {lr: high}"
    ),
    recipe("no student", "student.name is missing: name the network to train", "distillation: {method: none}"),
    recipe(
        "a method without its teacher",
        "method 'kd' needs a teacher",
        f"student: {{name: '{NET}'}}\ndistillation: {{method: kd}}",
    ),
    recipe(
        "infinity in a model's options",
        "student.options has a number that is not finite",
        f"student: {{name: '{NET}', options: {{width: .inf}}}}",
    ),
    option("training.lr=.nan", "training.lr is nan: expected a finite number of more than 0"),
    option("training.lr=.inf", "training.lr is inf: expected a finite number of more than 0"),
    option("training.momentum=1", "training.momentum is 1.0: expected a number from 0 to below 1"),
    option("training.weight_decay=-1", "training.weight_decay is -1.0: expected a finite number of at least 0"),
    option("training.gamma=-0.1", "training.gamma is -0.1: expected a finite number of more than 0"),
    option("training.ema=1", "training.ema is 1.0: expected a number from 0 to below 1"),
    option("training.epochs=0", "training.epochs is 0: expected at least 1"),
    option("training.milestones=[-1]", "training.milestones is -1: expected a whole number from 0 on"),
    option("training.validate_every=0", "training.validate_every is 0: expected a whole number from 1 on"),
    option("training.accumulate=0", "training.accumulate is 0: expected a whole number from 1 on"),
    option(
        "training.repeated_augmentation=0", "training.repeated_augmentation is 0: expected a whole number from 1 on"
    ),
    option("trainer.callbacks=[{class: a.B}]", "trainer.callbacks has {'class': 'a.B'}: expected {class_path"),
    option("trainer.callbacks=[{class_path: nowhere.B}]", "there is no library or module 'nowhere'"),
    option("trainer.callbacks=[{class_path: json.loads}]", "json.loads is not a pytorch_lightning.Callback: expected"),
    option("task=multilabel", "data.name is 'csv': give the file with columns of paths and labels as data.root"),
    option("data.batch_size=0", "data.batch_size is 0: expected a whole number from 1 on"),
    option("data.workers=100000", "data.workers is 100000: expected a whole number from 0 to 1024"),
    option("data.image_size=100000", "data.image_size is 100000: expected a whole number from 1 to 8192"),
    option("data.train_part=[5,3]", "data.train_part is [5, 3]: expected two whole numbers"),
    option("data.train_limit=9999", "data.train_limit is 9999, but there are only 1297 images"),
    option("data.white=0", "data.white is 0.0: expected a finite number of more than 0"),
    option("seed=-1", "seed is -1: expected a whole number from 0"),
    option("seed=4294967296", "seed is 4294967296: expected a whole number from 0 to 4294967295"),
    option("trainer.devices=-1", "trainer.devices is -1: expected a whole number from 1 to 1024, or auto for all"),
    option(
        "teacher.engine=onnx", "teacher.engine is 'onnx': expected 'torch' or 'onnxruntime'; did you mean 'onnxruntime'"
    ),
    option("trainer.num_nodes=0", "trainer.num_nodes is 0: expected a whole number from 1"),
    option("trainer.log_every=0", "trainer.log_every is 0: expected a whole number from 1 on"),
    option("trainer.accelerator=abacus", "trainer does not fit this machine"),
    option("trainer.strategy=hope", "trainer does not fit this machine"),
    option("distillation.method=kdd", "unknown method 'kdd'; did you mean 'kd'"),
    option("distillation.taps=[]", "distillation.taps is empty: expected 'auto', or pairs"),
    option("distillation.weights.mgd=[]", "distillation.weights.mgd is empty: expected a number for each position"),
    option("distillation.weights.mgd=.nan", "distillation.weights.mgd is nan: expected a finite number of at least 0"),
    option("distillation.weights.fitnet=1", "distillation.weights has no 'fitnet'; did you mean 'fitnets'"),
    option("distillation.weights.kd=paper", "distillation.weights.kd is 'paper': expected a finite number"),
    option("distillation.refresh_images=0", "distillation.refresh_images is 0: expected a whole number from 1 on"),
    option(
        "distillation.refresh_tolerance=2", "distillation.refresh_tolerance is 2.0: expected a number from 0 to below 1"
    ),
    option(
        "distillation.kd_temperature=0", "distillation.kd_temperature is 0.0: expected a finite number of more than 0"
    ),
    option("student.options={a: 1, a: 2}", "the mapping in line 1 has the key 'a' twice"),
    option("student.options={a: &a [*a]}", "the list in line 1 contains itself through an alias"),
    option("student.options={depth: 3}", "cannot be built with these options"),
    option("student.preparation={means: 0.5}", "student.preparation has no 'means'; did you mean 'mean'"),
    option("student.preparation={mean: 0.5}", "student.preparation.mean is 0.5: expected three numbers"),
    option("student.preparation={mean: [124, 116, 104]}", "divide them by 255"),
    option("student.preparation={std: [0.5, 0.5, 0]}", "expected three numbers above 0"),
    option(
        "student.preparation={interpolation: cubism}",
        "student.preparation.interpolation is 'cubism'; did you mean 'bicubic'",
    ),
    option("student.preparation={crop_pct: 87.5}", "student.preparation.crop_pct is 87.5: expected a share"),
    Case(
        "Settings",
        "`--student.preparation={size: 24} --data.image_size=16`",
        "student.preparation.size is 24, but data.image_size is 16, which would count: give one of them",
        (*FIT, "--student.preparation={size: 24}", "--data.image_size=16"),
    ),
    option("teacher.preparation={size: 0}", "teacher.preparation.size is 0: expected a whole number from 1"),
    option("compare.methods=[]", "compare.methods is empty: expected one method at least"),
    line("fti r.yaml", "unknown command 'fti'; did you mean 'fit'?"),
    line("fit", "no recipe: name a YAML file or a packaged recipe first"),
    line("fit quickstrat", "did you mean 'quickstart'?"),
    line("fit r.yaml --traning.lr=1", "--traning.lr"),
    line("fit r.yaml --seed", "expected one argument"),
    line("compare r.yaml --seeds=0", "compare.seeds is 0: expected a whole number from 1"),
    line("compare r.yaml --jobs=0", "--jobs 0: expected at least 1"),
    line("compare r.yaml --seed=4294967295", "the last of the seeds is 4294967297: expected a whole number"),
    line("validate nowhere", "nowhere: there is no such file or folder"),
    line("export nowhere", "nowhere holds no finished run"),
    line("export run --push me", "'me' is not the name of a repository on the Hub: expected USER/NAME, with its owner"),
    line(
        "export run --push me/it/too --dry_run",
        "'me/it/too' is not the name of a repository on the Hub: expected USER/NAME",
    ),
    line("export run --private", "--private needs --push USER/NAME"),
    line(
        "compare --collect nowhere",
        "nowhere is not the folder of a comparison that ran as jobs: it has no jobs/submitted.json",
    ),
    line("compare quickstart --array 2", "--array needs --cluster slurm or --cluster local"),
    line("compare quickstart --cluster slrm", "cluster.name is 'slrm': expected 'slurm' or 'local' or null"),
    line("report nowhere", "nowhere is not the folder of a run"),
    line("taps resnet18 resnet18", "did you mean 'torchvision:resnet18' or 'timm:resnet18'?"),
    line("taps torchvision:resnet18 torchvision:resnt18", "torchvision has no such model; did you mean"),
    weights("a file that is not there", "w.pt: there is no such file", lambda path: None),
    weights("a folder", "w.pt: it is a folder without a finished run: finish", Path.mkdir),
    weights("a pipe", "w.pt: it is not a regular file, but a device or a pipe", os.mkfifo),
    weights(
        "a text", "w.pt: not a weights file, or a damaged or truncated one", lambda path: path.write_text("hello " * 99)
    ),
    weights(
        "half a file",
        "damaged or truncated",
        lambda path: (every(torch.clone)(path), path.write_bytes(path.read_bytes()[:5000])),
    ),
    weights(
        "a call of a function",
        "it holds Python objects or code (__builtin__.eval), which are not loaded",
        saved(lambda state: {"model": state, "x": Call()}),
    ),
    weights(
        "a whole model",
        "holds objects instead of weights (matchdistill.models.small.SmallResNet)",
        lambda path: torch.save(small_resnet(width=2), path),
    ),
    weights(
        "no tensors",
        "holds no state dict: expected names with tensors, found entries epoch",
        saved(lambda state: {"epoch": 3}),
    ),
    weights(
        "another architecture",
        "this looks like another architecture",
        saved(lambda state: {"conv.weight": torch.ones(3, 3)}),
    ),
    weights(
        "other widths", "does not fit SmallResNet", lambda path: torch.save(small_resnet(width=4).state_dict(), path)
    ),
    weights(
        "another number of classes",
        "these weights are for 7 classes, the model has 10",
        lambda path: torch.save(small_resnet(7, width=2).state_dict(), path),
    ),
    weights(
        "NaN",
        "numbers of 54 that are not finite: take an earlier checkpoint",
        every(lambda value: value * float("nan")),
    ),
    weights(
        "int8 codes of a quantised model",
        "is int8, the model's is float32: are they the codes of a quantised model?",
        every(lambda value: value.to(torch.int8)),
    ),
    weights("complex numbers", "is complex64, the model's is float32", every(lambda value: value.to(torch.complex64))),
    weights(
        "two sets of weights",
        "holds weights that fit in several places, 'a', 'b'",
        saved(lambda state: {"a": state, "b": dict(state)}),
    ),
    images("a root that is not there", "image folder images does not exist", shutil.rmtree),
    images("no `train`", "images has no folder train", lambda root: shutil.rmtree(root / "train")),
    images("a root one folder too deep", "did you mean", lambda root: None, "--data.root=images/train"),
    images(
        "no folders of classes",
        "has no class folders: expected images/train/CLASS/IMAGE.jpg",
        lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()],
    ),
    images(
        "a class without training images",
        "class folder images/train/ant has no images",
        lambda root: [path.unlink() for path in (root / "train/ant").iterdir()],
    ),
    images(
        "a class that only `val` has",
        "must have the same class folders",
        lambda root: (root / "val/ant").rename(root / "val/wasp"),
    ),
    images(
        "a class in two Unicode forms",
        "have the same name in two Unicode forms",
        lambda root: [(root / "train" / unicodedata.normalize(form, "fée")).mkdir() for form in ("NFC", "NFD")],
    ),
    images(
        "a class that is a link to others",
        "whose images are in the set already: remove the link",
        lambda root: (root / "train/all").symlink_to("."),
    ),
    images(
        "a damaged image",
        "0.png is not an image that Pillow can read: repair or remove it",
        lambda root: (root / "train/ant/0.png").write_bytes(b"x"),
    ),
    images(
        "a pipe named like an image",
        "is a pipe, not a file): repair or remove it",
        lambda root: ((root / "train/ant/0.png").unlink(), os.mkfifo(root / "train/ant/0.png")),
    ),
    images(
        "a link that leads nowhere",
        "cannot be read (FileNotFoundError",
        lambda root: ((root / "train/ant/0.png").unlink(), (root / "train/ant/0.png").symlink_to("gone")),
    ),
    images(
        "floating-point values beyond 1",
        "its values run from 7 to 7: expected 0 to 1, or the value of white as data.white",
        lambda root: Image.fromarray(np.full((9, 9), 7, np.float32)).save(root / "train/ant/2.tif"),
    ),
    images(
        "an image of too many pixels",
        "it has 400 pixels, more than data.max_pixels, 99",
        lambda root: None,
        "--data.max_pixels=99",
    ),
    shard("a pattern without shards", "there is no shard train-*.tar", (), "--data.root=train-*.tar"),
    shard("a range with a gap", "there is no shard s1.tar", (), "--data.root=s{1..3}.tar"),
    shard("no archive", "shard r.yaml cannot be read (ReadError", (), "--data.root=r.yaml"),
    shard("an empty archive", "s.tar has no training images", ()),
    shard("an image without its class", "s.tar has no class of b, but NAME.cls", ("a.jpg", "a.cls", "b.jpg")),
    shard("a class without its image", "s.tar has no image of b, but NAME.cls", ("a.jpg", "a.cls", "b.cls")),
    shard("an image that is there twice", "s.tar has two images of a", ("a.jpg", "a.png", "a.cls")),
    saved_set("a folder that is not there", "there is no such folder or file", "--data.root=some/folder/set"),
    saved_set("a file of another type", "data set r.yaml cannot be loaded", "--data.root=r.yaml"),
    saved_set("two columns of classes", "set has 2 columns of the type ClassLabel, expected one"),
    saved_set("a column that is not there", "has no column 'labels'", "--data.label_column=labels"),
    saved_set("a column without images", "the column 'note' holds no images", "--data.image_column=note", LABEL),
    saved_set(
        "a split that is not there", "has no split 'test'; its splits are 'train'", "--data.val_split=test", LABEL
    ),
    saved_set("one image of each class", "as there is only one: give validation images", LABEL),
    own("a module that is not there", "no library or module 'ownbird'", "1", "--data.name=ownbird:birds"),
    own(
        "a function that is not there", "has no function 'bird'; did you mean 'birds'", "1", "--data.name=ownbirds:bird"
    ),
    own("an argument that it does not take", "got an unexpected keyword argument 'a'", "1", "--data.options.a=1"),
    own("something else is returned", "it returned a int: expected training set, validation set", "1"),
    own("a function that fails", "it fails with ZeroDivisionError: division by zero", "1 / 0"),
    own("a training set without items", "its training set has no images", "[], None, ['red']"),
    own("a set of other items", "is a int: expected a pair (image, label)", "[1, 2], None, ['red']"),
    own("a set of other images", "has a str: expected a PIL image or a tensor", "[('a.png', 0)], None, ['red']"),
    own(
        "a label beyond the classes",
        "has the label 1: expected a whole number from 0 to 0",
        "[(RED, 1)], None, ['red']",
    ),
    own("no names of classes", "it returned None as the names of the classes", "[(RED, 0)] * 4, None, None"),
    table("a table that is not there", "table images/u.csv does not exist", "", "--data.root=images/u.csv"),
    table("a file of another type", "expected a file that ends in .csv, .tsv, .parquet, .pq", "", "--data.root=r.yaml"),
    table("an empty table", "images/t.csv has no column 'path'; it has no columns at all", ""),
    table(
        "no column of paths",
        "has no column 'path'; its columns are 'file', 'label': name one of them",
        "file,label\na,b\n",
    ),
    table("a column by a wrong name", "did you mean 'label'?", TABLE, "--data.label_column=labels"),
    table("a path that is there twice", "row 5 (line 6) has the path 'train/ant/0.png' of", TABLE + TABLE[17:48]),
    table("a file that is missing", "row 5 (line 6): there is no file images/a.png", TABLE + "a.png,ant,train\n"),
    table("an empty label", "row 5 (line 6): label is empty (column 'label')", TABLE + "train/bee/1.png,,train\n"),
    table("a split of another name", "has the split 'test': expected 'train' or", TABLE.replace("val\n", "test\n")),
    table("a row that is too short", "row 5 (line 6) has 2 values for 3 columns", TABLE + "train/bee/1.png,bee\n"),
    table("a class that only `val` has", "without training images: wasp", TABLE + "val/bee/1.png,wasp,val\n"),
    labels(
        "an empty name among several labels", "row 1 (line 2) has the label 'ant||bee': expected names with", "ant||bee"
    ),
    labels("one class alone", "there is only one class, 'bee': expected at least two", ""),
    table("validation images alone", "images/t.csv has no training images", TABLE.replace("train\n", "val\n")),
    pixels(
        "a mask that is missing",
        "1 of 2 images of pixels/train/images have no mask: 1; expected",
        lambda root: (root / "train/masks/1.png").unlink(),
    ),
    pixels(
        "a class that is not known",
        "masks/1.png cannot be used: it has the value 3, which is no class: expected 0 to 2, 255; name",
        masked(3),
    ),
    pixels("a mask of another size than its image", "it has 20 x 30 pixels, its image 40 x 30", masked(size=(20, 30))),
    pixels("a mask in colours", "it is in colours (RGB): expected a number for every pixel", masked(mode="RGB")),
    pixels(
        "a mask that is damaged",
        "masks/1.png cannot be used: it is not an image that Pillow can read",
        lambda root: (root / "train/masks/1.png").write_bytes(b"PNG"),
    ),
    pixels(
        "a mask that is a pipe",
        "is a pipe, not a file",
        lambda root: ((root / "train/masks/1.png").unlink(), os.mkfifo(root / "train/masks/1.png")),
    ),
    pixels(
        "no names of classes",
        "pixels has no classes.txt: write the names",
        lambda root: (root / "classes.txt").unlink(),
    ),
    pixels(
        "no folder of masks", "pixels has no folder val/masks: expected", lambda root: shutil.rmtree(root / "val/masks")
    ),
    pixels("another layout", "ImageSets/Segmentation/train.txt does not exist", lambda root: None, "--data.name=voc"),
    pixels(
        "a layout that is not known",
        "data.name is 'cityscape': expected folder, voc, cityscapes",
        lambda root: None,
        "--data.name=cityscape",
    ),
    pixels(
        "a gap in the names of classes",
        "classes.txt has no name in line 2: give each value of the masks a name",
        lambda root: (root / "classes.txt").write_text("one\n\ntwo\n"),
    ),
    pixels(
        "names of classes in another encoding",
        "classes.txt is not text in UTF-8",
        lambda root: (root / "classes.txt").write_bytes("Straße\nb\nc\n".encode("latin-1")),
    ),
    pixels(
        "validation masks without any class",
        "no pixel of the validation masks (pixels/val/masks/0.png and so on) is of a class that counts",
        lambda root: [Image.new("L", (40, 30), 255).save(root / f"val/masks/{number}.png") for number in range(2)],
    ),
    pixels(
        "all classes ignored",
        "data.ignore is [0, 1, 2], which leaves no class to learn",
        lambda root: None,
        "--data.ignore=[0,1,2]",
    ),
    pixels(
        "a network of single labels",
        "the student gives (2, 3): expected logits (N, classes, H, W)",
        lambda root: None,
        "--student.name=timm:resnet18",
    ),
    pixels(
        "one image at a time for batch norms that need more",
        "data.batch_size is 1, and a batch norm of the student then sees a single value per channel: give at least 2",
        lambda root: None,
        "--student.name=torchvision:deeplabv3_mobilenet_v3_large",
        "--data.batch_size=1",
    ),
    coco("no annotations", "instances_train2017.json does not exist", lambda content: True),
    coco("annotations that are no JSON", "is damaged or not JSON", lambda content: ANNOTATIONS.write_text("{")),
    coco(
        "a key that is there twice",
        "it has the key 'images' twice",
        lambda content: ANNOTATIONS.write_text('{"images": [], "images": []}'),
    ),
    coco("a list", "expected a JSON object, found list", lambda content: ANNOTATIONS.write_text("[]")),
    coco("a pipe", "is a pipe, not a file", lambda content: os.mkfifo(ANNOTATIONS) or True),
    coco("no images", "images is missing or has an unexpected type", lambda content: content.pop("images") and None),
    coco(
        "two categories with one id",
        "category 1 is there twice",
        lambda content: content["categories"].append({"id": 1, "name": "b"}),
    ),
    coco("a category without a name", "category 1 has no name", first("categories", name="")),
    coco(
        "other categories in validation",
        "must have the same categories",
        lambda content: content["categories"].append({"id": 2, "name": "b"}),
    ),
    coco(
        "an image that is not there", "is missing: repair them, or leave them out", first("images", file_name="b.png")
    ),
    coco(
        "an image with `..` in its name",
        "leads out of coco (--data.outside=true allows it)",
        first("images", file_name="../../b.png"),
    ),
    coco(
        "an image with an absolute name",
        "leads out of coco (--data.outside=true allows it)",
        first("images", file_name="/b.png"),
    ),
    coco("an image of another size", "its size is (40, 30), in the annotations (50, 30)", first("images", width=50)),
    coco("a box outside of its image", "leaves its image of 40 x 30 pixels", first("annotations", bbox=[5, 5, 90, 9])),
    coco("a box of NaN", "is not x, y, width, height", first("annotations", bbox=[float("nan"), 5, 9, 9])),
    coco("a box without area", "is inverted or has no area", first("annotations", bbox=[5, 5, 0, 9])),
    coco("a category that is unknown", "its category_id 9 is not in the file", first("annotations", category_id=9)),
    coco(
        "a mask outside of its image",
        "its mask leaves its image of 40 x 30 pixels",
        first("annotations", segmentation=[[5, 5, 99, 5, 9, 9]]),
        "--data.masks=true",
    ),
    coco(
        "a student of masks without `data.masks`",
        "learns masks, which the data does not give: set data.masks to true",
        lambda content: None,
        name="torchvision:maskrcnn_resnet50_fpn",
    ),
    contrast(
        "a queue that is no multiple of the batches",
        "objective.queue is 50: expected a multiple of the 20 keys of a step (data.batch_size 20), such as 60",
        "--objective.queue=50",
    ),
    contrast(
        "a batch larger than the images",
        "a batch of 64 images is more than the 40 training images",
        "--data.batch_size=64",
    ),
    contrast(
        "a method for classes",
        "method 'kd' distils the output of classifiers: choose one without kd for moco",
        "--distillation.method=kd",
        f"--teacher.name={NET}",
    ),
    contrast(
        "augmentation of classifiers",
        "data.augmentation does not apply to contrasted crops, which have their own augmentation",
        "--data.augmentation=randaugment",
    ),
    contrast(
        "a frozen body",
        "training.frozen is for images with one label each, not for moco: leave it out",
        "--training.frozen=true",
    ),
    contrast("no temperature", "objective.temperature is 0.0: expected", "--objective.temperature=0"),
    contrast(
        "a network whose maps are not pooled",
        "the student without its head gives (2, 3, 16, 16) for 2 images: expected pooled features (N, width)",
        "--student.name=torch.nn:Identity",
        "--student.options={}",
    ),
    features("a root that is not there", "image folder images does not exist", change=shutil.rmtree),
    features(
        "a tree without images",
        "image folder images has no images",
        change=lambda root: (shutil.rmtree(root), root.mkdir()),
    ),
    features("no root", "data.name is 'folder': give the folder with the images as data.root", "--data.root=null"),
    features("an empty bank", "data.bank_limit is 0: expected a whole number from 1 on", "--data.bank_limit=0"),
    features("a method for classes", "method 'kd' distils the output of classifiers", "--distillation.method=kd"),
    features("a teacher to train", "teacher.training.epochs is for tasks with labels", "--teacher.training.epochs=1"),
    features(
        "a part that is not there",
        "SmallResNet has no module 'layer9'; did you mean",
        "--student.part=layer9",
    ),
    features(
        "a part that gives no features",
        "the student, or the part of it that is named, does not take images of shape (3, 16, 16)",
        "--student.part=fc",
    ),
    features(
        "a pooled output of maps",
        "distillation.pooled: the student gives maps",
        "--student.part=stem",
        "--distillation.pooled=true",
    ),
    features(
        "a pooled output of one image at a time",
        "distillation.pooled compares channels over the images of a batch, and data.batch_size is 1",
        "--distillation.pooled=true",
        "--data.batch_size=1",
    ),
    features(
        "margins of a pooled output",
        "the teacher has none before it: give taps that have one, leave distillation.pooled out",
        "--distillation.pooled=true",
        "--distillation.method=ofd",
    ),
    option("student.part=layer1", "student.part is not for classification: leave it out"),
    option("distillation.pooled=true", "distillation.pooled is not for classification: leave it out"),
    run("a folder that holds a run", "run already holds a run: continue it with --resume", lambda folder: None, *AGAIN),
    run(
        "another recipe than its own",
        "differs in training: resume with the same values",
        lambda folder: None,
        *RESUME,
        "--training.lr=0.5",
    ),
    run(
        "no recipe",
        "run is not the folder of a run: it has no recipe.yaml",
        lambda folder: (folder / "recipe.yaml").unlink(),
        "validate",
        "run",
    ),
    run(
        "a damaged recipe",
        "recipe.yaml is not YAML",
        lambda folder: (folder / "recipe.yaml").write_text("a: ["),
        "report",
        "run",
    ),
    run("metrics that are no JSON", "metrics.json is damaged or not JSON", cut("metrics.json"), "report", "run"),
    run(
        "metrics of other types",
        "metrics.json: student is missing or has an unexpected type",
        edited("metrics.json", student={"top1": "much"}),
        *RESUME,
    ),
    run(
        "metrics of another version",
        "metrics.json is of schema 1, this version of matchdistill reads schema 2",
        edited("metrics.json", schema=1),
        "report",
        "run",
    ),
    run(
        "metrics without numbers",
        "metrics.json is damaged: it lacks metrics of the student",
        edited("metrics.json", student={}),
        "report",
        "run",
    ),
    run(
        "a model of an unknown task",
        "model.json is damaged, or of another version",
        edited("model.json", task="singing"),
        "export",
        "run",
    ),
    run(
        "a model without an image size",
        "model.json is damaged, or of another version",
        edited("model.json", image_size=None),
        "export",
        "run",
    ),
    run(
        "a model that is unknown",
        "model 'timm:nothing': timm has no such model",
        edited("model.json", name="timm:nothing"),
        "export",
        "run",
    ),
    run(
        "a model by a function of somebody's",
        "it builds its network by importing 'theirs' and calling 'net' of it. From a folder, only networks of torchvision",
        edited("model.json", name="theirs:net"),
        "export",
        "run",
    ),
    run(
        "half of the weights",
        "student.safetensors: not a weights file, or a damaged or truncated one",
        cut("student.safetensors"),
        "validate",
        "run",
    ),
    run(
        "no weights",
        "run holds no finished run",
        lambda folder: (folder / "student.safetensors").unlink(),
        "export",
        "run",
    ),
    run(
        "half of a checkpoint",
        "last.ckpt: not a checkpoint, or a damaged or truncated one",
        lambda folder: ((folder / "metrics.json").unlink(), cut("last.ckpt")(folder)),
        *RESUME,
    ),
    run(
        "a checkpoint with code",
        "last.ckpt is refused: not a checkpoint of tensors and plain values alone",
        checkpoint(lambda content: {**content, "x": Call()}),
        *RESUME,
    ),
    run(
        "a checkpoint without its optimiser",
        "last.ckpt is not the checkpoint of a run: it has no optimizer_states",
        checkpoint(lambda content: {key: value for key, value in content.items() if key != "optimizer_states"}),
        *RESUME,
    ),
    run(
        "half of the evidence",
        "pictures.safetensors is damaged",
        cut("evidence/pictures.safetensors"),
        "report",
        "run",
    ),
    run(
        "evidence of other types",
        "run is damaged: ",
        edited("evidence/costs.json", student=[1], memory=3),
        "report",
        "run",
    ),
    run(
        "of another network, as weights",
        "its student has the options {'width': 2}, not {'width': 3}: give the same",
        lambda folder: None,
        *FIT,
        "--student.weights=run",
        "--student.options={width: 3}",
    ),
    run(
        "not finished, as weights",
        "weights ./run: it is a folder without a finished run",
        lambda folder: (folder / "student.safetensors").unlink(),
        *FIT,
        "--student.weights=./run",
    ),
    run(
        "a checkpoint of other types",
        "last.ckpt is damaged: loops has an unexpected type",
        checkpoint(lambda content: {**content, "loops": 3}),
        *RESUME,
    ),
    run(
        "a checkpoint of another model",
        "last.ckpt does not fit this run, it is damaged or of another version (RuntimeError: Error(s) in loading state_dict",
        checkpoint(lambda content: {**content, "state_dict": {"x": torch.ones(2)}}),
        *RESUME,
    ),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    write_recipe()
    assert cli.main(["fit", "r.yaml", "--out=run"]) == 0
    os.chdir(before)
    return folder / "run"


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}: {case.given}")
def test_bad_input_gets_one_line(case, finished, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_recipe()
    shutil.copytree(finished, "run")
    case.make()
    capfd.readouterr()
    assert cli.main(list(case.command)) == 2
    said = capfd.readouterr().err
    assert said.startswith("matchdistill: error: ")
    assert said.count("\n") == 1
    assert case.said in said


def page() -> str:
    """The list, as a section of a page."""
    lines = [
        f"Each of these {len(CASES)} inputs ends with exit code 2 and one line on standard error. The part of the line that",
        "matters is below. `tests/test_bad_input.py` runs all of them, and writes this list.",
    ]
    for group, cases in groupby(CASES, lambda case: case.group):
        lines += ["", f"### {group}", "", "| given | said |", "|---|---|"]
        lines += [f"| {case.given} | {case.said.replace('|', '&#124;')} |" for case in cases]
    return "\n".join(lines) + "\n"


def test_the_page_is_the_list():
    assert len(CASES) >= 80
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python tests/test_bad_input.py"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
