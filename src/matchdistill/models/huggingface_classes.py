"""The order of the classes of networks of transformers, whose configs name them."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matchdistill.files import path_of
from matchdistill.messages import listed
from matchdistill.models.build import weights_file
from matchdistill.models.huggingface_detection import TransformersDetector

GENERIC = re.compile(r"LABEL_\d+")  # what transformers calls a class without a name
SYNSET = re.compile(
    r"n\d{8}"
)  # a class folder of ImageNet: sorted, they are in the order of every network for ImageNet
MOST = 5  # names in a message


def with_classes(model: nn.Module, name: str, weights: str | None, class_names: Sequence[str]) -> nn.Module:
    """A network whose classes are the data's in their order, where it is one of transformers.

    If its weights are for the same classes in another order, the rows of its head are put into the data's, with a warning.
    A warning also says which classes have other names. Then its config has the data's names.

    Args:
        model: the network, with its weights; one of another library is returned as it is.
        name: the network's, as `build_model` takes it.
        weights: likewise; None: it has none, and no order.
        class_names: of the data; networks for another number of classes are returned as they are.

    Raises:
        ValueError: the order is another one, and the head's rows are not found.
    """
    library, _, entry = name.partition(":")
    own: Any = model.model if isinstance(model, TransformersDetector) else model
    if library != "transformers" or not class_names or own.config.num_labels != len(class_names):
        return model
    named = [str(own.config.id2label.get(number, "")) for number in range(len(class_names))]
    if weights is not None and _of_config(entry, weights) and not all(map(GENERIC.fullmatch, named)):
        theirs, ours = _plain(named), _plain(class_names)
        if set(theirs) == set(ours):
            if theirs != ours:
                _reorder(own, name, torch.tensor([theirs.index(each) for each in ours]))
                warnings.warn(
                    f"model {name!r} has the data's classes in another order ({listed(named, MOST)}): its outputs are put "
                    "into the data's order",
                    stacklevel=3,
                )
        elif not all(map(SYNSET.fullmatch, class_names)):
            unknown = [each for each, plain in zip(named, theirs, strict=True) if plain not in ours]
            lacking = [each for each, plain in zip(class_names, ours, strict=True) if plain not in theirs]
            warnings.warn(
                f"model {name!r} has classes that the data does not have ({listed(unknown, MOST)}), and the data has "
                f"others ({listed(lacking, MOST)}): its first class is taken for the data's first, and so on. If these "
                "are the same classes in another order, give them the same names in id2label of its config.json; if they "
                "are other classes, choose a method without kd",
                stacklevel=3,
            )
    own.config.id2label = dict(enumerate(class_names))
    own.config.label2id = {text: number for number, text in enumerate(class_names)}
    return model


def _of_config(entry: str, weights: str) -> bool:
    """Whether weights are what a config names the classes of: its library's own, or a file in its folder."""
    file = weights_file(weights)
    folder = path_of(entry)
    return file is None or (folder.is_dir() and Path(file).resolve().parent == folder.resolve())


def _plain(names: Sequence[str]) -> list[str]:
    """Names without what is a matter of taste, unless two are the same then."""
    plain = [re.sub(r"[\s_-]+", " ", name).strip().casefold() for name in names]
    return plain if len(set(plain)) == len(plain) else list(names)


def _reorder(model: Any, name: str, order: Tensor) -> None:
    """Put the rows of a head into another order: the entries that the number of classes decides about."""
    config, count = copy.deepcopy(model.config), len(order)
    config.num_labels = count + 1
    with torch.random.fork_rng(devices=[]):
        shapes = {key: value.shape for key, value in type(model)(config).named_parameters()}
    found = []
    for key, value in model.named_parameters():  # tied ones once
        changed = [axis for axis, size in enumerate(value.shape) if shapes[key][axis] != size]
        if changed:
            axis, size = changed[0], value.shape[changed[0]]
            found.append((value, axis, size))
            # A detector has one row more, the last, of no object.
            if len(changed) > 1 or size not in (count, count + 1) or shapes[key][axis] != size + 1:
                found.clear()
                break
    if not found:
        raise ValueError(
            f"model {name!r} has the data's classes in another order, and the rows of its head are not found: rename the "
            "classes so that their order is the network's"
        )
    with torch.no_grad():
        for value, axis, size in found:
            rows = torch.cat([order, torch.arange(count, size)]).to(value.device)
            value.copy_(value.index_select(axis, rows))
