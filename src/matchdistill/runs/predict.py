"""What a student finds in images of one's own, and the files that are written of it."""

from __future__ import annotations

import csv
import glob
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from matchdistill.data.folder import walk
from matchdistill.data.loading import as_it_is
from matchdistill.data.module import MOST_WORKERS
from matchdistill.data.pictures import IMAGE_SUFFIXES, read_picture, unreadable
from matchdistill.files import atomic_write, path_of, read_json, write_json
from matchdistill.messages import cause, listed, number, printable, whole
from matchdistill.models import load_weights
from matchdistill.models.trust import check_trusted
from matchdistill.runs.card import student_config
from matchdistill.runs.hub import fetch
from matchdistill.runs.recipe import resolved_config
from matchdistill.runs.settings import Model
from matchdistill.runs.store import MODEL, RECIPE, WEIGHTS, check_single, describe_student, network_of
from matchdistill.runs.validate import PROGRAMS
from matchdistill.tasks import TASKS
from matchdistill.tasks.predicting import Found, Predicting
from matchdistill.tasks.task import CONFIG, Task

FORMATS = (".csv", ".json")
EXPORTED = ("model.safetensors", "model.onnx")  # in a folder for the Hub, the first that is there
DRAWN = (".jpg", ".jpeg", ".png")  # of these a drawn picture keeps its type


class Predictor:
    """A student that finds things in image files, which are prepared as the validation images of its run were.

    Args:
        source: the folder of a run; an exported folder, with its ``config.json``; or a file in either: weights
            (``.safetensors``) or a program (``.onnx``, ``.pt2``).
        top: how many classes are named for an image, one by default; or the most boxes of an image, all by default.
        batch_size: images that the student sees at a time; None: 32, and 1 for detectors and segmenters.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...; ``auto``: a GPU if there is one. Programs run on the CPU.
        workers: processes that read images; 0 reads in this one.
        skip_corrupt: leave out images that cannot be read, with a warning, instead of stopping.
        max_pixels: the most pixels of an image; None: 179 million.
        trust: build the network by whatever function the folder names, and read ``.pt2`` files, which can run code.

    Attributes:
        predicting: how the student sees pictures.
        network: the student.

    Raises:
        ValueError: in one line, why there is no student, or what would run code that is not trusted.
    """

    def __init__(
        self,
        source: str | Path,
        top: int | None = None,
        batch_size: int | None = None,
        device: str = "auto",
        workers: int = 0,
        skip_corrupt: bool = False,
        max_pixels: int | None = None,
        trust: bool = False,
    ) -> None:
        counts = {"top": top, "batch_size": batch_size, "max_pixels": max_pixels}
        problems = [problem for name, count in counts.items() for problem in whole(name, count, 1)]
        if problems := [*problems, *whole("workers", workers, 0, MOST_WORKERS)]:
            raise ValueError("; ".join(problems))
        self.source = path_of(source)
        self.network, task, config, beside = _student(self.source, trust)
        try:
            self.predicting: Predicting = task.predicting(config, top)
            self.white: float | None = config.get("white")
            if self.white is not None and (wrong := list(number("white", float(self.white), 0, above=True))):
                raise ValueError(wrong[0])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{beside}: {error}") from error
        self.predicting.check(self.network)
        self.batch_size = batch_size or self.predicting.batch_size
        self.device = device_of("cpu" if self.source.suffix.lower() in PROGRAMS else device)
        self.network = self.network.eval().to(self.device)
        self.workers, self.skip_corrupt, self.max_pixels = workers, skip_corrupt, max_pixels

    @classmethod
    def from_hub(cls, name: str, revision: str | None = None, **options: Any) -> Predictor:
        """A student of the Hugging Face Hub, which is downloaded unless it has been before; no code of others runs.

        Args:
            name: of the repository, ``USER/NAME``, as ``export --push`` has it, or of one of timm's.
            revision: a branch, a tag or a commit; None: the newest of the main branch.
            options: of a `Predictor`; ``trust`` can only be False.

        Raises:
            ValueError: in one line, why there is no such student, or what would run code.
        """
        if options.get("trust"):
            raise ValueError("code that comes from the Hub is not run: download the repository, and trust the folder")
        return cls(fetch(name, revision), **options)

    def __call__(
        self, images: str | Path | Sequence[str | Path], seen: Callable[[int], object] = lambda count: None
    ) -> list[Found]:
        """What the student finds in image files.

        Args:
            images: a file, or several.
            seen: is told, batch by batch, how many images have been seen.

        Returns:
            For each image, in their order, what was found: of a classifier ``path``, ``label``, ``score``, ``labels`` and
            ``scores``; of a detector ``path``, ``labels``, ``scores`` and ``boxes``; of a network that gives every pixel a
            class ``path``, ``labels``, ``shares`` and ``values``. Images that are skipped are left out.

        Raises:
            ValueError: an image that cannot be read, or none that can; or the student does not take them.
        """
        paths = [os.fspath(path_of(path)) for path in ([images] if isinstance(images, str | Path) else images)]
        files = _Files(paths, self.predicting, self.white, self.max_pixels)
        found: list[Found] = []
        with torch.inference_mode():
            for batch in DataLoader(files, self.batch_size, num_workers=self.workers, collate_fn=as_it_is):
                found += self._found(batch)
                seen(len(batch))
        if paths and not found:
            raise ValueError(f"none of the {len(paths)} images beside {printable(paths[0])} can be read")
        return found

    def _found(self, batch: list[tuple[str, Tensor | str]]) -> Sequence[Found]:
        """What is found in the images of a batch, of which some may be what is wrong with them."""
        readable = [(path, image.to(self.device)) for path, image in batch if isinstance(image, Tensor)]
        for _, problem in batch:
            if isinstance(problem, str):
                if not self.skip_corrupt:
                    raise ValueError(f"{problem}: repair or remove it, or skip such images with --skip_corrupt")
                warnings.warn(f"{problem} and is skipped", stacklevel=3)
        if not readable:
            return []
        paths, images = zip(*readable, strict=True)
        try:
            return self.predicting.find(self.network, paths, list(images))
        except Exception as error:  # runtimes and networks fail in every way
            raise ValueError(f"{self.source} fails on {printable(paths[0])}: {cause(error)}") from error

    def draw(self, found: Sequence[Found], folder: Path) -> None:
        """Draw what was found on copies of the images, under their names in a folder; see `drawn_paths`.

        Raises:
            ValueError: a copy would replace an image.
            OSError: the folder cannot be written.
        """
        for own, target in zip(found, drawn_paths([own.path for own in found], folder), strict=True):
            picture = own.drawn(read_picture(own.path, self.white, self.max_pixels).image)
            atomic_write(target, lambda temporary, picture=picture: picture.save(temporary))  # type: ignore[misc]

    def write_masks(self, found: Sequence[Found], folder: Path) -> None:
        """Write the class of every pixel as PNGs, under the names of the images in a folder.

        Raises:
            ValueError: the student finds no such thing, or a mask would replace an image.
            OSError: the folder cannot be written.
        """
        for own, target in zip(found, mask_paths([own.path for own in found], folder), strict=True):
            picture = own.mask()
            atomic_write(target, lambda temporary, picture=picture: picture.save(temporary))  # type: ignore[misc]


