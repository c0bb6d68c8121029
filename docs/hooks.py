"""MkDocs hooks: the results beside the pages, links as they stand in the repository, figures, help, and a run's page.

The site is laid out as the repository is, with what lies in docs/ at its root. So a link that leads from file to file in the
repository leads to the same page here.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import posixpath
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from figures import drawn  # MkDocs puts this folder on the path
from mkdocs.structure.files import File, Files

from matchdistill import cli
from matchdistill.methods import KD, KD_WEIGHT, METHODS
from matchdistill.reduction import REDUCTIONS
from matchdistill.report.page import report
from matchdistill.runs.recipe import load_recipe
from matchdistill.runs.train import fit

ROOT = Path(__file__).parent.parent
RESULTS = (
    "benchmarks/README.md",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.json",
    "benchmarks/results/*.log",
)
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")  # of a file, not of another site
FIGURE = re.compile(r"!\[([^\]]*)\]\((\S*figures/\w+)\.svg\)")
EXAMPLE = "example-report.html"
HELP = "<!-- help -->"  # where that of all commands goes
METHOD_TABLE = "<!-- methods -->"


def on_config(config: Any) -> Any:
    """List the pages of results, under their own titles, in the last section."""
    (results,) = config.nav[-1].values()
    results += [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("benchmarks/results/*.md"))]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the results, as they lie in the repository, and the figures."""
    for pattern in RESULTS:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name, content in drawn().items():
        files.append(File.generated(config, f"figures/{name}", content=content))
    files.append(File.generated(config, EXAMPLE, content=example()))
    return files


@functools.cache
def example() -> str:
    """The page of a short run."""
    given = ("--training.epochs=12", "--teacher.training.epochs=6", "--distillation.weights.mgd=1.0")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "digits")
        fit(load_recipe("quickstart", *given), out, quiet=True)
        return report([out])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in the help, the methods, both variants of figures, and links of the site for those of the repository."""
    if HELP in markdown:
        markdown = markdown.replace(HELP, all_help())
    markdown = markdown.replace(METHOD_TABLE, method_table())
    markdown = FIGURE.sub(r"![\1](\2-light.svg#only-light)![\1](\2-dark.svg#only-dark)", markdown)
    here = page.file.src_uri
    source = here if here.startswith("benchmarks/") else f"docs/{here}"
    return LINK.sub(lambda found: found[1] + site_link(found[2], source, here) + found[3], markdown)


def site_link(link: str, source: str, page: str) -> str:
    """A link from a file of the repository, as one from its page."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page) or ".")


def all_help() -> str:
    """The help of `matchdistill`, and of each command under its own heading."""
    parts = [f"```text\n{help_of([])}\n```"]
    parts += [f"## {command}\n\n```text\n{help_of([command])}\n```" for command in cli.COMMANDS]
    return "\n\n".join(parts)


def method_table() -> str:
    """The methods of the library: what the student learns, and the weight of the loss."""
    rows = [
        "| method | the student learns from labels, and of the teacher | weight |",
        "|---|---|---|",
        "| `none` | nothing | |",
    ]
    for name, own in METHODS.items():
        names = [name] if own.matcher is None else [f"{name}-{reduction}" for reduction in REDUCTIONS]
        weight = f"`weights.{own.weighed_as or name}`, {own.weight:g}"
        learned = own.learned.format(reduction="...")
        rows.append(f"| {', '.join(f'`{each}`' for each in names)} | {learned} | {weight} |")
    return "\n".join([*rows, f"| `{KD}` | its output | `weights.{KD}`, {KD_WEIGHT:g} |"])


def help_of(command: Sequence[str]) -> str:
    """What `matchdistill COMMAND --help all` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), patch.dict(os.environ, COLUMNS="100"), contextlib.suppress(SystemExit):
        cli.main([*command, "--help", "all"])
    return printed.getvalue().strip()
