"""The frozen teacher: run without a graph on exactly what the student was given."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from matchdistill.capture import Capture, Captured, ChangedInPlaceError, copy_of
from matchdistill.functional import wide
from matchdistill.probing import copy_of_model
from matchdistill.taps import Tap
from matchdistill.trace import tensors_in


class Cache(Protocol):
    """What may have a teacher's values without running it."""

    def values(self, captured: Captured, run: Callable[[], dict[int, Any]]) -> dict[int, Any] | None:
        """The tapped values by number of the tap, the output left in ``captured.teacher_output``; None: it has none.

        Args:
            captured: of the student, with the arguments.
            run: runs the teacher on them and returns the values as they are.
        """


class FrozenTeacher:
    """A teacher with hooks at its taps; not a module, so that nothing trains or saves its weights.

    Replicas of a student on other devices (DataParallel) get a copy of it there.

    Args:
        model: the teacher, put into evaluation mode.
        taps: where to take its features; none for its output alone.
        prepare: makes a copy of it run faster, which runs in its place; None: it runs itself.
        shared: modules that the student has too (see `shared_modules`). They stay in the student's modes, except while the
            teacher runs.

    Attributes:
        cache: has the values of some arguments, for which the teacher does not run; None: it always runs.

    Raises:
        ValueError: a tap on a module that the teacher does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[Tap] = (),
        prepare: Callable[[nn.Module], nn.Module] | None = None,
        shared: Sequence[nn.Module] = (),
    ) -> None:
        with training_kept(shared):
            model.eval()
        self.model, self.capture, self.prepare, self.shared = model, Capture(model, taps), prepare, shared
        self.cache: Cache | None = None
        self.copies: dict[str, FrozenTeacher] = {}  # by name of the device: torch.compile takes no device
        # What the copies were made of: tensors with their versions, and sums.
        self._versions: list[tuple[Tensor, int]] = []
        self._sums: list[float] = []

    def __call__(self, captured: Captured, make_copy: Callable[[int, Tensor], Any] | None = None) -> dict[int, Any]:
        """Run on the arguments that the student was called with and return the tapped values, by number of the tap.

        The teacher's own output is left in ``captured.teacher_output``. Where a value has to be copied since the teacher
        changes it later, `make_copy` may make of it what is needed.
        """
        if captured.arguments is None:
            raise ValueError(
                "the student itself was not called in the block, only its forward() or parts of it, which no hook sees: "
                "call student(images), or give the teacher's arguments to distiller.capture(images)"
            )
        if self.cache is not None and (kept := self.cache.values(captured, lambda: self._run(captured))) is not None:
            return kept
        return self._run(captured, make_copy)

    def _run(self, captured: Captured, make_copy: Callable[[int, Tensor], Any] | None = None) -> dict[int, Any]:
        assert captured.arguments is not None
        tensors = tensors_in(captured.arguments)
        teacher = self.on(tensors[0].device) if tensors else self
        # The student's graph may hold the arguments, which are therefore not the teacher's to change.
        changes = teacher.capture.changes_arguments(training=False)
        args, kwargs = copy_of(captured.arguments) if changes else captured.arguments
        given = next((value.dtype for value in tensors if value.is_floating_point()), None)
        own_type = teacher.other_type(given)
        if own_type is not None:
            args, kwargs = in_type((args, kwargs), own_type)
        try:
            with training_kept(teacher.shared), torch.no_grad(), teacher.capture(alone=True) as own:
                # All or some of it may be part of a larger model that was put into training mode.
                if any(module.training for module in teacher.model.modules()):
                    teacher.model.eval()
                own.make_copy = make_copy
                captured.teacher_output = teacher.model(*args, **kwargs)
        except ChangedInPlaceError:  # fewer calls of a module than in the passes before: now it is known
            return self._run(captured, make_copy)
        except TypeError as error:
            if misfit := _misfit(teacher.model, args, kwargs):
                raise ValueError(
                    f"the teacher ({type(teacher.model).__name__}) does not take what the student was called with: "
                    f"{misfit}. Both are run on the same arguments: give both the same signature, or wrap the teacher"
                ) from error
            raise
        if own_type is not None and given is not None and own_type.itemsize > given.itemsize:
            values: dict[int, Any] = in_type(own.values, given)
            return values
        return own.values

    def other_type(self, given: torch.dtype | None) -> torch.dtype | None:
        """The floating point type of the weights, where inputs have another one; autocast sees to it where it is on."""
        weight = next((value for value in self.model.parameters() if value.is_floating_point()), None)
        if weight is None or given in (None, weight.dtype):
            return None
        kind = weight.device.type
        converted = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return None if converted else weight.dtype

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Change every parameter and buffer, as `nn.Module._apply` does for modules that hold modules."""
        self.model._apply(fn)  # type: ignore[no-untyped-call]
        self.copies.clear()

    def look_again(self) -> None:
        """Forget copies of other weights than it has now, where these came past the tensors' versions (``.data``)."""
        if self.copies and self._summed() != self._sums:
            self.copies.clear()

    def _values(self) -> Iterator[Tensor]:
        return itertools.chain(self.model.parameters(), self.model.buffers())

    def _summed(self) -> list[float]:
        return [value.detach().sum(dtype=wide(value.device)).item() for value in self._values()]

    def on(self, device: torch.device) -> FrozenTeacher:
        """The teacher on a device: itself, or a copy of it, which follows weights that are loaded into the teacher."""
        weight = next(self.model.parameters(), None)
        if weight is None or (weight.device == device and self.prepare is None):
            return self
        compiling = torch.compiler.is_compiling()
        if not compiling and any(value._version != version for value, version in self._versions):
            self.copies.clear()
        if not self.copies:
            self._versions = [(value, value._version) for value in self._values() if not value.is_inference()]
            self._sums = self._summed()
        place = str(device)
        if place not in self.copies:
            model = copy_of_model(self.model).to(device)
            if self.prepare is not None:
                model = self.prepare(model.eval())
            self.copies[place] = FrozenTeacher(model, self.capture.taps)
            # Which copies do not have; none is needed where another engine runs it.
            if self.model._compiled_call_impl is not None and not getattr(model.forward, "elsewhere", False):
                model.compile()
        return self.copies[place]


