"""What is known of pretrained weights: which are meant by a name, and how they want their images."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

from matchdistill.files import read_json
from matchdistill.models.preparation import preparation_problems

ANY_PRETRAINED = {"true", "pretrained", "default"}  # the library's own choice among its pretrained weights
EXPORTED, DESCRIBED = "config.json", "model.json"  # beside an exported student, and in the folder of a run


class Wanted(NamedTuple):
    """How weights want their images.

    Attributes:
        values: fields of a `Preparation`, as plain values; what is not known is left out.
        fixed: whether the network takes images of its size alone.
    """

    values: dict[str, Any]
    fixed: bool = False


def torchvision_weights(entry: str, pretrained: str) -> Any:
    """The weights of torchvision that a name stands for; None if it stands for none."""
    from torchvision import models

    choices = models.get_model_weights(entry)
    if pretrained.lower() in ANY_PRETRAINED and len(choices):
        return choices.DEFAULT
    return next((member for member in choices if member.name == pretrained), None)


def torchvision_wants(entry: str, pretrained: str, options: dict[str, Any]) -> Wanted | None:
    """How weights of torchvision want their images, as `Source.wants` has it."""
    from torchvision import models

    choice = torchvision_weights(entry, pretrained) if entry in models.list_models() else None
    if choice is None:
        return None
    made = choice.transforms()
    values = {name: list(getattr(made, name)) for name in ("mean", "std") if hasattr(made, name)}
    if len(values) < 2:
        return None  # detectors, which see to it themselves
    values["interpolation"] = made.interpolation.value
    if hasattr(made, "crop_size"):
        size, resized = made.crop_size[0], made.resize_size[0]  # of videos there are two, height and width
        values |= {"size": size, "crop_pct": size / resized}
    kind = inspect.signature(models.get_model_builder(entry)).return_annotation
    return Wanted(values, fixed=kind is models.VisionTransformer)


def timm_wants(entry: str, pretrained: str, options: dict[str, Any]) -> Wanted | None:
    """How weights of timm want their images, as `Source.wants` has it."""
    import timm
    from timm.data.config import resolve_data_config
    from timm.models._builder import resolve_pretrained_cfg

    architecture, _, tag = entry.partition(".")
    if pretrained.lower() not in ANY_PRETRAINED:
        tag = pretrained
    name = f"{architecture}.{tag}" if tag else architecture
    if not timm.is_model(architecture) or (tag and name not in timm.list_pretrained(f"{architecture}.*")):
        return None
    overlays = (options.get(name) for name in ("pretrained_cfg", "pretrained_cfg_overlay"))
    known = resolve_pretrained_cfg(name, *overlays)
    found = resolve_data_config({}, pretrained_cfg=known.to_dict())  # type: ignore[no-untyped-call]
    values = {name: list(found[name]) for name in ("mean", "std")}
    values |= {name: found[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    given, (height, width) = options.get("img_size"), found["input_size"][1:]
    size = given if isinstance(given, int) else height
    return Wanted(
        values | ({"size": size} if height == width else {}),
        fixed=bool(known.fixed_input_size) and not options.get("dynamic_img_size"),
    )


def of_student(folder: Path) -> Wanted | None:
    """What a run or an exported student in a folder says of its images; not their size, which its data had.

    Raises:
        ValueError: the file that says it is damaged.
    """
    for path in (folder / EXPORTED, folder / DESCRIBED):
        said = read_json(path) if path.is_file() else {}
        # Small gray images are resized whole, which is their data set's way and not the network's.
        names = (
            ("mean", "std") if said.get("gray") is True else ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        )
        words = said.get("preparation", said.get("pretrained_cfg", said))
        if "preparation" in said and not (isinstance(words, dict) and {"mean", "std"} <= words.keys()):
            raise ValueError(f"{path} has the preparation {words!r}: expected its mean and std, and the rest of it")
        if isinstance(words, dict) and {"mean", "std"} <= words.keys():
            values = {name: words[name] for name in names if name in words}
            if problems := list(preparation_problems(str(path), values)):
                raise ValueError("; ".join(problems))
            return Wanted(values)
    return None
