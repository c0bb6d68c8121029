"""MkDocs hooks: the results beside the pages, links as they stand in the repository, figures, help, and a run's page.

The site is laid out as the repository is, with what lies in docs/ at its root. So a link that leads from file to file in the
repository leads to the same page here.
"""

from __future__ import annotations

import dataclasses
import functools
import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from command_texts import all_commands  # MkDocs puts this folder on the path
from figures import drawn
from mkdocs.structure.files import File, Files

from matchdistill.methods import KD, KD_WEIGHT, METHODS
from matchdistill.models import Preparation
from matchdistill.reduction import REDUCTIONS
from matchdistill.report.page import report
from matchdistill.runs.recipe import DEFAULT_TASK, load_recipe, recipe_parser
from matchdistill.runs.settings import Comparison, Distillation, Machine, Model, Teacher
from matchdistill.runs.train import fit
from matchdistill.runs.training import Training
from matchdistill.tasks import TASKS

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
OPTION_TABLES = "<!-- options -->"
SECTION_TYPES = {
    "student": Model,
    "teacher": Teacher,
    "training": Training,
    "distillation": Distillation,
    "trainer": Machine,
    "compare": Comparison,
}


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
    """Put in help, methods, options, both variants of figures, and links of the site for those of the repository."""
    if HELP in markdown:
        markdown = markdown.replace(HELP, all_commands())
    markdown = markdown.replace(METHOD_TABLE, method_table())
    if OPTION_TABLES in markdown:
        markdown = markdown.replace(OPTION_TABLES, option_tables())
    markdown = FIGURE.sub(r"![\1](\2-light.svg#only-light)![\1](\2-dark.svg#only-dark)", markdown)
    here = page.file.src_uri
    source = here if here.startswith("benchmarks/") else f"docs/{here}"
    return LINK.sub(lambda found: found[1] + site_link(found[2], source, here) + found[3], markdown)


def site_link(link: str, source: str, page: str) -> str:
    """A link from a file of the repository, as one from its page."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page) or ".")


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


def option_tables() -> str:
    """Every setting of every section under headings: what it does, its default, and where it is from."""
    parts = []
    kinds: dict[type, list[str]] = {}
    for name, task in TASKS.items():
        kinds.setdefault(task.data.options_type, []).append(name)
    for kind, names in kinds.items():
        parts += [f"## data, for {' and '.join(names)}", option_table("data", kind, names[0])]
    for section, kind in SECTION_TYPES.items():
        parts += [f"## {section}", option_table(section, kind)]
        if section == "student":
            parts += ["## preparation, of student and teacher", preparation_table()]
    for name, task in TASKS.items():
        if task.objective is not None:
            parts += [f"## objective, for {name}", option_table("objective", task.objective, name)]
    return "\n\n".join(parts)


def option_table(section: str, kind: type, task: str = DEFAULT_TASK) -> str:
    """The settings of a section, one row each; those of a section in it are where that is explained."""
    rows = ["| option | what it does | default | from |", "|---|---|---|---|"]
    for action in recipe_parser(task=task)._actions:
        name = action.dest.removeprefix(f"{section}.")
        if name == action.dest or "." in name:
            continue
        inside = any(field.name == name and field.type == "Training" for field in dataclasses.fields(kind))
        default = (
            ""
            if inside
            else f"`{yaml.safe_dump(action.default, default_flow_style=True, width=999).split(chr(10))[0]}`"
        )
        help = "how it is trained before the student: each option of training" if inside else action.help or ""
        text = " ".join(help.replace("``", "`").replace("|", "\\|").split())
        rows.append(f"| `{action.dest}` | {text} | {default} | {source_of(kind, name)} |")
    return "\n".join(rows)


def preparation_table() -> str:
    """What `student.preparation` and `teacher.preparation` may say."""
    rows = ["| option | what it does | default | from |", "|---|---|---|---|"]
    default = Preparation().plain()
    for each in docstring_parser.parse(Preparation.__doc__ or "").params:
        what = " ".join((each.description or "").split())
        value = yaml.safe_dump(default[each.arg_name], default_flow_style=True, width=999).split("\n")[0]
        rows.append(
            f"| `preparation.{each.arg_name}` | {what} | `{value}`, or as its weights want it | timm, torchvision |"
        )
    return "\n".join(rows)


def source_of(kind: type, name: str) -> str:
    """The library that a setting is from."""
    tables = (base.__dict__.get("sources", {}) for base in kind.__mro__)
    return next((library for table in tables for library, names in table.items() if name in names), "matchdistill")