def in_type(values: Any, dtype: torch.dtype) -> Any:
    """Nested values with floating point tensors in a type."""
    return tree_map_only(Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, values)


def shared_modules(teacher: nn.Module, student: nn.Module) -> list[nn.Module]:
    """The modules that both networks have, such as one activation for all networks of a process: they hold no tensors.

    Raises:
        ValueError: the networks share tensors.
    """
    own = {storage: name for name, value in _named_values(teacher) if (storage := _storage(value)) is not None}
    for name, value in _named_values(student):
        if (storage := _storage(value)) in own:
            raise ValueError(
                f"teacher and student share the tensor {name!r} ({own[storage]!r} in the teacher): the frozen teacher needs "
                "weights and buffers of its own, for example copy.deepcopy(teacher)"
            )
    of_student = set(student.modules())
    return [module for module in teacher.modules() if module in of_student]


def _named_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _storage(value: Tensor) -> object:
    """What two tensors have in common that share memory; None for a tensor without any."""
    if nn.parameter.is_lazy(value) or value.layout != torch.strided:
        return None
    if value.device.type == "meta":
        return id(value)
    storage = value.untyped_storage()
    return (value.device, storage.data_ptr()) if storage.nbytes() else None


@contextlib.contextmanager
def training_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules in evaluation mode, afterwards in the mode that they were in."""
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def _misfit(model: nn.Module, args: Any, kwargs: Any) -> str | None:
    """Why arguments do not fit the signature of a model's forward, if so."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None
