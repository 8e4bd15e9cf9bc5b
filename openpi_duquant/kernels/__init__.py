"""Backends: one file each, one signature, `reference` the definition of all.

    matmul(a, act_scale, weight_packed, weight_scale, bias, output_rotation, dtype) -> [M, N] dtype

a [M, K] is int8 with act_scale [M, 1] fp32 (A8), or floating point with act_scale None (A16, weights only).
"""

from collections.abc import Callable
import functools
import logging

import torch

from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import fake
from openpi_duquant.kernels import reference

logger = logging.getLogger(__name__)

Matmul = Callable[..., torch.Tensor]

BACKENDS: dict[str, Matmul] = {"reference": reference.matmul, "fake": fake.matmul}


def resolve(name: str) -> str:
    """The backend that `name` stands for; `auto` is the fastest that can run, today `reference`.

    Raises:
        DuQuantError: If there is no such backend; names those there are.
    """
    if name == "auto":
        _log_choice("reference")
        return "reference"
    if name not in BACKENDS:
        raise DuQuantError(f"unknown backend {name!r}: this version has auto, {', '.join(BACKENDS)}")
    return name


@functools.cache
def _log_choice(chosen: str) -> None:
    """Says once what `auto` took."""
    logger.info("backend auto: %s; fake simulates in floating point, and this version has no GPU kernels", chosen)
