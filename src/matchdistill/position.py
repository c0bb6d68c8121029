"""One distillation position: what is taken of two networks, brought to one layout, and compared.

Axes: N batch, Cs student channels, Ct teacher channels, C channels of either, G group, * position axes.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from matchdistill.alignment import align_maps, align_masked, as_map
from matchdistill.functional import batchnorm_margin
from matchdistill.taps import Tap
from matchdistill.trace import Operation


class FeaturePosition(nn.Module):
    """One distillation position: two taps, and the loss of what they take.

    Args:
        teacher: the tap of the teacher.
        student: the tap of the student.
        values: the operations that make their values.
        margin_norm: path and module of the batch norm that the teacher's value comes from; None: there is none.

    Attributes:
        guided_share: the part of the student's body, by weights, that leads to its value.
        are_maps: whether both values are maps whose positions lie as they lie in the image, as far as is known.
    """

    guided_share = 1.0

    def __init__(
        self, teacher: Tap, student: Tap, values: tuple[Operation, Operation], margin_norm: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        self._margin_norm = margin_norm  # in a tuple, as it is the teacher's: not a submodule
        self.channel_dims = values[0].channels_axis, values[1].channels_axis
        self._layouts = values[0].layout, values[1].layout
        self.are_maps = all(layout is None or layout.is_map for layout in self._layouts)
        # Of windows, the sizes of the map that they are of.
        self.spatial = tuple(value.grid if len(value.shape or ()) > 3 else value.spatial for value in values)
        self.teacher_channels, self.student_channels = values[0].channels, values[1].channels

    @property
    def name(self) -> str:
        """The taps, "teacher -> student"."""
        return f"{self.teacher} -> {self.student}"

    @property
    def margin_norm(self) -> str | None:
        """Path of the teacher's batch norm that the margins come from; None: there is none."""
        return None if self._margin_norm is None else self._margin_norm[0]

    def teacher_margin(self) -> Tensor:
        """Margins (Ct,) from the batch norm, as it is now, before the teacher's value."""
        assert self._margin_norm is not None
        norm = self._margin_norm[1]
        return batchnorm_margin(norm.weight, norm.bias)  # type: ignore[arg-type]

    def maps(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both features with the channels in axis 1 and the student's map size."""
        return align_maps(*self._channels_second(student, teacher), self._sequences(student, teacher))

    def masked_maps(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `maps`, and the positions that count (N, *), from the input's pixels (N, H, W) that do; None: all."""
        if mask is None:
            return *self.maps(student, teacher), None
        both = self._channels_second(student, teacher)
        return align_masked(*both, mask.to(student.device), self._sequences(student, teacher))

    def _channels_second(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        if student.ndim == teacher.ndim == 2:  # pooled: the images of the batch are what a channel varies over
            return student.T[None], teacher.T[None]
        teacher_dim, student_dim = self.channel_dims
        if self.are_maps or self._same_tokens(student, teacher):
            return student.movedim(student_dim, 1), teacher.movedim(teacher_dim, 1)
        teacher_layout, student_layout = self._layouts
        return as_map(student, student_layout, student_dim), as_map(teacher, teacher_layout, teacher_dim)

    def _same_tokens(self, student: Tensor, teacher: Tensor) -> bool:
        """Whether both are as many tokens in the same order: class tokens, too, are then compared."""
        alike = (
            student.ndim == teacher.ndim == 3
            and student.shape[3 - self.channel_dims[1]] == (teacher.shape[3 - self.channel_dims[0]])
        )
        return alike and all(layout is None or layout.in_order for layout in self._layouts)

    def _sequences(self, student: Tensor, teacher: Tensor) -> bool:
        """Of (N, T, C) and (N, C, L), the first are tokens of an image, the second a sequence."""
        return student.ndim == teacher.ndim == 3 and self.channel_dims == (1, 1)

    def loss(
        self, student: Tensor, teacher: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The loss of features, a scalar in the graph of the student's.

        Args:
            student: the student's value, as it was tapped.
            teacher: the teacher's.
            loss_reduction: "sum" over the elements, or their "mean".
            mask: pixels of the input that belong to an image (N, H, W), bool, True: elements elsewhere are left out;
                None: all pixels do.
        """
        raise NotImplementedError

    def forward(
        self, student: Tensor, teacher: Tensor, loss_reduction: Literal["sum", "mean"], mask: Tensor | None = None
    ) -> Tensor:
        """The loss; as the module's call, it is what ``position.compile(dynamic=True)`` compiles."""
        return self.loss(student, teacher, loss_reduction, mask)

    def extra_repr(self) -> str:
        """Taps, widths, map sizes, and the share of the student's body that the position guides."""
        widths = self.teacher_channels, self.student_channels
        sizes = " -> ".join(
            "x".join(map(str, (width, *size))) for width, size in zip(widths, self.spatial, strict=True)
        )
        return f"{self.name}, {sizes}, {self.guided_share:.0%} of the body"
