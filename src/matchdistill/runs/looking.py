"""What is looked at when a run has trained its student: networks, images, maps, and what the matching costs now.

Axes: N images, M members shown, H height, W width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matchdistill.distiller import MatchingDistiller
from matchdistill.files import read_json, write_json
from matchdistill.losses import ignored
from matchdistill.measuring import best_batch, network_costs
from matchdistill.messages import attempt
from matchdistill.probing import evaluating, unchanged
from matchdistill.runs.evidence import COSTS, FINAL, PICTURES, most_similar_first, save, save_matched
from matchdistill.runs.examining import examine, pictures_of, shrunk
from matchdistill.tasks.module import DistilledModule

LOOKED_AT = 512  # training images that the final student is compared with its teacher on
SHOWN_IMAGES, SHOWN_CHANNELS, SHOWN_MEMBERS = 4, 4, 4  # channels: so many of the best matched, and of the worst
SIDE, MAP_SIDE = 224, 56  # pixels of shown images and maps, at most


def look(module: DistilledModule, data: Any, out: Path, device: torch.device) -> None:
    """Compare the trained student with its teacher, and keep what is to be seen of it; a warning says what could not be.

    Args:
        module: after the training.
        data: of the training.
        out: folder of the run.
        device: that it was trained on.
    """

    networks = [network for network in (module.network(), module.teacher) if network is not None]

    @functools.cache
    def prepared_batch() -> Any:
        return module.transfer_batch_to_device(_shown_batch(data), device, 0)

    def look_at(what: str, work: Callable[[], None]) -> None:
        """Each finds the networks as the training left them."""

        def undone() -> None:
            module.to(device)
            with unchanged(*networks):
                work()

        attempt(what, undone)

    with torch.no_grad(), evaluating(module, *networks):
        look_at("measure the networks", lambda: _measure(module, prepared_batch(), out))
        look_at("take pictures", lambda: _take_pictures(module, prepared_batch(), data.class_names, out))
        look_at("compare the student with its teacher", lambda: _compare(module, data, out))
        look_at("judge the validation images", lambda: examine(module, data, out))


def _measure(module: DistilledModule, batch: Any, out: Path) -> None:
    costs = read_json(out / COSTS) if (out / COSTS).is_file() else {}
    one = module.one_image(batch)
    networks = {"student": module.network(), "teacher": module.teacher}
    known = {role: network for role, network in networks.items() if network is not None}
    for role, network in known.items():
        costs[role] = {**network_costs(network, one), "best": best_batch(network, one)}
    write_json(out / COSTS, costs)


def _take_pictures(module: DistilledModule, batch: Any, class_names: list[str], out: Path) -> None:
    tensors, told = _maps(module, batch)
    shown, described = pictures_of(module, batch, class_names, SIDE)
    save(out / PICTURES, shown | tensors, {"images": described, "positions": told})


def _shown_batch(data: Any) -> Any:
    """A few validation images, from all over the set."""
    count = min(SHOWN_IMAGES, len(data.val_set))
    return data.val_set.__getitems__(torch.linspace(0, len(data.val_set) - 1, count).round().int().tolist())


def _compare(module: DistilledModule, data: Any, out: Path) -> None:
    """Keep what the matching in force costs the trained student, and what the partial loss ignores."""
    distiller = module.distiller
    if not isinstance(distiller, MatchingDistiller):
        return
    sums = [position.accumulator() for position in distiller.positions]
    counts = torch.zeros(len(sums), 2)
    with module.trainer.precision_plugin.forward_context():
        for batch in data.refresh_dataloader(LOOKED_AT, module.trainer.current_epoch):
            captured, mask = distiller.run(batch, module.run_part)
            distiller.add_up(captured, mask, sums)
            values = distiller.teacher_values(captured)
            for number, position in enumerate(distiller.positions):
                student, target, margin, counted = position.loss_arguments(
                    captured.values[number], values[number], mask
                )
                left = ignored(student, target, margin)
                if counted is not None:
                    left = left.movedim(1, -1)[counted]
                counts[number] += torch.tensor([int(left.sum()), left.numel()])
    told = {"images": sums[0].images, "ignored": (counts[:, 0] / counts[:, 1].clamp_min(1)).tolist()}
    found = [position.found(total) for position, total in zip(distiller.positions, sums, strict=True)]
    save_matched(out / FINAL, distiller.positions, found, told)


def _maps(module: DistilledModule, batch: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Of the best and the worst matched student channels of each position: their maps, their members' and the target's.

    By position ``student`` (channels, N, H, W), ``members`` (channels, M, N, H, W) and ``target`` (channels, N, H, W), and
    the channels' numbers, similarities and members on these images.
    """
    if not isinstance(module.distiller, MatchingDistiller):
        return {}, []
    with module.trainer.precision_plugin.forward_context():
        captured, mask = module.distiller.run(batch, module.run_part)
    values = module.distiller.teacher_values(captured)
    tensors, told = {}, []
    for number, position in enumerate(module.distiller.positions):
        sums = position.accumulator()
        student, teacher, counted = position.masked_maps(captured.values[number], values[number], mask)
        sums.update(student, teacher, counted)
        fit = position.found(sums)
        similarity = fit.similarity
        order = most_similar_first(similarity)[: int(similarity.isfinite().sum())]
        few = min(SHOWN_CHANNELS, len(order) // 2) or len(order)
        chosen = torch.cat([order[:few], order[few:][-few:]])
        target = student.new_zeros(student.shape)
        guided = position.guided()
        target[:, slice(None) if guided is None else guided] = position.target(teacher).to(target)
        members = position.members(chosen, fit, SHOWN_MEMBERS)
        found = {
            "student": student[:, chosen],
            "target": target[:, chosen],
            "members": teacher[:, members.flatten()],
        }
        for name, maps in found.items():
            maps = _as_images(maps.float(), counted).movedim(1, 0)
            tensors[f"{name}{number}"] = maps.reshape(*members.shape, *maps.shape[1:]) if name == "members" else maps
        told.append(
            {
                "channels": chosen.tolist(),
                "similarity": similarity[chosen].tolist(),
                "members": members.tolist(),
                "group": position.group_size,
                "first": position.first_members,
            }
        )
    return tensors, told


def _as_images(maps: Tensor, counted: Tensor | None) -> Tensor:
    """Maps (N, C, *) as (N, C, H, W), of a modest size: tokens as a grid, one value as a point.

    The padding of a batch is set to zero.
    """
    if counted is not None:
        maps = maps.masked_fill(~counted[:, None], 0)
    if maps.ndim != 4:
        maps = maps.flatten(2) if maps.ndim > 2 else maps[:, :, None]
        side = math.isqrt(maps.shape[2])
        maps = maps[:, :, -side * side :].reshape(*maps.shape[:2], side, side)
    return shrunk(maps, MAP_SIDE)