class _Files(Dataset[Any]):
    """Prepared images by number, each with its path; in place of one that cannot be read, what is wrong with it."""

    def __init__(self, paths: list[str], predicting: Predicting, white: float | None, max_pixels: int | None) -> None:
        self.paths, self.predicting, self.white, self.max_pixels = paths, predicting, white, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[str, Tensor | str]]:
        """A batch."""
        return [(self.paths[index], self._image(self.paths[index])) for index in indices]

    def _image(self, path: str) -> Tensor | str:
        try:
            return self.predicting.prepare(read_picture(path, self.white, self.max_pixels).image)
        except Exception as error:  # Pillow's readers fail in every way on damaged files
            return (
                unreadable(path, error).replace("data.max_", "max_").replace("data.white", "white")
            )  # not of a recipe


def device_of(name: str) -> torch.device:
    """A device by name; ``auto`` is a GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        accelerators = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((device for device, there in accelerators.items() if there), "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # PyTorch fails in a way of its own for each kind
        raise ValueError(f"device {name!r}: expected auto, cpu, or a GPU that is here ({cause(error)})") from error
    return device


def _student(source: Path, trust: bool) -> tuple[nn.Module, Task, Mapping[str, Any], Path]:
    """A student, its task, the values of its config.json, and the file that describes it."""
    if not source.exists():
        raise ValueError(f"{source}: there is no such file or folder")
    folder, file = (source, None) if source.is_dir() else (source.parent, source)
    check_single(folder)
    if file is not None and file.suffix.lower() == ".pt2" and not trust:
        raise ValueError(f"{file}: torch.export can run code that is in a file: give --trust if it is your own")
    if (folder / RECIPE).is_file() and not (file and (folder / CONFIG).is_file()):
        described = describe_student(folder, trust)
        task, network = TASKS[described["task"]], network_of(described)
        data, weights = resolved_config(folder / RECIPE)["data"], file or folder / WEIGHTS
        model = task.build(network, described["num_classes"])
        config = student_config(task.card(model, described, data), described, data)
        loaded = _loaded(task, network, config, weights, model)
        return loaded, task, config, folder / MODEL
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds no student: expected the folder of a run, with {RECIPE}, or an exported one, with {CONFIG}"
        )
    config = read_json(folder / CONFIG, num_classes=int)
    networks = {name: found for name, each in TASKS.items() if (found := each.network_of(config)) is not None}
    if not networks:
        raise ValueError(
            f"{folder / CONFIG} describes no student: expected task, name and options, or the architecture of timm's"
        )
    name, network = next(iter(networks.items()))
    task = TASKS[name]
    weights = file or next((path for name in EXPORTED if (path := folder / name).is_file()), folder / EXPORTED[0])
    if not trust and weights.suffix.lower() not in PROGRAMS:  # which build no network
        check_trusted(folder, (network.name, network.options))
    return _loaded(task, network, config, weights), task, config, folder / CONFIG


def _loaded(
    task: Task, network: Model, config: Mapping[str, Any], weights: Path, model: nn.Module | None = None
) -> nn.Module:
    """A student from its weights, in the model if that has been built already, or from its program."""
    if weights.suffix.lower() in PROGRAMS:
        return task.load_exported(weights)
    model = model or task.build(network, config["num_classes"])
    load_weights(model, weights)
    return model


def find_pictures(places: Sequence[Path]) -> list[str]:
    """The image files of files, folders and patterns, each once; a folder's files are in natural order (2 before 10).

    Raises:
        ValueError: a place that is not there, or a folder without images.
    """
    return list(dict.fromkeys(path for place in places for path in _pictures_of(place)))


def _pictures_of(place: Path) -> Iterator[str]:
    text = os.fspath(place)
    if place.is_dir():
        left_out: list[str] = []
        files = sorted(walk(place, left_out), key=natural)
        if left_out:
            warnings.warn(f"links to folders that are read already are left out: {listed(left_out)}", stacklevel=3)
        found = [path for path in files if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES]  # noqa: PTH122
        if not found:
            raise ValueError(f"{printable(text)} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        yield from found
    elif place.exists():
        yield text
    elif matches := sorted(glob.glob(text, recursive=True), key=natural):  # noqa: PTH207 - of any path
        for match in matches:
            yield from _pictures_of(Path(match))
    else:
        raise ValueError(f"{printable(text)}: there is no such file or folder, and nothing fits it as a pattern")


def natural(path: str) -> list[list[str | int]]:
    """By what paths are sorted as people count.

    Examples:
        >>> sorted(["frame10.png", "frame9.png", "a/1.png"], key=natural)
        ['a/1.png', 'frame9.png', 'frame10.png']
    """
    # Texts and numbers take turns, so that like is compared with like.
    return [[int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)] for name in Path(path).parts]


def drawn_paths(paths: Sequence[str], folder: Path) -> list[Path]:
    """Where copies of images go in a folder: as they lie below the folder that they have in common; PNG where not JPEG.

    Raises:
        ValueError: a copy would replace an image.
    """
    return _targets(
        paths, folder, lambda path: path if path.suffix.lower() in DRAWN else path.with_name(f"{path.name}.png")
    )


def mask_paths(paths: Sequence[str], folder: Path) -> list[Path]:
    """Where masks of images go in a folder: as `drawn_paths` has it, but with the suffix .png in place of theirs.

    Raises:
        ValueError: a mask would replace an image, or two images have the same name but for the suffix.
    """
    targets = _targets(paths, folder, lambda path: path.with_suffix(".png"))
    if twice := [target for target, count in Counter(targets).items() if count > 1]:
        raise ValueError(f"{printable(str(twice[0]))} would be the mask of two images: give them one after the other")
    return targets


def _targets(paths: Sequence[str], folder: Path, named: Callable[[Path], Path]) -> list[Path]:
    places = [os.path.abspath(path) for path in paths]  # noqa: PTH100 - links keep their names
    around = os.path.commonpath([os.path.dirname(place) for place in places]) if places else ""  # noqa: PTH120
    targets = [folder / named(Path(place).relative_to(around)) for place in places]
    originals = {os.path.realpath(place) for place in places}
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{printable(str(folder))} is a file: name a folder for the pictures")
    if lost := [target for target in targets if os.path.realpath(target) in originals]:
        raise ValueError(f"{printable(str(lost[0]))} is one of the images: draw into another folder")
    return targets


def image_ids(paths: Sequence[str]) -> list[int]:
    """Numbers of images: those that their names are, as COCO's are; else from 1 on.

    Examples:
        >>> image_ids(["val/000139.jpg", "val/000285.jpg"]), image_ids(["a.jpg", "7.jpg"])
        ([139, 285], [1, 2])
    """
    names = [Path(path).stem for path in paths]
    numbers = [int(name) for name in names if name.isdecimal()]
    return numbers if len({*numbers}) == len(names) else list(range(1, len(names) + 1))


def write_found(path: Path, predicting: Predicting, found: Sequence[Found]) -> None:
    """Write what was found as CSV or JSON, by the suffix of the file.

    Raises:
        OSError: it cannot be written; an older file is left as it was.
    """
    if path.suffix.lower() == ".json":
        ids = image_ids([own.path for own in found])
        write_json(path, [entry for own, image_id in zip(found, ids, strict=True) for entry in own.plain(image_id)])
        return
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(predicting.columns)
    table.writerows(row for own in found for row in own.rows())
    text = lines.getvalue()
    # Names that are not UTF-8 keep their bytes.
    atomic_write(path, lambda temporary: temporary.write_text(text, "utf-8", "surrogateescape", newline="\n"))
