"""How to compare, and by which observations."""

from collections.abc import Sequence
import dataclasses
from typing import Literal

import torch

from openpi_duquant.config import DuQuantError
from openpi_duquant.recording import Example


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to compare.

    Attributes:
        steps: Denoising steps; those of the recording if not given.
        limit: Observations to use, evenly spread over the recording; all if not given.
        calibration: The first so many of them calibrate the published methods, and nothing is judged by them; half if
            not given.
        method_groups: Groups of layers that the methods are compared on, evenly spread over the model; 0 for none.
        method_width: Widest input of such a layer; GPTQ's time grows with its cube.
        method_rows: Inputs that the methods are calibrated on, of each group; a quarter of that to judge by.
        asset: Folder in the original's assets/ with the norm stats that give the units, where there are several.
        worst: Layers to name as the worst.
        dtype: Type that policies compute in; float32 takes twice the memory, and has no rounding of its own to see.
        device: cpu, cuda, cuda:1, or auto (cuda where there is one).
        backend: Backend of the quantized layers.

    Raises:
        DuQuantError: On a number that is too small.
    """

    steps: int | None = None
    limit: int | None = None
    calibration: int | None = None
    method_groups: int = 12
    method_width: int = 4096
    method_rows: int = 4096
    asset: str | None = None
    worst: int = 10
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise DuQuantError(f"{name}: {value} is less than {least}")


_LEAST = {
    "steps": 1, "limit": 1, "calibration": 0, "method_groups": 0, "method_width": 1, "method_rows": 1, "worst": 0
}  # fmt: skip


def split(examples: Sequence[Example], settings: Settings) -> tuple[list[Example], list[Example]]:
    """Examples to calibrate methods on, and the later ones to judge by.

    Raises:
        DuQuantError: If none is left to judge by.
    """
    used = list(examples)
    if settings.limit is not None and settings.limit < len(used):
        places = torch.linspace(0, len(used) - 1, settings.limit).round().long().tolist()
        used = [used[place] for place in places]
    count = 0 if settings.method_groups == 0 else len(used) // 2
    if settings.calibration is not None:
        count = settings.calibration
    if not 0 <= count < len(used):
        raise DuQuantError(f"{len(used)} observations, {count} of them to calibrate on: none is left to judge by")
    return used[:count], used[count:]
