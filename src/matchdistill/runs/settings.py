"""The settings of a run, section by section. Their docstrings are the command line's help.

Each section knows what is wrong with its own values: ``problems(prefix)`` yields it, one by one, under the names that the
values have in a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

from matchdistill.data.module import Sources, path_problems
from matchdistill.messages import did_you_mean, number, whole
from matchdistill.methods import KD, Method, Weight, default_weights, parse_method
from matchdistill.models import Preparation, weights_file
from matchdistill.models.preparation import preparation_problems
from matchdistill.refresh import are_phases, rarely
from matchdistill.runs.training import Training

MOST_PROCESSES = 1024  # on a machine, and machines
MOST_RUNS = 10_000
# By name, the package of each.
LOGGERS = {"tensorboard": "tensorboard", "csv": "pytorch_lightning", "wandb": "wandb", "mlflow": "mlflow"}


@dataclass
class Model:
    """A network by name.

    Args:
        name: "torchvision:resnet50", "timm:mobilenetv1_100", "transformers:FOLDER", or "package.module:function" of yours.
        weights: a file, one of an installed package ("package:path/in/it"), the folder of a finished run of the same network
            ("runs/other"), or the library's own pre-trained name ("DEFAULT", "pretrained"); null starts at random.
        fresh_head: start with an untrained head where a file of weights is for another number of classes.
        options: further arguments of the function that builds it.
        preparation: how it wants its images, {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], interpolation: bicubic,
            crop_pct: 0.9, crop_mode: center, size: 224}, or some of these; null, and what is left out: as the library's
            weights were trained, or else as ImageNet's usually are.
        part: path of the module that is distilled, for tasks without labels; null: the whole network.
    """

    sources: ClassVar[Sources] = {"torchvision, timm": ("name", "weights")}

    name: str | None = None
    weights: str | None = None
    fresh_head: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] | None = None
    part: str | None = None

    @property
    def prepared(self) -> Preparation:
        """How it wants its images, of what is given."""
        return Preparation.of(self.preparation)

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values."""
        try:
            None if self.weights is None else weights_file(self.weights)
        except ValueError as error:
            yield f"{prefix}.{error}"
        for name in self.options:
            if not isinstance(name, str):
                yield f"{prefix}.options has the key {name!r}: expected names of arguments"
            elif name in ("name", "weights"):
                yield f"{prefix}.options.{name} cannot be given: use {prefix}.{name}"
        if not _finite(self.options):
            yield f"{prefix}.options has a number that is not finite, which model.json cannot keep: give another one"
        yield from preparation_problems(f"{prefix}.preparation", self.preparation or {})


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@dataclass
class Teacher(Model):
    """The network that teaches the student, and how to train it first.

    Args:
        name: "torchvision:resnet50", "timm:mobilenetv1_100", "transformers:FOLDER", or "package.module:function" of yours;
            null where no method needs a teacher.
        weights: a file, one of an installed package ("package:path/in/it"), the folder of a finished run of the same network
            ("runs/other"), or the library's own pre-trained name ("DEFAULT", "pretrained"); null starts at random.
        fresh_head: start with an untrained head where a file of weights is for another number of classes.
        options: further arguments of the function that builds it.
        preparation: how it wants its images, in the words of student.preparation: it sees the student's pixels, normalised
            its own way, and resized to its size where that is given or its library says that it takes no other.
        part: path of the module that is distilled, for tasks without labels; null: the whole network.
        training: how it is trained before the student; with 0 epochs it is taken as it is.
        train_limit: how many training images it learns from; null: all, whatever the student's limit.
        train_part: which part of the training images it learns from, as data.train_part; null: all, likewise.
        allow_weak: teach even if it knows nothing of the classes, or less than the student knows before training, by some
            hundred validation images; without this such a run is refused before it trains. --allow-weak-teacher sets it.
        engine: what runs it: "torch", or "onnxruntime", which takes less time on many CPUs and gives the same values within
            rounding. The network is exported once for each size of images, so all should have one size.
        cache: "disk" keeps its features of every image, for a few fixed views of it, so that it runs once for each; "none":
            it runs in every step, on images that are varied anew.
        cache_views: fixed views of each training image, of which each epoch has the next one.
        cache_folder: where the features are kept, for all runs that share them; null: matchdistill/teachers in the user's
            folder of caches ($XDG_CACHE_HOME, or ~/.cache).
        cache_gib: the most GiB in that folder: what was used the longest time ago is removed.
        cache_dtype: the type that features are kept in.
    """

    indifferent: ClassVar[frozenset[str]] = frozenset({"allow_weak", "cache_folder", "cache_gib"})

    training: Training = field(default_factory=lambda: Training(epochs=0))
    train_limit: int | None = None
    train_part: list[int] | None = None
    allow_weak: bool = False
    engine: Literal["torch", "onnxruntime"] = "torch"
    cache: Literal["none", "disk"] = "none"
    cache_views: int = 4
    cache_folder: str | None = None
    cache_gib: float = 50.0
    cache_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    @classmethod
    def of(cls, values: dict[str, Any]) -> Teacher:
        """The teacher of plain values."""
        return cls(**{**values, "training": Training(**values["training"])})

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values."""
        yield from super().problems(prefix)
        yield from self.training.problems(f"{prefix}.training")
        yield from whole(f"{prefix}.cache_views", self.cache_views, 1)
        yield from number(f"{prefix}.cache_gib", self.cache_gib, 0, above=True)
        if self.engine != "torch" and any(find_spec(package) is None for package in (self.engine, "onnxscript")):
            yield f"{prefix}.engine {self.engine!r} needs packages: pip install 'matchdistill[onnx]'"
        yield from (f"{prefix}.cache_folder: {problem}" for problem in path_problems(self.cache_folder))


@dataclass
class Distillation:
    """How the student learns from the teacher.

    Args:
        method: what the student learns from its teacher, by a name of the table of methods, for example "mgd-amp+kd".
        taps: "auto", or pairs [teacher tap, student tap] from shallow to deep, each "path:input" or "path:output".
        pooled: the pooled output as the last position, for tasks without labels.
        pyramid: of a detector, the levels of the feature pyramid too, whose margins are measured.
        weights: of the losses, by method; what is left out has the table's. A weight of features is one number for all
            positions, or a list with one for each; "paper" is the paper's form for classification.
        loss_reduction: whether these weigh the mean over a position's elements or, per image, the sum.
        norm: what the student's features pass before they are compared, batch norm or, for small batches, group norm.
        refresh_every: epochs between refreshes of the matching; 0 matches once; a list has the epochs (from 0) themselves;
            "auto": as many that refreshes see a tenth of the images of the steps at most, or 1 with `refresh_online`.
        refresh_steps: instead, pairs [from step, every], the first from step 0: from that step on the matching is refreshed
            before the steps that are multiples of the second number; 0: before no later one; null: by epochs.
        refresh_images: the most training images of a refresh.
        refresh_tolerance: stop a refresh as soon as more images would lower the mean cost of the matched pairs by no more
            than this share of it, for example 0.001; null: take them all.
        refresh_online: after the first refresh take, instead of images of their own, the features of every so many-th step
            of the epoch before; 0: do not.
        hysteresis: how much the cost of the pairs in force (0 alike, 2 unrelated) is lowered at a refresh.
        kd_temperature: of the softmax in the loss on the outputs.
    """

    method: str = "mgd-amp"
    taps: Literal["auto"] | list[tuple[str, str]] = "auto"
    pooled: bool = False
    pyramid: bool = False
    weights: dict[str, Weight] = field(default_factory=default_weights)
    loss_reduction: Literal["mean", "sum"] = "mean"
    norm: Literal["batch", "group"] = "batch"
    refresh_every: Literal["auto"] | int | list[int] = "auto"
    refresh_steps: list[list[int]] | None = None
    refresh_images: int = 20_000
    refresh_tolerance: float | None = None
    refresh_online: int = 0
    hysteresis: float = 0.0
    kd_temperature: float = 1.5

    @property
    def needs_teacher(self) -> bool:
        """Whether the method has a teacher."""
        return self.method != "none"

    @property
    def parsed(self) -> Method:
        """What the method's name says."""
        return parse_method(self.method)

    def weight(self, name: str) -> Any:
        """The weight of a method's losses, given a name of `METHODS` or `KD`."""
        return {**default_weights(), **self.weights}[name]

    @property
    def weighed_as(self) -> str:
        """The name that the weight of the positions' losses has, of a method that distils features."""
        features, family = self.parsed.features, self.parsed.family
        assert features is not None
        assert family is not None
        return family.weighed_as or features

    @property
    def feature_weight(self) -> Any:
        """The weight of the positions' losses, of a method that distils features."""
        return self.weight(self.weighed_as)

    def epochs_between(self, images: int) -> int | list[int]:
        """Epochs between refreshes, or the epochs themselves, where an epoch has so many images."""
        if self.refresh_every != "auto":
            return self.refresh_every
        return 1 if self.refresh_online else rarely(self.refresh_images, images)

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values."""
        yield from method_problems([self.method])
        if self.taps != "auto" and not self.taps:
            yield f"{prefix}.taps is empty: expected 'auto', or pairs [teacher tap, student tap]"
        for name, weight in self.weights.items():
            yield from self._weight_problems(f"{prefix}.weights", name, weight)
        every = self.refresh_every
        for epoch in every if isinstance(every, list) else [] if every == "auto" else [every]:
            yield from whole(f"{prefix}.refresh_every", epoch, 0)
        yield from whole(f"{prefix}.refresh_images", self.refresh_images, 1)
        yield from number(f"{prefix}.refresh_tolerance", self.refresh_tolerance, 0, below=1)
        yield from whole(f"{prefix}.refresh_online", self.refresh_online, 0)
        if self.refresh_online and self.refresh_steps is not None:
            yield f"{prefix}.refresh_online is of whole epochs: refresh by {prefix}.refresh_every, not refresh_steps"
        if (phases := self.refresh_steps) is not None and not are_phases(phases):
            yield (
                f"{prefix}.refresh_steps is {phases}: expected pairs [from step, every], ascending, the first from step 0, "
                "for example [[0, 5000], [20000, 31000]]"
            )
        yield from number(f"{prefix}.hysteresis", self.hysteresis, 0)
        yield from number(f"{prefix}.kd_temperature", self.kd_temperature, 0, above=True)

    @staticmethod
    def _weight_problems(prefix: str, name: str, weight: Weight) -> Iterator[str]:
        if name not in (known := default_weights()):
            yield f"{prefix} has no {name!r}{did_you_mean(name, known)}: expected {', '.join(known)}"
        elif name == KD and not isinstance(weight, (int, float)):
            yield f"{prefix}.{name} is {weight!r}: expected a finite number of at least 0"
        elif isinstance(weight, list) and not weight:
            yield f"{prefix}.{name} is empty: expected a number for each position, or one for all"
        elif not isinstance(weight, str):
            for each in weight if isinstance(weight, list) else [weight]:
                yield from number(f"{prefix}.{name}", each, 0)


def method_problems(methods: list[str]) -> Iterator[str]:
    """What is wrong with names of methods."""
    for method in dict.fromkeys(methods):
        try:
            parse_method(method)
        except ValueError as error:
            yield str(error)


@dataclass
class Machine:
    """What a run uses of the machine; the values are arguments of Lightning's `Trainer`.

    Args:
        accelerator: "auto", "cpu", "gpu" ...
        devices: how many processes per node, each with `data.batch_size` images at a time; "auto" for all devices.
        num_nodes: how many machines.
        strategy: "auto", "ddp" ...
        precision: "32-true", or mixed: "bf16-mixed", "16-mixed" (fp16 with scaled gradients, GPUs only).
        sync_batchnorm: batch norm over the images of all processes (GPUs only).
        channels_last: networks and images with the channels innermost in memory, which is often faster.
        compile: torch.compile for student, teacher and the losses of features, which needs a C++ compiler.
        prepare_teacher: run a copy of the teacher that is faster, with batch norms folded into convolutions: its values are
            the same within rounding.
        deterministic: only algorithms that give the same bits every time, on GPUs too; what has none is an error.
        loggers: what writes the curves into the folder logs: tensorboard, csv, wandb (offline), mlflow (a store of files).
        log_every: steps between entries in the logs.
        callbacks: Lightning callbacks of libraries or of your own, each as Lightning's command line has it:
            {class_path: package.module.Class, init_args: {name: value}}.
    """

    sources: ClassVar[Sources] = {
        "torch": ("sync_batchnorm", "channels_last", "compile"),
        "Lightning": (
            "accelerator",
            "devices",
            "num_nodes",
            "strategy",
            "precision",
            "deterministic",
            "loggers",
            "log_every",
        ),
        "Lightning, or yours": ("callbacks",),
    }
    indifferent: ClassVar[frozenset[str]] = frozenset({"loggers", "log_every"})

    accelerator: str = "auto"
    devices: int | Literal["auto"] = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    sync_batchnorm: bool = False
    channels_last: bool = False
    compile: bool = False
    prepare_teacher: bool = False
    deterministic: bool = False
    loggers: list[str] = field(default_factory=lambda: ["tensorboard", "csv"])
    log_every: int = 20
    callbacks: list[dict[str, Any]] = field(default_factory=list)

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values."""
        if self.devices != "auto":
            yield from whole(f"{prefix}.devices", self.devices, 1, MOST_PROCESSES, ", or auto for all")
        yield from whole(f"{prefix}.num_nodes", self.num_nodes, 1, MOST_PROCESSES)
        yield from whole(f"{prefix}.log_every", self.log_every, 1)
        for name in dict.fromkeys(self.loggers):
            if name not in LOGGERS:
                yield f"{prefix}.loggers has {name!r}{did_you_mean(name, LOGGERS)}: expected {', '.join(LOGGERS)}"
            elif find_spec(LOGGERS[name]) is None:
                yield f"{prefix}.loggers has {name!r}, which needs a package: pip install {LOGGERS[name]}"
            elif self.loggers.count(name) > 1:
                yield f"{prefix}.loggers has {name!r} more than once"
        for callback in self.callbacks:
            # Nothing is imported here: the recipe may be of somebody else, whose run is measured or described alone.
            path, arguments = callback.get("class_path"), callback.get("init_args", {})
            good = isinstance(path, str) and "." in path and isinstance(arguments, dict)
            if not good or not callback.keys() <= {"class_path", "init_args"}:
                yield (
                    f"{prefix}.callbacks has {callback}: expected {{class_path: package.module.Class, init_args: {{...}}}}, "
                    "where init_args can be left out"
                )


