"""Every fenced block of the documentation is run, or at least checked, as it stands there.

By its kind, and in the order of the page, in a folder of its own:

- `python` is run, in one namespace for the page; what is in a comment `<!-- setup ... -->` too.
- `text` is what the block before it prints: words and whole numbers as they are, fractions about.
- `yaml` is resolved as a recipe, over a packaged one.
- `bash` is parsed, and its commands of matchdistill are run with tiny settings, or resolved where they need data, GPUs or a
  cluster. Of other commands, the scripts and extras that they name must exist.

A block with a title becomes a file of that name too. A block of any other kind is a failure.
"""

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import markdown
import pytest
import torch
import yaml

from matchdistill import cli
from matchdistill.recipes import packaged
from matchdistill.runs.recipe import Recipe, plain_config, read_recipe, recipe_parser, resolve_recipe, task_of

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("docs/**/*.md")),
    ROOT / "benchmarks/README.md",
    *sorted(ROOT.glob("benchmarks/results/*.md")),
]
BLOCK = re.compile(
    r'^```(?P<kind>\w*)(?: title="(?P<title>[\w.]+)")?\n(?P<text>.*?)^```$|^<!-- setup\n(?P<setup>.*?)^-->$',
    re.MULTILINE | re.DOTALL,
)
FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
BASES = {
    "classification": "quickstart",
    "detection": "coco_retinanet_r50_r18_1x",
    "multilabel": "quickstart",
    "features": "features_fashion_mnist",
    "moco": "moco_resnet50_resnet18",
    "segmentation": "segmentation_scenes",
}
NOT_INSTALLED = {"detectron2", "openvino"}  # what blocks may import and are only checked for then
TINY = (
    "--training.epochs 1 --teacher.training.epochs 1 --teacher.train_limit 60 --data.train_limit 60 --data.val_limit 50 "
    "--trainer.accelerator cpu"
).split()
TINY_GRID = "--methods none,mgd-amp --seeds 1 --jobs 1".split()
INSTALLERS = {"pip", "git", "cd", "apt-get"}
LAUNCHERS = {"torchrun", "srun", "accelerate", "python"}


class Block(NamedTuple):
    """A fenced block of a page, or a comment that sets up for the next ones."""

    kind: str
    title: str | None
    text: str


def blocks(path: Path) -> list[Block]:
    """The blocks of a page with its snippets put in, as MkDocs does it."""
    options = {"base_path": [str(ROOT)], "check_paths": True, "dedent_subsections": True}
    reader = markdown.Markdown(extensions=["pymdownx.snippets"], extension_configs={"pymdownx.snippets": options})
    text = "\n".join(reader.preprocessors["snippet"].run(path.read_text().splitlines()))
    found = [
        Block("python", None, match["setup"]) if match["setup"] else Block(match["kind"], match["title"], match["text"])
        for match in BLOCK.finditer(text)
    ]
    fences = 2 * sum(match["setup"] is None for match in BLOCK.finditer(text))
    assert len(FENCE.findall(text)) == fences, f"{path}: a fence that this test does not understand"
    return found


class Page:
    """What the blocks of a page leave for those after them."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed = ""
        self.methods: list[str] | None = None  # of a table that the last command printed

    def run(self, block: Block) -> None:
        """Run or check a block."""
        kinds: dict[str, Callable[[str], None]] = {
            "python": self.python,
            "text": self.text,
            "yaml": self.yaml,
            "bash": self.bash,
        }
        assert block.kind in kinds, f"a block of kind {block.kind!r}: expected one of {', '.join(kinds)}"
        if block.title is not None:
            Path(block.title).write_text(block.text)
        kinds[block.kind](block.text)

    def python(self, text: str) -> None:
        """Run it, or see that it compiles and imports what there is."""
        tree = ast.parse(text)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        if {node.module.partition(".")[0] for node in imports} & NOT_INSTALLED:
            for node in imports:
                if node.module.startswith("matchdistill"):
                    assert {alias.name for alias in node.names} <= defined(node.module)
            return
        with self.printing():
            exec(compile(tree, "block", "exec"), self.names)

    def text(self, text: str) -> None:
        """See that it is what was printed."""
        if self.methods is not None:
            assert re.findall(r"^│ (\S+)", text, re.MULTILINE) == self.methods
        else:
            assert same(text, self.printed), f"the page has\n{text}\nbut the block prints\n{self.printed}"

    def yaml(self, text: str) -> None:
        """Resolve it as a recipe."""
        values = yaml.safe_load(text)
        for role in ("teacher", "student"):
            if str(weights := values.get(role, {}).get("weights")).endswith(".pth"):
                Path(weights).touch()  # a recipe names files that are there
        whole = over(read_recipe(BASES[task_of(values)]), values)
        Recipe.of(plain_config(resolve_recipe(whole, recipe_parser(task=task_of(values)))))

    def bash(self, text: str) -> None:
        """Run or check each command."""
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        whole = text.replace("\\\n", " ")  # a command over several lines
        lines = [line for line in whole.splitlines() if line and not line.startswith("#")]
        assert lines
        for part in (part for line in lines for part in line.split("&&")):
            words = [word for word in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
            if words[0] == "matchdistill":
                self.command(words[1:])
            elif words[0] in LAUNCHERS and "matchdistill" in words:
                self.resolve(words[words.index("matchdistill") + 1 :])
            elif words[0] in LAUNCHERS:
                scripts = [word for word in words if word.endswith(".py")]
                assert scripts, part
                assert all(Path(script).is_file() or (ROOT / script).is_file() for script in scripts), part
            else:
                assert words[0] in INSTALLERS, part
                assert set(re.findall(r"\.\[(\w+)\]", part)) <= extras(), part

    def command(self, arguments: list[str]) -> None:
        """Run a command of matchdistill with tiny settings, or resolve it where its data is not here."""
        name, rest = arguments[0], arguments[1:]
        self.methods = None
        with self.printing():
            if name not in ("fit", "compare", "quickstart"):
                assert cli.main(arguments) == 0
            elif self.has_data(arguments) and "--print_config" not in rest:
                assert cli.main([*arguments, *TINY, *([] if name == "fit" else TINY_GRID)]) == 0
                self.methods = None if name == "fit" else self.resolve(arguments)["compare"]["methods"]
            else:
                self.resolve(arguments)

    def has_data(self, arguments: list[str]) -> bool:
        """Whether the images of a run are here."""
        data = self.resolve(arguments)["data"]
        return data.get("name") == "digits" or (data["root"] is not None and Path(data["root"]).is_dir())

    def resolve(self, arguments: list[str]) -> dict[str, Any]:
        """The configuration that a command would run."""
        if "mine.yaml" in arguments and not Path("mine.yaml").exists():  # the reader's own
            Path("mine.yaml").write_text(packaged()["quickstart"])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert cli.main([*arguments, "--print_config"]) == 0
        return yaml.safe_load(printed.getvalue())

    @contextlib.contextmanager
    def printing(self) -> Iterator[None]:
        """Keep what is printed, for a block of text."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            yield
        self.printed = printed.getvalue()


