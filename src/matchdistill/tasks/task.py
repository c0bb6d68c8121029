"""What a task is: everything in which classifying, detecting and the like differ, for all that is built on it.

A task is one folder with one object that the table `TASKS` names. Recipes, runs, pages and commands ask that object and
never which task it is.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from matchdistill.data.module import DataModule
from matchdistill.engine import on_onnxruntime
from matchdistill.features import FeatureDistiller
from matchdistill.methods import method_names
from matchdistill.models import build_model
from matchdistill.models.build import weightless
from matchdistill.models.huggingface_classes import with_classes
from matchdistill.options import Taps
from matchdistill.prepare import Prepare, foldable, prepared
from matchdistill.probing import scratch
from matchdistill.runs.settings import Model, Settings
from matchdistill.tasks.exporting import Format, export_weights
from matchdistill.tasks.metric import Metric
from matchdistill.tasks.module import DistilledModule
from matchdistill.tasks.predicting import Predicting
from matchdistill.trace import traced

CONFIG = "config.json"  # beside an exported student


class Parts(NamedTuple):
    """What is distilled: corresponding networks, or parts of them.

    Attributes:
        teacher: the teacher's.
        student: the student's.
        taps: where features are taken in these.
        example: what both take, for networks that find no input of their own; None: none is needed.
    """

    teacher: nn.Module
    student: nn.Module
    taps: Taps
    example: Tensor | tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Card:
    """What the model card and the config.json of an exported student say that differs by task.

    Attributes:
        pipeline: the Hub's name of the task, its "pipeline_tag".
        library: whose loaders take the weights, the Hub's "library_name".
        config: the student's own part of config.json.
        rows: of the card's first table, by heading.
        images: how images are prepared, in a sentence or two.
        use: the code that loads a file, given its format and its name.
        beside: other files that the loaders read, by name, each as plain values for JSON.
    """

    pipeline: str
    library: str
    config: dict[str, Any]
    rows: Mapping[str, str]
    images: str
    use: Callable[[str, str], str]
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def preparation_of(settings: Settings) -> Prepare | None:
    """What makes a copy of the teacher that runs faster, as the settings want it; None: the teacher itself runs."""
    if settings.teacher.engine != "torch":
        return on_onnxruntime
    return prepared if settings.trainer.prepare_teacher else None


class Task(ABC):
    """One task. What is not abstract is what most tasks do.

    Attributes:
        name: what recipes call it.
        data: its data module.
        metrics: everything that is measured, of which a run may lack some. Empty: nothing.
        compared: the methods of a comparison, unless a recipe says otherwise.
        description: what `describe` gives, by name, each with its kind for `files.is_kind`.
        formats: that a student is exported in.
        objective: the class of its own section of recipes, "objective", with a method ``problems(prefix)``; None: there is
            none.
        supports: what not every task does: "kd" (the output is distilled), "labels" (images have one label each),
            "pyramid" (the levels of a feature pyramid are distilled), "pooled" (the pooled output is), "part" (a part of a
            network by its name is), "compile" (networks are compiled), "preparation" (the data prepares images as the
            student wants them, and the teacher takes (N, C, H, W)), "resize" (`export` takes where the output is resized),
            "cache" (batches are single images and their labels, so that the teacher's features can be kept), "engine"
            (images have few sizes, so that a program can be made of the teacher for each);
            and names of the settings of `Training.of_labels` that it has without "labels".
        learns_from: what a student learns from beside its teacher; empty: nothing.
        of_classes: whether networks have a head for the data's classes, so that nobody gives their number.
        by_teacher: whether students may be measured by their teacher, which is then built whatever the method.
        usual: the name of a student, for messages.
    """

    name: ClassVar[str]
    data: ClassVar[type[DataModule]]
    metrics: ClassVar[tuple[Metric, ...]] = ()
    compared: ClassVar[tuple[str, ...]] = ("none", "mgd-sm", "mgd-amp")
    description: ClassVar[Mapping[str, Any]] = {}
    formats: ClassVar[tuple[str, ...]] = ("safetensors",)
    objective: ClassVar[type[Any] | None] = None
    supports: ClassVar[frozenset[str]] = frozenset()
    learns_from: ClassVar[str] = "labels"
    of_classes: ClassVar[bool] = True
    by_teacher: ClassVar[bool] = False
    usual: ClassVar[str] = "timm:mobilenetv1_100"

    @property
    def comparable(self) -> tuple[Metric, ...]:
        """The metrics that methods are compared by; of several, the first that the runs have."""
        return self.metrics[:1]

    def problems(self, settings: Settings) -> Iterator[str]:
        """What of a recipe's settings does not fit the task, one by one."""
        known = method_names()
        for method in dict.fromkeys([settings.distillation.method, *settings.compare.methods]):
            if method in known and known[method].kd and "kd" not in self.supports:
                yield f"method {method!r} distils the output of classifiers: choose one without kd for {self.name}"
        if settings.distillation.pyramid and "pyramid" not in self.supports:
            yield f"distillation.pyramid is not for {self.name}: give taps of your own instead"
        if settings.distillation.pooled and "pooled" not in self.supports:
            yield f"distillation.pooled is not for {self.name}: leave it out"
        for role, network in (("student", settings.student), ("teacher", settings.teacher)):
            if self.of_classes and "num_classes" in network.options:
                yield f"{role}.options.num_classes cannot be given: the data has its number of classes"
            if network.part is not None and "part" not in self.supports:
                yield f"{role}.part is not for {self.name}: leave it out"
            if network.preparation is not None and "preparation" not in self.supports:
                yield f"{role}.preparation is not for {self.name}, whose networks prepare images themselves: leave it out"
        if settings.teacher.cache != "none" and "cache" not in self.supports:
            yield f"teacher.cache is not for {self.name}, whose images are not varied each on its own: leave it out"
        if settings.teacher.engine != "torch" and "engine" not in self.supports:
            yield f"teacher.engine is not for {self.name}, whose images come in many sizes: leave it out"
        if settings.trainer.compile and "compile" not in self.supports:
            yield f"trainer.compile is not for {self.name}: train without it"
        if "labels" not in self.supports:
            for section, training in (("training", settings.training), ("teacher.training", settings.teacher.training)):
                for name in (each for each in training.of_labels if each not in self.supports):
                    yield f"{section}.{name} is for images with one label each, not for {self.name}: leave it out"

    def build(self, model: Model, num_classes: int | None, class_names: Sequence[str] = ()) -> nn.Module:
        """A network by name.

        Args:
            model: its name, weights and options.
            num_classes: the size of its head; None: as the weights have it.
            class_names: of the classes, in the data's order; empty: weights keep theirs.

        Raises:
            ValueError: an unknown name, or weights that do not fit or cannot be had.
        """
        assert model.name is not None
        network = build_model(model.name, num_classes, model.weights, model.fresh_head, **model.options)
        return with_classes(network, model.name, model.weights, class_names)

    def preparing(
        self, settings: Settings, data: DataModule, teacher: nn.Module | None, distiller: FeatureDistiller | None
    ) -> Callable[[nn.Module], nn.Module] | None:
        """What makes a copy of a teacher that runs faster, where no distiller runs it; None: it runs itself."""
        prepare = preparation_of(settings)
        if prepare is None or teacher is None or distiller is not None:
            return None
        return functools.partial(prepare, folds=foldable(traced(teacher, (self.example(data),))))

    def seeing(self, network: nn.Module) -> nn.Module:
        """The module that is given the images, whether all of a network runs or the part that is distilled."""
        return network

    def bare(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a network without the weights that its backbone starts from: its own are loaded afterwards."""
        return weightless(options)

    def measures_loss(self, data: DataModule) -> bool:
        """Whether a student is measured by the loss of its features on validation images too, which takes a distiller."""
        return False

    @abstractmethod
    def example(self, data: DataModule) -> Any:
        """What a network of the task is called with, of the data's size: zeros."""

    @abstractmethod
    def check(self, network: nn.Module, data: DataModule, role: str) -> None:
        """Raise a ValueError unless a network, the "student" or the "teacher", takes the data and gives what is needed.

        The network's modes and state stay as they are: `probing.scratch` gives a copy to try.
        """

    def started(self, student: nn.Module, settings: Settings, data: DataModule) -> nn.Module:
        """A student, which has its weights, as its training is to start.

        Raises:
            ValueError: it cannot start so.
        """
        return student

    def try_training(self, student: nn.Module, data: DataModule) -> Any:
        """See that the student can be trained, before its modules are replaced or hooked.

        Returns:
            What `module` has to know of it.

        Raises:
            ValueError: it cannot be trained on the data.
        """
        return None

    def check_batches(self, student: nn.Module, data: DataModule) -> None:
        """Raise a ValueError if batches have one image each, and a batch norm of the student cannot take a single value."""
        example = self.example(data)
        if data.options.batch_size > 1 or not isinstance(example, Tensor):
            return
        try:
            with torch.no_grad(), scratch(student) as probe:
                probe.train()(example[:1])
        except Exception as error:  # others are told where they matter
            if "more than 1 value per channel" in str(error):
                raise ValueError(
                    "data.batch_size is 1, and a batch norm of the student then sees a single value per channel: give "
                    "at least 2"
                ) from error

    def parts(self, teacher: nn.Module, student: nn.Module, settings: Settings, data: DataModule) -> Parts:
        """What is distilled of two networks.

        Raises:
            ValueError: they cannot be distilled, or not as the settings say.
        """
        return Parts(teacher, student, settings.distillation.taps, self.example(data))

    @abstractmethod
    def module(
        self,
        settings: Settings,
        data: DataModule,
        student: nn.Module,
        teacher: nn.Module | None,
        distiller: FeatureDistiller | None = None,
        tried: Any = None,
    ) -> DistilledModule:
        """What trains and measures a student.

        Args:
            settings: of the run.
            data: what it is trained on.
            student: the network.
            teacher: its teacher, if the method has one.
            distiller: of their features, if the method distils them.
            tried: what `try_training` returned.
        """

    def tapped(self, name: str, options: dict[str, Any]) -> nn.Module:
        """What is distilled of a network by name, to look at its taps."""
        return build_model(name, **options)

    def describe(self, data: DataModule) -> dict[str, Any]:
        """What has to be known of the data to use the student, as plain values; see `description`."""
        return {}

    def export(
        self, student: nn.Module, rebuilt: nn.Module, described: dict[str, Any], path: Path, kind: Format
    ) -> float:
        """Write a student and read it back to see that it is the same.

        Args:
            student: with its weights.
            rebuilt: the same network, to load the file into.
            described: the student, as `model.json` has it.
            path: the file.
            kind: one of `formats`.

        Returns:
            The largest absolute difference of what both compute, or of their weights.

        Raises:
            ValueError: the student cannot be exported, or is another one then; nothing is left at the path.
        """
        return export_weights(student, rebuilt, path)

    def load_exported(self, path: Path, data: DataModule | None = None) -> nn.Module:
        """An exported program as a student.

        Args:
            path: the file.
            data: what the student must take; None: that is not checked.

        Raises:
            ValueError: the task has no exported programs, the file holds none, or it does not fit the data.
        """
        raise ValueError(
            f"{path}: the students of the task {self.name} are measured from weights (.safetensors, .ckpt)"
        )

    def network_of(self, config: Mapping[str, Any]) -> Model | None:
        """The network that a config.json describes; None: it describes none of the task's."""
        name, options, part = config.get("name"), config.get("options"), config.get("part")
        mine = config.get("task") == self.name and isinstance(name, str) and isinstance(options, dict)
        fits = mine and (part is None or isinstance(part, str))
        return Model(name, options=options or {}, part=part) if fits else None

    def predicting(self, config: Mapping[str, Any], top: int | None = None) -> Predicting:
        """How an exported student is used on images of one's own.

        Args:
            config: the values of its config.json.
            top: how much of what it finds in an image is kept, the best first; None: what is usual.

        Raises:
            ValueError: the task finds nothing in single images, or the values do not say how.
        """
        raise ValueError(f"students of the task {self.name} do not predict from single images")

    @abstractmethod
    def card(self, student: nn.Module, described: dict[str, Any], data: dict[str, Any]) -> Card:
        """What goes with an exported student.

        Args:
            student: the network.
            described: the student, as `model.json` has it.
            data: the recipe's section of that name, as plain values.
        """


def python_block(code: str) -> str:
    """Code in a model card."""
    return f"```python\n{code}\n```"


def weights_code(build: str, described: dict[str, Any], file: str) -> str:
    """The code that loads a file of weights into a network by name, for a model card.

    Args:
        build: the function of `matchdistill.models` that builds it.
        described: the student, as `model.json` has it.
        file: the file's name.
    """
    options = f", **{described['options']!r}" if described["options"] else ""
    return python_block(
        f"from matchdistill.models import {build}, load_weights\n"
        f"model = {build}({described['name']!r}, {described['num_classes']}{options}).eval()\n"
        f'load_weights(model, "{file}")'
    )
