"""What the library costs beside the least that it could cost, and what distilling without labels gives (`features`).

From the repository's root; each command has its own --help. Results are written as JSON, from which `page` makes
docs/speed.md.
"""

from jsonargparse import auto_cli

from benchmarks import (
    adaptive,
    alignment,
    alignment_digits,
    alignment_explained,
    assign,
    cached,
    features,
    gpu,
    kills,
    maps,
    memory,
    moco,
    page,
    profiled,
    projection,
    refresh,
    scale,
    segmentation,
    step,
    taps,
    tried_teachers,
)

COMMANDS = {
    "step": step.run,
    "tried-teachers": tried_teachers.run,
    "online": step.run_online,
    "cached": cached.run,
    "refresh": refresh.run,
    "adaptive": adaptive.run,
    "online-matching": adaptive.run_online,
    "assign": assign.run,
    "maps": maps.run,
    "memory": memory.run,
    "scale": scale.run,
    "profile": profiled.run,
    "projection": projection.run,
    "gpu": gpu.run,
    "taps": taps.run,
    "alignment": alignment.run,
    "alignment-digits": alignment_digits.run,
    "alignment-explained": alignment_explained.run,
    "features": features.run,
    "kills": kills.run,
    "moco": moco.run,
    "segmentation": segmentation.run,
    "page": page.run,
}

if __name__ == "__main__":
    auto_cli(COMMANDS, prog="python -m benchmarks", description=__doc__)