def defined(module: str) -> set[str]:
    """The names that a module defines at its top, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    top = ast.parse(Path(spec.origin).read_text()).body
    names = {node.name for node in top if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {alias.name for node in top if isinstance(node, ast.ImportFrom) for alias in node.names}


def same(expected: str, printed: str) -> bool:
    """Whether words and whole numbers agree, and fractions about: their last digits depend on the machine."""
    texts = expected.split(), printed.split()
    if NUMBER.sub("#", " ".join(texts[0])) != NUMBER.sub("#", " ".join(texts[1])):
        return False
    pairs = zip(*(NUMBER.findall(" ".join(text)) for text in texts), strict=True)
    return all(
        abs(float(a) - float(b)) <= max(0.1, 0.05 * abs(float(a))) if "." in a or "." in b else a == b for a, b in pairs
    )


def over(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Values with others over them, section by section."""
    merged = {key: values.get(key, {}) | other if isinstance(other, dict) else other for key, other in others.items()}
    return values | merged


def extras() -> set[str]:
    """The extras of the package."""
    text = (ROOT / "pyproject.toml").read_text()
    if sys.version_info < (3, 11):
        return set(re.findall(r"^(\w+) = \[", text, re.MULTILINE))
    return set(tomllib.loads(text)["project"]["optional-dependencies"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    """A folder of the page's own, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "networks", raising=False)  # the tests have one, the tutorial has another
    torch.manual_seed(0)
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(path)
    if any("init_process_group" in block.text for block in found):  # as torchrun would set it for one process
        with socket.socket() as free:
            free.bind(("localhost", 0))
            monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
            monkeypatch.setenv(name, value)
    for block in found:
        if block.title is not None:  # a module of the page may have the name of one of the tests'
            monkeypatch.delitem(sys.modules, Path(block.title).stem, raising=False)
    page = Page()
    for block in found:
        page.run(block)


def test_an_unknown_kind_of_block_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="'rust'"):
        Page().run(Block("rust", None, ""))


def test_a_fence_that_is_not_understood_is_a_failure(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("- a list\n\n    ```python\n    1 / 0\n    ```\n")
    with pytest.raises(AssertionError, match="does not understand"):
        blocks(page)


def test_an_output_that_is_another_is_a_failure() -> None:
    assert same("12 images, 0.501", "12  images,\n0.502\n")
    assert not same("12 images", "13 images")
    assert not same("91.0%", "81.0%")
    assert not same("a", "b")


@pytest.mark.slow
def test_the_loop_in_two_processes(tmp_path: Path) -> None:
    (script,) = [block.text for block in blocks(ROOT / "docs/howto/processes.md") if block.title == "train.py"]
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "student.pt").exists()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(name: str) -> None:
    text = (ROOT / name).read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    for path, _, anchor in (link.partition("#") for link in links):
        assert (ROOT / path).exists(), path
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [
            re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings
        ]


def documented() -> dict[str, set[str]]:
    """The names that the reference lists, of each module."""
    text = "\n".join(path.read_text() for path in sorted(ROOT.glob("docs/reference/*.md")))
    found: dict[str, set[str]] = {}
    for module, members in re.findall(
        r"^::: ([\w.]+)\n    options:\n(?:      .*\n)*?      members: \[(.*)\]", text, re.M
    ):
        found.setdefault(module, set()).update(members.split(", "))
    for name in re.findall(r"^::: ([\w.]+)$(?!\n    options)", text, re.M):
        module, _, name = name.rpartition(".")
        found.setdefault(module, set()).add(name)
    return found


def test_the_reference_has_every_public_name_and_no_other() -> None:
    reference, checked = documented(), set()
    every = set().union(*reference.values())
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
                public = set(ast.literal_eval(node.value))
                assert public <= every, f"{module}: {public - every}"
                assert reference.get(module, set()) <= public, f"{module}: {reference[module] - public}"
                checked.add(module)
    assert {"matchdistill", "matchdistill.functional", "matchdistill.models", "matchdistill.data"} <= checked
    assert not any(name.startswith("_") for name in every)


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/reference/*.md")), ids=lambda page: page.stem)
def test_the_reference_names_what_there_is(path: Path) -> None:
    for module, members in re.findall(
        r"^::: ([\w.]+)\n    options:\n(?:      .*\n)*?      members: \[(.*)\]", path.read_text(), re.M
    ):
        assert set(members.split(", ")) <= defined(module)
