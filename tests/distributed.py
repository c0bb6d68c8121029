"""Two real processes with gloo, for tests: what every rank finds, and a place to leave it.

A module of its own, since the processes import it: it needs little.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from matchdistill import MatchingDistiller
from matchdistill import refresh as refresh_module
from matchdistill.functional import random_assignment
from networks import Plain, as_if_trained

IMAGES = 24
BATCH = 4
TOLERANCES = (0.0, 0.02, 10.0)


def run(worker: Callable[[int], Any], folder: Path, world: int = 2) -> list[Any]:
    """What ``worker(rank)`` returns in each of `world` processes that belong together."""
    mp.start_processes(_rank, (worker, str(folder), world), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, worker: Callable[[int], Any], folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(worker(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def images(count: int = IMAGES) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def distiller(**options: Any) -> MatchingDistiller:
    """The same on every rank; in double precision, as rounding depends on how images come in batches."""
    torch.manual_seed(0)
    networks = (as_if_trained(Plain(width)).double() for width in (8, 4))
    return MatchingDistiller(*networks, example=images(1), **options)


class Counter:
    """How many images a network has run."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.images = 0
        network.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: tuple[Tensor]) -> None:
        self.images += len(args[0])


def refreshed(made: MatchingDistiller, loader: Any, **options: Any) -> dict[str, Any]:
    """The state after a refresh, and how many images each network has run."""
    counters = Counter(made.teacher), Counter(made.student)
    found = made.refresh(loader, **options)
    return {
        "index": [matching.index for matching in found],
        "cost": [matching.cost for matching in found],
        "total": [matching.images for matching in found],
        "margin": [position.margin.clone() for position in made.positions],
        "run": [counter.images for counter in counters],
    }


def aligned(count: int = IMAGES) -> dict[str, Any]:
    """The maps and margins of an alignment by a refresh, with batches of which ranks get unequally many."""
    made = distiller(reduction="align")
    made.refresh(plain_loader(count))
    return {name: value for name, value in made.state_dict().items() if "rotation" in name or "margin" in name}


def plain_loader(count: int = IMAGES) -> DataLoader:
    return DataLoader(TensorDataset(images(count), torch.arange(count)), BATCH)


def sharded_loader() -> DataLoader:
    dataset = TensorDataset(images(), torch.arange(IMAGES))
    return DataLoader(dataset, BATCH, sampler=DistributedSampler(dataset, shuffle=False))


def all_at_once(rank: int) -> dict[str, Any]:
    """Everything that needs two ranks, since starting them takes longest."""
    found = {
        "plain": refreshed(distiller(), plain_loader()),
        "sharded": refreshed(distiller(), sharded_loader()),
        "sharded, limited": refreshed(distiller(), sharded_loader(), max_images=11),
        "plain, limited": refreshed(distiller(), plain_loader(), max_images=10),
        "one batch": refreshed(distiller(), plain_loader(BATCH)),
    }
    made = distiller()
    found["part"] = refreshed(made, plain_loader(), forward=lambda batch: made.student(batch[0]))
    made = distiller()
    found["padded"] = refreshed(made, plain_loader(), forward=padding(made))
    found["random"] = refreshed(drawing(rank), plain_loader())
    found["aligned"] = aligned()
    found["again"] = refreshed(made, plain_loader())
    found["step"] = step(rank)
    found |= adaptive()
    found["online"] = online(rank)
    found |= accelerated(rank)
    return found


def accelerated(rank: int) -> dict[str, Any]:
    """With loaders that Accelerate shares out, by batch samplers or as the first process reads the batches."""
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader

    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ["OMP_NUM_THREADS"] = "1"
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    loaders = {
        "": accelerator.prepare(plain_loader()),
        ", shuffled": accelerator.prepare(DataLoader(plain_loader().dataset, BATCH, shuffle=True)),
        ", dispatched": prepare_data_loader(plain_loader(), put_on_device=True, dispatch_batches=True),
    }
    return {f"accelerate{name}": refreshed(distiller(), loader) for name, loader in loaders.items()}


def adaptive() -> dict[str, Any]:
    """Refreshes that may stop early, with checks at 8 and 16 images; a rank can be without images at a check."""
    refresh_module.FIRST_CHECK = 8
    found = {}
    for tolerance in TOLERANCES:
        found[f"tolerance {tolerance}"] = refreshed(distiller(), plain_loader(), tolerance=tolerance)
        found[f"sharded, tolerance {tolerance}"] = refreshed(distiller(), sharded_loader(), tolerance=tolerance)
    found["short, with a tolerance"] = refreshed(distiller(), plain_loader(3 * BATCH), tolerance=0.0)
    return found


def online(rank: int) -> dict[str, Any]:
    """The matching by three training steps of this rank, and none but the first and third are added up."""
    made = distiller(online=2)
    made.refresh(plain_loader())
    for step in range(3):
        made.train()(images()[BATCH * (2 * step + rank) :][:BATCH])
    found = made.refresh()
    return {"cost": [matching.cost for matching in found], "total": [matching.images for matching in found]}


def padding(made: MatchingDistiller) -> Callable[[list[Tensor]], Tensor]:
    """Runs the student on images that end at different columns, in batches of different widths."""

    def forward(batch: list[Tensor]) -> Tensor:
        images, numbers = batch
        wider = torch.nn.functional.pad(images, (0, 2 * (int(numbers[0]) // BATCH % 3)), value=9.0)
        made.student(wider)
        ends = 3 + numbers % 6
        return (torch.arange(wider.shape[3]) < ends[:, None, None]).expand(-1, wider.shape[2], -1)

    return forward


def drawing(seed: int) -> MatchingDistiller:
    """One that draws its groups and their margins, from a seed."""
    made = distiller(reduction="rd", matcher=random_assignment)
    torch.manual_seed(seed)
    return made


def step(rank: int) -> dict[str, Any]:
    """One step on this rank's half of the images, gradients averaged over the ranks."""
    made = distiller()
    made.refresh(plain_loader())
    parallel = DistributedDataParallel(made.train())
    half = images()[rank * IMAGES // 2 : (rank + 1) * IMAGES // 2]
    output, loss = parallel(half)
    (loss + output.square().mean()).backward()
    return {"loss": loss.detach(), "gradients": [parameter.grad for parameter in made.parameters()]}