@dataclass
class Comparison:
    """The grid of `matchdistill compare`.

    Args:
        methods: distillation methods; the differences are to the first "none".
        seeds: runs per method, with the seeds from `seed` on.
    """

    methods: list[str] = field(default_factory=list)
    seeds: int = 3

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values."""
        yield from method_problems(self.methods)
        yield from whole(f"{prefix}.seeds", self.seeds, 1, MOST_RUNS)
        if not self.methods:
            yield f"{prefix}.methods is empty: expected one method at least"


@dataclass
class Settings:
    """What a run depends on beside its data, section by section; `objective` is the task's own, None where it has none."""

    task: str
    seed: int
    teacher: Teacher
    student: Model
    training: Training
    distillation: Distillation
    trainer: Machine
    compare: Comparison
    objective: Any = field(default=None, kw_only=True)

    @property
    def views(self) -> int:
        """Fixed views of each training image, whose features the teacher gives once; 0: images are varied anew each time."""
        return self.teacher.cache_views if self.teacher.cache != "none" and self.distillation.needs_teacher else 0

    def cache_problems(self) -> Iterator[str]:
        """What does not go together with features that are kept."""
        if not self.views:
            return
        for name in ("mixup", "cutmix"):
            if getattr(self.training, name):
                yield (
                    f"teacher.cache keeps features of single images, but training.{name} mixes the images of each batch "
                    "anew: leave one of them out"
                )
        if self.training.repeated_augmentation > 1:
            yield (
                "teacher.cache keeps features of one view of an image in an epoch, but training.repeated_augmentation "
                "varies it several times: leave one of them out"
            )
        if self.trainer.num_nodes > 1:
            yield (
                f"teacher.cache is for the processes of one machine, but trainer.num_nodes is {self.trainer.num_nodes}: "
                "leave one of them out"
            )
