"""What student and teacher make of the validation images: of each a grade, of a few that they differ in a picture.

Axes: N images, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from matchdistill.data.reading import FileDataset
from matchdistill.messages import printable
from matchdistill.runs.evidence import CONTESTED, JUDGED, save
from matchdistill.tasks.judging import Judged
from matchdistill.tasks.module import DistilledModule
from matchdistill.tasks.picture import Picture

MOST_JUDGED = 50_000  # validation images; of more, these are from all over the set
MOST_CONTESTED = 10  # pictures of images of each kind: better than the teacher, worse, and not done well
CONTESTED_SIDE = 112  # pixels of these
BETTER = 0.05  # a grade is better than another by more than this


def examine(module: DistilledModule, data: Any, out: Path) -> None:
    """Keep what student and teacher make of the validation images, and pictures of those in which they differ most."""
    if module.judge(len(data.class_names)) is None:
        return
    total = len(data.val_set)
    usable = torch.arange(total)
    if isinstance(data.val_set, FileDataset):
        usable = usable[~data.val_set.corrupt]
    places = torch.linspace(0, len(usable) - 1, min(len(usable), MOST_JUDGED)).round().long()
    index = usable[places]
    found = _judged(module, data, index)
    tensors, told = {"index": index.int()}, {}
    for role, judged in found.items():
        tensors |= {f"{name} {role}": value for name, value in judged.tensors().items()}
        told[role] = judged.told()
    about = {"images": total, "roles": told, "classes": list(data.class_names)}
    save(out / JUDGED, tensors, about)
    grades = [found[role].grade for role in ("student", "teacher") if role in found]
    chosen = index[contested(*grades)]
    if len(chosen):
        _keep_pictures(module, data, chosen.tolist(), out)


def _judged(module: DistilledModule, data: Any, index: Tensor) -> dict[str, Judged]:
    """What the "student" and the "teacher" make of the validation images with these numbers."""
    networks = {"student": module.network(), "teacher": module.teacher}
    judges = {}
    for role, network in networks.items():
        judge = module.judge(len(data.class_names))
        if network is not None and judge is not None:
            judges[role] = network, judge
    plugin = module.trainer.precision_plugin
    with plugin.val_step_context():
        for batch in data.these_dataloader(index.tolist()):
            prepared = _prepared(module, batch)
            for network, judge in judges.values():
                judge.add(network, prepared)
    return {role: judge.judged() for role, (_, judge) in judges.items()}


def _prepared(module: DistilledModule, batch: Any) -> Any:
    """A batch as a validation step gets it."""
    converted = module.trainer.precision_plugin.convert_input(batch)
    return module.on_after_batch_transfer(module.transfer_batch_to_device(converted, module.device, 0), 0)


def contested(student: Tensor, teacher: Tensor | None = None) -> Tensor:
    """The places, ascending, of images that are worth a look, by the grades (N,) of both networks.

    They are the ones that the student does better than the teacher, worse, and not well, `MOST_CONTESTED` of each at
    most: the ones with the largest difference or the worst grade first, of equal ones the first.

    Examples:
        >>> contested(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
        tensor([1, 2])
    """
    chosen = set()
    gains = [] if teacher is None else [student - teacher, teacher - student]
    for gain in (*gains, 1 - student):
        order = gain.argsort(descending=True, stable=True)[:MOST_CONTESTED]
        chosen |= set(order[gain[order] > BETTER].tolist())
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def _keep_pictures(module: DistilledModule, data: Any, numbers: list[int], out: Path) -> None:
    """Of these validation images what they show, and what student and teacher find in them."""
    tensors: dict[str, Tensor] = {}
    images: list[dict[str, Any]] = []
    paths = getattr(data.val_set, "paths", None)
    with module.trainer.precision_plugin.val_step_context():
        for number in numbers:  # one by one: images of several sizes are not padded
            batch = _prepared(module, data.val_set.__getitems__([number]))
            pictures, described = pictures_of(module, batch, data.class_names, CONTESTED_SIDE)
            for name, value in pictures.items():
                tensors[f"{name.removesuffix('0')}{len(images)}"] = value
            file = {} if paths is None else {"file": printable(str(paths[number]))}
            images.append({"number": number, **file, **described[0]})
    save(out / CONTESTED, tensors, {"images": images})


def pictures_of(
    module: DistilledModule, batch: Any, class_names: list[str], side: int
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Images of a batch, of so many pixels a side at most, and what each shows and what is found in it."""
    pictures, described = module.gallery(batch, class_names)
    tensors = {}
    for number, picture in enumerate(pictures):
        tensors[f"image{number}"] = _small(picture, side)
        for role, drawn in described[number].items():
            if isinstance(drawn, Picture):
                tensors[f"drawn {role}{number}"] = _small(drawn.pixels, side)
                described[number][role] = {"words": drawn.words}
    return tensors, described


def _small(picture: Tensor, side: int) -> Tensor:
    """An image (3, H, W) in 0..1 as bytes, of a modest size."""
    return (shrunk(picture[None].float(), side)[0].clamp(0, 1) * 255).round().byte()


def shrunk(images: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) of at most so many pixels a side."""
    scale = side / max(images.shape[2:])
    if scale >= 1:
        return images
    return F.interpolate(images, [max(1, round(scale * size)) for size in images.shape[2:]], mode="area")
