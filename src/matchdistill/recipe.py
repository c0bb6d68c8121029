"""Recipes: a run as plain values, checked as a whole before anything starts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from matchdistill.baselines import BASELINES
from matchdistill.data import ImageData
from matchdistill.messages import did_you_mean
from matchdistill.models import weights_file
from matchdistill.reduction import REDUCTIONS

SECTIONS = ("task", "seed", "data", "teacher", "student", "training", "distillation", "trainer", "compare")


@dataclass
class Training:
    """How a network is trained: SGD with momentum.

    Args:
        epochs: passes over the training images, without the warm-up.
        lr: learning rate at its highest.
        momentum: of SGD.
        nesterov: look ahead by the momentum.
        weight_decay: of SGD.
        schedule: "steps": times `gamma` at each milestone; "cosine": down to 0 over the epochs; "constant".
        milestones: epochs, from 0, at whose start "steps" lowers the learning rate.
        gamma: the factor of "steps".
        warmup_epochs: epochs before the others in which the learning rate rises from a tenth.
        validate_every: epochs between validations; the last epoch is always validated.
        accumulate: batches whose gradients make one step; at the end of an epoch those that are left do.
        ema: decay, per step, of a moving average of the weights, which is validated and saved in their place; null: none.
    """

    epochs: int = 120
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    schedule: Literal["steps", "cosine", "constant"] = "steps"
    milestones: list[int] = field(default_factory=lambda: [31, 61, 81])
    gamma: float = 0.1
    warmup_epochs: int = 0
    validate_every: int = 1
    accumulate: int = 1
    ema: float | None = None

    @property
    def all_epochs(self) -> int:
        """Epochs with the warm-up, which is added to them."""
        return self.epochs + self.warmup_epochs


@dataclass
class Model:
    """A network by name.

    Args:
        name: "torchvision:resnet50", "timm:mobilenetv1_100", or "package.module:function" of your own.
        weights: a file, one of an installed package ("package:path/in/it"), or the library's own pre-trained name
            ("DEFAULT", "pretrained"); null starts at random.
        fresh_head: start with an untrained head where a file of weights is for another number of classes.
        options: further arguments of the function that builds it.
    """

    name: str = ""
    weights: str | None = None
    fresh_head: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Teacher:
    """The network that guides the student, and how to train it first.

    Args:
        name: as of the student; null where no method needs a teacher.
        weights: as of the student.
        fresh_head: as of the student.
        options: as of the student.
        training: how it is trained before the student; with 0 epochs it is taken as it is.
        train_limit: how many training images it learns from; null: all, whatever the student's limit.
        train_part: which part of the training images it learns from, as data.train_part; null: all, likewise.
    """

    name: str | None = None
    weights: str | None = None
    fresh_head: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=lambda: Training(epochs=0))
    train_limit: int | None = None
    train_part: list[int] | None = None


@dataclass
class Distillation:
    """How the teacher guides the student.

    Args:
        method: "none"; "kd"; "mgd-amp" (or -sm, -rd, -max, -mean); to compare with, "fitnets", "at", "ofd", or
            "random-amp" (or -sm ...) with random groups instead of matched ones, never refreshed. But for "none" and "kd",
            each also with "+kd".
        taps: "auto", or pairs [teacher tap, student tap] from shallow to deep, each "path:input" or "path:output".
        loss_weight: of each position's mean loss, one for all or one for each; "paper" is the paper's form.
        refresh_every: epochs between refreshes of the matching; 0 matches once; a list has the epochs (from 0) themselves.
        refresh_images: the most training images of a refresh.
        hysteresis: how much the cost of the pairs in force (0 alike, 2 unrelated) is lowered at a refresh.
        fitnets_weight: of each position's mean squared distance, in "fitnets".
        at_weight: of each position's mean squared distance, in "at".
        ofd_weight: of each position's mean partial distance, in "ofd".
        kd_weight: of the loss on the outputs, in methods with "kd".
        kd_temperature: of the softmax there.
    """

    method: str = "mgd-amp"
    taps: Literal["auto"] | list[tuple[str, str]] = "auto"
    loss_weight: Literal["paper"] | float | list[float] = 5.0
    refresh_every: int | list[int] = 1
    refresh_images: int = 20_000
    hysteresis: float = 0.0
    fitnets_weight: float = 1.0
    at_weight: float = 10.0
    ofd_weight: float = 5.0
    kd_weight: float = 1.0
    kd_temperature: float = 1.5

    @property
    def needs_teacher(self) -> bool:
        """Whether the method has a teacher."""
        return self.method != "none"


@dataclass
class Machine:
    """What it runs on; the values are those of Lightning's `Trainer`.

    Args:
        accelerator: "auto", "cpu", "gpu" ...
        devices: how many processes per node, "auto" for all devices.
        num_nodes: how many machines.
        strategy: "auto", "ddp" ...
        precision: "32-true", "bf16-mixed", "16-mixed" (fp16 with scaled gradients, GPUs only) ...
        sync_batchnorm: batch norm over the images of all processes (GPUs only).
        channels_last: networks and images with the channels innermost in memory, which is often faster.
        compile: torch.compile for student and teacher, which needs a C++ compiler.
        deterministic: only algorithms that give the same bits every time, on GPUs too; what has none is an error.
        log_every: steps between entries in the logs.
    """

    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    sync_batchnorm: bool = False
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    log_every: int = 20


@dataclass
class Comparison:
    """The grid of `matchdistill compare`.

    Args:
        methods: distillation methods; the differences are to the first "none".
        seeds: runs per method, with the seeds from `seed` on.
    """

    methods: list[str] = field(default_factory=lambda: ["none", "kd", "mgd-sm", "mgd-amp", "mgd-amp+kd"])
    seeds: int = 3


@dataclass
class Recipe:
    """Everything that a run depends on; `config` is all of it as plain values."""

    config: dict[str, Any]
    task: str
    seed: int
    data: ImageData
    teacher: Teacher
    student: Model
    training: Training
    distillation: Distillation
    trainer: Machine
    compare: Comparison

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
        if problems := list(_contradictions(config)):
            raise ValueError("; ".join(problems))
        return cls(
            config,
            config["task"],
            config["seed"],
            ImageData(**config["data"], seed=config["seed"]),
            _teacher(config),
            Model(**config["student"]),
            Training(**config["training"]),
            Distillation(**config["distillation"]),
            Machine(**config["trainer"]),
            Comparison(**config["compare"]),
        )

    def for_teacher(self) -> Recipe:
        """The recipe that trains the teacher alone."""
        teacher = self.config["teacher"]
        return Recipe.of(
            self.config,
            student={key: teacher[key] for key in ("name", "weights", "fresh_head", "options")},
            training=teacher["training"],
            distillation__method="none",
            data__train_limit=teacher["train_limit"],
            data__train_part=teacher["train_part"],
        )

    def with_trained_teacher(self, weights: Path) -> Recipe:
        """The recipe that takes the teacher's weights from a file instead of training it."""
        return Recipe.of(self.config, teacher__weights=str(weights.resolve()), teacher__training__epochs=0)


