"""Recipes: a run as plain values, checked as a whole before anything starts."""

from __future__ import annotations

import copy
import itertools
from argparse import Action
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from matchdistill.data import DataOptions
from matchdistill.data.module import DataModule
from matchdistill.files import path_of, read_bytes
from matchdistill.messages import did_you_mean, whole
from matchdistill.methods import KD, METHODS, default_weights
from matchdistill.models import Preparation
from matchdistill.models.build import find_preparation
from matchdistill.models.preparation import IMAGENET
from matchdistill.recipes import packaged
from matchdistill.reduction import REDUCTIONS
from matchdistill.runs.settings import Comparison, Distillation, Machine, Model, Settings, Teacher
from matchdistill.runs.training import Training
from matchdistill.tasks import TASKS
from matchdistill.values import OPTIONS, OptionParser, in_words, read_yaml

DEFAULT_TASK = next(iter(TASKS))
LARGEST_SEED = 2**32 - 1  # of NumPy
SECTIONS = ("task", "seed", "data", "teacher", "student", "training", "objective", "distillation", "trainer", "compare")


@dataclass
class Recipe(Settings):
    """Everything that a run depends on; `config` is all of it as plain values."""

    data: DataModule
    config: dict[str, Any]

    @classmethod
    def of(cls, config: dict[str, Any], **changes: Any) -> Recipe:
        """The recipe of a resolved configuration, with changes by dotted key whose dots are written as "__".

        Raises:
            ValueError: values that do not fit together; all of them are listed.
        """
        config = copy.deepcopy(config)
        for key, value in changes.items():
            section = config
            *path, last = key.split("__")
            for part in path:
                section = section[part]
            section[last] = value
        if found := list(problems_in(config)):
            raise ValueError("; ".join(found))
        task = TASKS[config["task"]]
        data = task.data(**config["data"], seed=config["seed"])
        data.repeats = config["training"]["repeated_augmentation"]
        if "preparation" in task.supports:
            for role in ("student", "teacher"):
                config[role]["preparation"] = _settled(config[role], role, data)
            data.prepare_as(Preparation.of(config["student"]["preparation"]))
        recipe = cls(**_sections(config), data=data, config=config)
        data.views = recipe.views
        return recipe

    def for_teacher(self) -> Recipe:
        """The recipe that trains the teacher alone."""
        teacher, changes = self.config["teacher"], dict[str, Any]()
        preparation, size = teacher["preparation"], self.student.prepared.size
        if (own := self.teacher.prepared.size) is not None and "image_size" in self.config["data"]:
            changes["data__image_size"] = own
        elif size is not None:  # of the images that it will see
            preparation = {**self.teacher.prepared.plain(), "size": size}
        limit = (
            teacher["training"]["max_time"] or self.config["training"]["max_time"]
        )  # that of the run is that of both
        return Recipe.of(
            self.config,
            student={**{key: teacher[key] for key in self.config["student"]}, "preparation": preparation},
            **changes,
            training={**teacher["training"], "max_time": limit},
            distillation__method="none",
            data__train_limit=teacher["train_limit"],
            data__train_part=teacher["train_part"],
        )

    def with_trained_teacher(self, weights: Path) -> Recipe:
        """The recipe that takes the teacher's weights from a file instead of training it."""
        return Recipe.of(self.config, teacher__weights=str(weights.resolve()), teacher__training__epochs=0)


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The values of a packaged recipe, or of a YAML file.

    Raises:
        ValueError: neither exists, or the file holds no YAML mapping.
    """
    known = packaged()
    text: str | bytes
    if str(name) in known:
        text = known[str(name)]
    elif (path := path_of(name)).is_file():
        text = read_bytes(path)  # YAML finds out the encoding
    else:
        raise ValueError(
            f"no recipe {str(name)!r}: neither a file nor a packaged recipe ({', '.join(known)})"
            f"{did_you_mean(str(name), known)}"
        )
    try:
        values = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{name} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a recipe: expected a mapping of sections, got {type(values).__name__}")
    return values


def load_recipe(name: str | Path, *arguments: str) -> Recipe:
    """A packaged recipe or that of a file, with arguments as on the command line ("--training.lr=0.1").

    Raises:
        ValueError: there is none, or it does not fit; all that is wrong is listed.
    """
    values = read_recipe(name)
    parser = recipe_parser(task=task_of(values, arguments))
    return Recipe.of(plain_config(resolve_recipe(values, parser, arguments)))


def resolved_config(path: Path) -> dict[str, Any]:
    """The configuration of a recipe's file: its values over the defaults, whether or not they fit together.

    Raises:
        ValueError: there is no such file, or it holds no recipe.
    """
    values = read_recipe(path)
    return plain_config(resolve_recipe(values, recipe_parser(task=task_of(values))))


def task_of(values: dict[str, Any], arguments: Sequence[str] = ()) -> str:
    """The task of a recipe's values with arguments of the command line over them; where it is none, the default's."""
    task = values.get("task")
    for number, argument in enumerate(arguments):
        if argument.startswith("--task="):
            task = argument.partition("=")[2]
        elif argument == "--task" and number + 1 < len(arguments):
            task = arguments[number + 1]
    return task if isinstance(task, str) and task in TASKS else DEFAULT_TASK


def recipe_parser(prog: str | None = None, task: str = DEFAULT_TASK) -> ArgumentParser:
    """The options of a recipe for a task."""
    parser = OptionParser(prog=prog, exit_on_error=False, parser_mode=OPTIONS)
    tasks = Literal[tuple(TASKS)]  # type: ignore[valid-type]  # known when it runs
    parser.add_argument("--task", type=tasks, default=task, help="what is learned, by which the options of data differ")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_class_arguments(TASKS[task].data.options_type, "data", skip={"seed"})
    parser.add_class_arguments(Teacher, "teacher")
    parser.add_class_arguments(Model, "student")
    parser.add_class_arguments(Training, "training")
    if (objective := TASKS[task].objective) is not None:
        parser.add_class_arguments(objective, "objective")
    parser.add_class_arguments(Distillation, "distillation")
    parser.add_class_arguments(Machine, "trainer")
    parser.add_class_arguments(Comparison, "compare")
    parser.set_defaults({"compare.methods": list(TASKS[task].compared)})
    of_methods = _help_of_methods()
    for action in parser._actions:
        action.help = of_methods.get(action.dest, action.help)
    return parser


def _help_of_methods() -> dict[str, str]:
    """The help of the options that the table of methods says more of than their docstrings."""
    families = [
        f"{name}-REDUCTION ({', '.join(REDUCTIONS)})" if family.takes_reduction else name
        for name, family in METHODS.items()
    ]
    weights = ", ".join(f"weights.{name} ({weight:g})" for name, weight in default_weights().items())
    return {
        "distillation.method": f"none, {KD}, {', '.join(families)}, each of these also with +{KD}",
        "distillation.weights": f"of the losses, by method: {weights}. One number for all positions or a list with one "
        'for each; "paper" is the paper\'s form for classification',
    }


def resolve_recipe(values: dict[str, Any], parser: ArgumentParser, arguments: Sequence[str] = ()) -> Namespace:
    """A recipe's values, with arguments of the command line over them and defaults below, checked.

    Raises:
        ValueError: unknown keys, values of wrong types, missing values; all that the recipe has are listed.
    """
    options = {action.dest: action for action in parser._actions if action.dest.partition(".")[0] in SECTIONS}
    leaves = {key for key in options if not any(other.startswith(f"{key}.") for other in options)}
    problems: dict[str, str] = {}
    given: dict[str, Any] = {}
    for key, value in _flattened(copy.deepcopy(values), leaves):  # the parser makes tuples of lists in place
        inside = {leaf.removeprefix(f"{key}.").partition(".")[0] for leaf in leaves if leaf.startswith(f"{key}.")}
        if inside:
            problems[key] = f"{key} is {value!r}: expected a mapping of {', '.join(sorted(inside))}"
            continue
        if key not in leaves:
            problems[key] = f"unknown key {key!r}{did_you_mean(key, leaves)}"
            continue
        if value == "":
            problems[key] = f"{key} is empty: give a value, or leave it out"
            continue
        try:
            if value is None and not _is_optional(options[key]):  # which the parser takes for no value at all
                raise ArgumentError(None, "null")
            parser.parse_object(_nested(key, value), defaults=False)
            given[key] = value
        except ArgumentError:
            problems[key] = (
                f"{key} is {value!r}: expected {in_words(getattr(options[key], '_typehint', 'another value'))}"
            )
    parser.set_defaults(given)
    try:
        resolved = parser.parse_args(list(arguments))
    except ArgumentError as error:
        problems["--"] = " ".join(str(error).split())
        if len(problems) == 1:
            raise ValueError(problems["--"]) from error
    else:
        if not problems:
            return resolved
        others = problems_in(plain_config(resolved))
        problems |= {text: text for text in others if not any(key in text for key in problems)}
    raise ValueError("the recipe does not fit: " + "; ".join(problems.values()))


def _is_optional(option: Action) -> bool:
    """Whether an option may be null."""
    return type(None) in get_args(getattr(option, "_typehint", None))


def _flattened(values: dict[str, Any], leaves: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in leaves and any(leaf.startswith(f"{key}.") for leaf in leaves):
            yield from _flattened(value, leaves, f"{key}.")
        else:
            yield key, value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast("dict[str, Any]", value)


def plain_config(resolved: Namespace) -> dict[str, Any]:
    """The recipe in a parser's result, as plain values."""
    config = resolved.as_dict()
    # Weights that are given leave the others at their defaults.
    config["distillation"]["weights"] = {**default_weights(), **config["distillation"]["weights"]}
    return {section: _plain(config[section]) for section in SECTIONS if section in config}


