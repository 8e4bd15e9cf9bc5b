"""openpi-duquant make-checkpoint."""

import dataclasses
import math
import pathlib
from typing import Literal

import torch
import tyro

from openpi_duquant import synthetic
from openpi_duquant.architecture import PI05
from openpi_duquant.architecture import SMALL
from openpi_duquant.commands.console import console
from openpi_duquant.progress import progress_bar


def make_checkpoint(
    folder: tyro.conf.Positional[pathlib.Path],
    *,
    model: Literal["pi05", "pi0"] = "pi05",
    size: Literal["small", "full"] = "small",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    seed: int = 0,
    action_horizon: int = 10,
) -> None:
    """Make a random checkpoint in openpi's exact format, with outlier channels as trained models have them.

    Args:
        folder: Folder to make.
        model: The policy.
        size: small takes seconds and megabytes, full is the released model's 3.6 billion parameters.
        dtype: Of all tensors.
        seed: Of the random weights.
        action_horizon: Recorded in config.json.
    """
    architecture = dataclasses.replace({"small": SMALL, "full": PI05}[size], pi05=model == "pi05")
    kind: torch.dtype = getattr(torch, dtype)
    total = sum(map(math.prod, synthetic.checkpoint_shapes(architecture).values())) * kind.itemsize
    with progress_bar(f"Making {folder.name}", total) as progress:
        synthetic.make_checkpoint(
            folder, architecture, seed=seed, dtype=kind, action_horizon=action_horizon, progress=progress
        )
    console.print(
        f"wrote {folder}: a {size} {model}, {total:,} bytes of random weights, of no use but for trying things out"
    )