def _teacher(config: dict[str, Any]) -> Teacher:
    return Teacher(**{**config["teacher"], "training": Training(**config["teacher"]["training"])})


class Method(NamedTuple):
    """What a method's name says.

    Attributes:
        features: how features are distilled, "mgd", "random" or one of `BASELINES`; None: they are not.
        reduction: of the matched channels, for "mgd" and "random".
        kd: whether the output is distilled.
    """

    features: str | None = None
    reduction: str | None = None
    kd: bool = False


def parse_method(method: str) -> Method:
    """What a method's name says.

    Raises:
        ValueError: an unknown method.

    Example:
        >>> parse_method("mgd-amp+kd")
        Method(features='mgd', reduction='amp', kd=True)
    """
    pairs = [(features, reduction) for features in ("mgd", "random") for reduction in REDUCTIONS]
    known = {f"{features}-{reduction}": Method(features, reduction) for features, reduction in pairs}
    known |= {name: Method(name) for name in BASELINES}
    known |= {f"{name}+kd": own._replace(kd=True) for name, own in known.items()}
    known = {"none": Method(), "kd": Method(kd=True)} | known
    if method not in known:
        raise ValueError(f"unknown method {method!r}{did_you_mean(method, known)}: expected one of {', '.join(known)}")
    return known[method]


