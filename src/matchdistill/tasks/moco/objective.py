"""The settings of momentum contrast. Their docstring is the command line's help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matchdistill.messages import number, whole


@dataclass
class Contrast:
    """What the student learns without labels: MoCo-v2.

    Args:
        queue: keys of earlier images that a query is told from; a multiple of the batches of all processes together.
        temperature: what the cosines of queries and keys are divided by.
        momentum: what the key encoder keeps of itself at every step.
        dimensions: of queries and keys.
    """

    queue: int = 65_536
    temperature: float = 0.2
    momentum: float = 0.999
    dimensions: int = 128

    def problems(self, prefix: str) -> Iterator[str]:
        """What is wrong with the values."""
        yield from whole(f"{prefix}.queue", self.queue, 1)
        yield from number(f"{prefix}.temperature", self.temperature, 0, above=True)
        yield from number(f"{prefix}.momentum", self.momentum, 0, below=1)
        yield from whole(f"{prefix}.dimensions", self.dimensions, 1)
