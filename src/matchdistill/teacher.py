"""The frozen teacher: run without a graph on exactly what the student was given."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from matchdistill.capture import ARGUMENTS, Capture, Captured, copy_of
from matchdistill.taps import Tap
from matchdistill.trace import tensors_in


class FrozenTeacher:
    """A teacher with hooks at its taps; not a module, so that nothing trains or saves its weights.

    Replicas of a student on other devices (DataParallel) get a copy of it there.

    Args:
        model: the teacher, put into evaluation mode.
        taps: where to take its features; none for its output alone.

    Raises:
        ValueError: a tap on a module that the teacher does not have.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap] = ()) -> None:
        self.model, self.capture = model.eval(), Capture(model, taps)
        self.copies: dict[torch.device, FrozenTeacher] = {}

    def __call__(self, captured: Captured) -> dict[int, Tensor]:
        """Run on the arguments that the student was called with and return the tapped values, by number of the tap.

        The teacher's own output is left in ``captured.teacher_output``.
        """
        assert captured.arguments is not None
        teacher = self.on(tensors_in(captured.arguments)[0].device)
        # All or some of it may be part of a larger model that was put into training mode.
        if any(module.training for module in teacher.model.modules()):
            teacher.model.eval()
        # The student's graph may hold the arguments, which are therefore not the teacher's to change.
        args, kwargs = captured.arguments if teacher.capture.keeps(ARGUMENTS, False) else copy_of(captured.arguments)
        with torch.no_grad(), teacher.capture() as own:
            captured.teacher_output = teacher.model(*args, **kwargs)
        return own.values

    def on(self, device: torch.device) -> FrozenTeacher:
        """The teacher on a device: itself, or a copy of it."""
        weight = next(self.model.parameters(), None)
        if weight is None or weight.device == device:
            return self
        if device not in self.copies:
            self.copies[device] = FrozenTeacher(copy.deepcopy(self.model).to(device), self.capture.taps)
        return self.copies[device]
