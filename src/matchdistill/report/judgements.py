"""What the networks of a run make of its validation images, side by side.

Axes: N images.
"""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matchdistill.report.gallery import KINDS, described
from matchdistill.report.runs import Run
from matchdistill.runs.examining import BETTER
from matchdistill.tasks.judging import Judged

ALONE, TEACHER = "student alone", "teacher"
MOST_SHOWN = 8  # images that were won, or lost


def own_name(run: Run) -> str:
    """What a page calls the student of a run."""
    return ALONE if run.method == "none" else run.method


def judged(run: Run) -> dict[str, Judged]:
    """What is known of the student alone, the run's own student and the teacher, in this order, by name."""
    if run.examined is None:
        return {}
    found: dict[str, Judged] = {}
    if run.alone is not None and run.alone.examined is not None and _same_images(run, run.alone):
        found[ALONE] = run.alone.examined.roles["student"]
    found[own_name(run)] = run.examined.roles["student"]
    if "teacher" in run.examined.roles:
        found[TEACHER] = run.examined.roles["teacher"]
    return found


def _same_images(run: Run, other: Run) -> bool:
    """Whether two runs were judged by the same validation images."""
    ours, theirs = run.examined, other.examined
    assert ours is not None
    assert theirs is not None
    return ours.images == theirs.images and ours.classes == theirs.classes and ours.index.equal(theirs.index)


class Against(NamedTuple):
    """How many images a student does better, and worse, than another network, and pictures of some.

    Attributes:
        other: the other network.
        won: places of images that the student does better (n,).
        lost: likewise worse.
        total: how many images were looked at.
        shown: by "won" and "lost" what the page shows.
    """

    other: str
    won: Tensor
    lost: Tensor
    total: int
    shown: dict[str, list[dict[str, Any]]]


def against(run: Run) -> list[Against]:
    """The run's student against the student alone and against the teacher, as far as both are known."""
    if run.examined is None:
        return []
    name, found = own_name(run), judged(run)
    rows = []
    for other in (role for role in found if role != name):
        gain = found[name].grade - found[other].grade
        won, lost = (torch.nonzero(side > BETTER).flatten() for side in (gain, -gain))
        shown = {"won": _shown(run, won), "lost": _shown(run, lost)}
        rows.append(Against(other, won, lost, len(gain), shown))
    return rows


def _shown(run: Run, places: Tensor) -> list[dict[str, Any]]:
    """Pictures of the images at these places, as far as the run or the student alone has kept some."""
    assert run.examined is not None
    numbers = run.examined.index[places].tolist()
    kept = [(own_name(run), run)] + ([(ALONE, run.alone)] if ALONE in judged(run) and run.alone else [])
    found: list[dict[str, Any]] = []
    for place, number in zip(places.tolist(), numbers, strict=True):
        of_image: dict[str, Any] = {}
        for name, each in kept:
            image = each.contested.get(number)
            if image is None or each.contested_tensors is None:
                continue
            own = described(each.contested_tensors, image["place"], image, f"validation image {number}")
            of_image = _merged(of_image, own, name)
        if of_image and len(found) < MOST_SHOWN:
            of_image["words"] |= _words(run, place, of_image)
            of_image["title"] = f"image {number}" + (f", {of_image['file']}" if of_image["file"] else "")
            found.append(of_image)
    return found


def _merged(before: dict[str, Any], image: dict[str, Any], name: str) -> dict[str, Any]:
    """An image with what a run says of it added to what another one has said; its "student" is called by its name."""
    merged = before or {**image, **{kind: {} for kind in KINDS}}
    for kind in KINDS:
        renamed = {name if role == "student" else role: each for role, each in image[kind].items()}
        merged[kind] = {**renamed, **merged[kind]}
    return merged


def _words(run: Run, place: int, image: dict[str, Any]) -> dict[str, str]:
    """What networks find in an image of which only a class and a probability are kept."""
    if run.examined is None or image["boxes"] or image["pictures"]:
        return {}
    words, names = {}, run.examined.classes
    for role, each in judged(run).items():
        if role not in image["words"] and each.found is not None and each.confidence is not None:
            label = int(each.found[place])
            name = names[label] if label < len(names) else f"class {label}"
            words[role] = f"{name} ({float(each.confidence[place]):.0%})"
    return words


def files(run: Run) -> list[dict[str, str]]:
    """The student's files: how large they are, or the command that makes them."""
    rows = []
    for path in [run.folder / "student.safetensors", *sorted((run.folder / "export").glob("model.*"))]:
        if path.is_file():
            rows.append({"file": path.relative_to(run.folder).as_posix(), "size": size_in_words(path.stat().st_size)})
    for kind in run.task.formats:
        if not (run.folder / "export" / f"model.{kind}").is_file():
            command = f"matchdistill export {shlex.quote(str(run.folder))} --format {kind}"
            rows.append({"file": f"export/model.{kind}", "size": "", "command": command})
    return rows if run.metrics else []


def size_in_words(count: float) -> str:
    """A number of bytes.

    Examples:
        >>> size_in_words(12_345_678)
        '12.3 MB'
    """
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