def packaged() -> dict[str, str]:
    """The packaged recipes: name -> text."""
    folder = resources.files("matchdistill") / "recipes"
    return {
        Path(file.name).stem: file.read_text()
        for file in sorted(folder.iterdir(), key=str)
        if file.name.endswith(".yaml")
    }


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The values of a packaged recipe, or of a YAML file.

    Raises:
        ValueError: neither exists, or the file holds no YAML mapping.
    """
    known = packaged()
    path = Path(name)
    text: str | bytes
    if str(name) in known:
        text = known[str(name)]
    elif path.is_file():
        text = path.read_bytes()  # YAML finds out the encoding
    else:
        raise ValueError(
            f"no recipe {str(name)!r}: neither a file nor a packaged recipe ({', '.join(known)})"
            f"{did_you_mean(str(name), known)}"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} is no recipe: expected a mapping of sections, got {type(values).__name__}")
    return values


def recipe_parser(prog: str | None = None) -> ArgumentParser:
    """The options of a recipe."""
    parser = ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_argument("--task", type=Literal["classification"], default="classification", help="what is learned")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_class_arguments(ImageData, "data", skip={"seed"})
    parser.add_class_arguments(Teacher, "teacher")
    parser.add_class_arguments(Model, "student")
    parser.add_class_arguments(Training, "training")
    parser.add_class_arguments(Distillation, "distillation")
    parser.add_class_arguments(Machine, "trainer")
    parser.add_class_arguments(Comparison, "compare")
    return parser


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
        try:
            parser.parse_object(_nested(key, value), defaults=False)
            given[key] = value
        except ArgumentError:
            expected = str(getattr(options[key], "_typehint", "another type")).replace("typing.", "")
            problems[key] = f"{key} is {value!r}: expected {expected.removeprefix('<class ').removesuffix('>')}"
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
        others = _contradictions(plain_config(resolved))
        problems |= {text: text for text in others if not any(key in text for key in problems)}
    raise ValueError("the recipe does not fit: " + "; ".join(problems.values()))


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
    return {section: _plain(config[section]) for section in SECTIONS}


def _plain(value: Any) -> Any:
    """As it would come from YAML."""
    if isinstance(value, dict):
        # The parser notes there from which file the values of an option like --training FILE are.
        return {key: _plain(item) for key, item in value.items() if key != "__path__"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _contradictions(config: dict[str, Any]) -> Iterator[str]:
    """What a check of every value by itself cannot see."""
    try:
        ImageData(**config["data"])
    except ValueError as error:
        yield str(error)
    student, teacher, guidance = Model(**config["student"]), _teacher(config), Distillation(**config["distillation"])
    for method in dict.fromkeys([guidance.method, *config["compare"]["methods"]]):
        try:
            parse_method(method)
        except ValueError as error:
            yield str(error)
    if not student.name:
        yield "student.name is missing: name the network to train, for example timm:mobilenetv1_100"
    if guidance.needs_teacher and teacher.name is None:
        yield f"method {guidance.method!r} needs a teacher: give teacher.name"
    for section, training in (("training", Training(**config["training"])), ("teacher.training", teacher.training)):
        for name in ("epochs", "warmup_epochs", "weight_decay", "momentum"):
            if getattr(training, name) < 0:
                yield f"{section}.{name} is {getattr(training, name)}: expected 0 or more"
        if training.validate_every < 1:
            yield f"{section}.validate_every is {training.validate_every}: expected 1 (every epoch) or more"
        if training.accumulate < 1:
            yield f"{section}.accumulate is {training.accumulate}: expected 1 (a step for every batch) or more"
        if training.ema is not None and not 0 <= training.ema < 1:
            yield f"{section}.ema is {training.ema}: expected a decay from 0 to below 1, for example 0.999, or null"
        if not 0 < training.lr < math.inf:
            yield f"{section}.lr is {training.lr}: expected a finite number of more than 0"
    for section, weights in (("teacher", teacher.weights), ("student", student.weights)):
        try:
            None if weights is None else weights_file(weights)
        except ValueError as error:
            yield f"{section}.{error}"
    for section, options in (("teacher", teacher.options), ("student", student.options)):
        for name in options:
            if not isinstance(name, str):
                yield f"{section}.options has the key {name!r}: expected names of arguments"
            elif name in ("name", "weights"):
                yield f"{section}.options.{name} cannot be given: use {section}.{name}"
            elif name == "num_classes":
                yield f"{section}.options.num_classes cannot be given: the data has its number of classes"
    if config["training"]["epochs"] < 1:
        yield f"training.epochs is {config['training']['epochs']}: expected at least 1"
    epochs = guidance.refresh_every
    if min([epochs] if isinstance(epochs, int) else [0, *epochs]) < 0 or guidance.refresh_images < 1:
        yield "distillation.refresh_every must be 0 or more and distillation.refresh_images 1 or more"
    for name in ("hysteresis", "fitnets_weight", "at_weight", "ofd_weight"):
        if not 0 <= getattr(guidance, name) < math.inf:
            yield f"distillation.{name} is {getattr(guidance, name)}: expected a finite number of at least 0"
    if not (guidance.kd_temperature > 0 and guidance.kd_weight >= 0):
        yield "distillation.kd_temperature must be more than 0 and distillation.kd_weight 0 or more"
    if config["compare"]["seeds"] < 1 or not config["compare"]["methods"]:
        yield "compare needs at least one seed and one method"
