"""What is built from a folder that somebody else may have made: networks of libraries, and no code that it names.

A name of a network can be any function of any module, with any arguments. In a recipe that a user runs this is what is
wanted. In the folder of a run it would be the folder that says what is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matchdistill.models.build import SOURCES
from matchdistill.models.detection import detector
from matchdistill.models.segmentation import segmenter
from matchdistill.models.shufflenet import shufflenet_v2_x1_0
from matchdistill.models.small import small_resnet

OWN = {
    f"{module}:{function.__name__}"
    for function in (small_resnet, detector, segmenter, shufflenet_v2_x1_0)
    for module in ("matchdistill.models", function.__module__)
}


def check_trusted(folder: Path, *networks: tuple[str | None, Mapping[str, Any]]) -> None:
    """Raise a ValueError if building networks that a folder names could run other code than of known libraries.

    Args:
        folder: what names them, for the error.
        networks: of each the name, None for none, and the options of the function that builds it.
    """
    for name, options in networks:
        if name is not None and (found := _foreign(name, options)):
            raise ValueError(
                f"{folder}: {found}. From a folder, only networks of {', '.join(SOURCES)} and matchdistill are built "
                "without --trust: give it if the folder is of your own making, or you trust whoever made it"
            )


def check_trusted_data(folder: Path, code: str) -> None:
    """Raise a ValueError if reading the images of a folder's recipe runs a function that it names.

    Args:
        folder: what names it, for the error.
        code: the function as ``package.module:function``; empty for none.
    """
    if code:
        raise ValueError(
            f"{folder}: it reads its images by calling {code}, which is not done without --trust: give it if the folder is "
            "of your own making, or you trust whoever made it"
        )


def _foreign(name: str, options: Mapping[str, Any]) -> str:
    """What building a network would do that is not known to be harmless; empty if nothing."""
    library, _, entry = name.partition(":")
    if library in SOURCES:  # whose names are looked up in lists of their own
        given = [key for key in SOURCES[library].reads if key in _keys(options)]
        return f"it builds {name} with the option {given[0]}, which makes {library} read other files" if given else ""
    if name not in OWN:
        return f"it builds its network by importing {library!r} and calling {entry!r} of it"
    backbone = options.get("backbone")
    return _foreign(backbone, {}) if isinstance(backbone, str) else ""


def _keys(options: Any) -> set[str]:
    """The keys that say something in options, also in mappings and lists inside of them."""
    if isinstance(options, Mapping):
        own = {key for key, value in options.items() if value is not None}
        return (own - {"backbone"} if _untrained(options) else own).union(*map(_keys, options.values()))
    return set().union(*map(_keys, options)) if isinstance(options, list | tuple) else set()


def _untrained(options: Mapping[str, Any]) -> bool:
    """Whether options are the config of a backbone that transformers has timm build by a plain name, without its weights."""
    name = options.get("backbone")
    timms = (
        options.get("model_type") == "timm_backbone" and isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)?", name)
    )
    return bool(timms) and not options.get("use_pretrained_backbone", True)