def _plain(value: Any) -> Any:
    """As it would come from YAML."""
    if isinstance(value, dict):
        # The parser notes there from which file the values of an option like --training FILE are.
        return {key: _plain(item) for key, item in value.items() if key != "__path__"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def problems_in(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a resolved configuration: with each section's values, and what does not fit together."""
    task, settings = TASKS[config["task"]], Settings(**_sections(config))
    student, teacher, distillation = settings.student, settings.teacher, settings.distillation
    yield from task.data.options_type(**config["data"]).problems("data")
    yield from DataOptions(train_limit=teacher.train_limit, train_part=teacher.train_part).problems("teacher")
    yield from whole("seed", config["seed"], 0, LARGEST_SEED)
    named = list(distillation.problems("distillation")), list(settings.compare.problems("compare"))
    yield from dict.fromkeys(itertools.chain(*named))  # both may have the same wrong method
    for section in ("training", "teacher", "student", "trainer", *(["objective"] if task.objective else [])):
        yield from getattr(settings, section).problems(section)
    if not student.name:
        yield f"student.name is missing: name the network to train, for example {task.usual}"
    if distillation.needs_teacher and teacher.name is None:
        yield f"method {distillation.method!r} needs a teacher: give teacher.name"
    if settings.training.repeated_augmentation > 1 and not config["data"].get("augment", True):
        yield "training.repeated_augmentation varies each image several times, but data.augment is false: give one of them"
    if settings.training.epochs == 0:
        yield "training.epochs is 0: expected at least 1"
    if not task.comparable:
        for prefix, training in (("training", settings.training), ("teacher.training", teacher.training)):
            for what, instead in training.measuring:
                yield f"{prefix}.{what}, but students of {task.name} are not measured: {instead}"
    if teacher.engine != "torch":
        if settings.trainer.prepare_teacher:
            yield f"trainer.prepare_teacher is for torch, but teacher.engine is {teacher.engine}: leave one of them out"
        if settings.trainer.accelerator not in ("auto", "cpu"):
            place = settings.trainer.accelerator
            yield f"teacher.engine {teacher.engine} runs on the CPU, but trainer.accelerator is {place}: leave one out"
    yield from task.problems(settings)
    yield from settings.cache_problems()


def _settled(network: dict[str, Any], role: str, data: DataModule) -> dict[str, Any] | None:
    """How a network wants its images: what is given, over what is known of its weights; None: as ImageNet's usually are.

    Raises:
        ValueError: what is said beside a file of weights is damaged, or the sizes of images differ.
    """
    given: dict[str, Any] = network["preparation"] or {}
    whole_given = given.keys() == Preparation().plain().keys()  # as a recipe has it that was settled before
    size, of_data = given.get("size"), getattr(data.options, "image_size", None)
    if role == "student" and not whole_given and None not in (size, of_data) and size != of_data:
        raise ValueError(
            f"student.preparation.size is {size}, but data.image_size is {of_data}, which would count: give one of them"
        )
    known = None
    if network["name"] and network["weights"] and data.prepares and not whole_given:
        known = find_preparation(network["name"], network["weights"], network["options"])
    values = {} if known is None else known.values
    if role == "teacher" and known is not None and not known.fixed:  # it takes the student's size
        values = {name: value for name, value in values.items() if name != "size"}
    settled = Preparation.of({**values, **given})
    return None if settled == IMAGENET and not given else settled.plain()


def _sections(config: dict[str, Any]) -> dict[str, Any]:
    """The sections of a configuration but data, as what `Settings` takes."""
    objective = TASKS[config["task"]].objective
    return {
        "task": config["task"],
        "seed": config["seed"],
        "teacher": Teacher.of(config["teacher"]),
        "student": Model(**config["student"]),
        "training": Training(**config["training"]),
        "distillation": Distillation(**config["distillation"]),
        "trainer": Machine(**config["trainer"]),
        "compare": Comparison(**config["compare"]),
        "objective": objective(**config["objective"]) if objective is not None else None,
    }
