"""Symmetric rounding to integers: weights per row or per group, activations per token.

    code = clamp(round(value / scale), low, high)        value ~ code * scale

Rounding is to the nearest integer, ties to even.
"""

import math

import torch
from torch import Tensor

ACTIVATION_MAX = 127
"""Activations use -127..127, so that a code's negative is a code too."""

CLIP_RATIOS = tuple(1.0 - 0.025 * step for step in range(25))
"""Shares of the max-abs scale that the search tries."""

_SEARCH_ELEMENTS = 2**18  # 1 MB of fp32: the search's temporaries stay in cache


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a weight of that many bits: -8..7, -128..127."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def weight_scale(weight: Tensor, bits: int, group_size: int | None = None, search: str = "mse") -> Tensor:
    """Scales of a weight, per row or per group of input channels.

    Args:
        weight: [N, K], floating point.
        bits: 4 or 8.
        group_size: Channels that share a scale; divides K. None: the whole row.
        search: "max": the largest magnitude maps to the largest code. "mse": the one of `CLIP_RATIOS` times that which
            gives the least squared error of the row or group (as in OMSE, Choukroun et al. 2019, arXiv:1902.06822).

    Returns:
        [N, 1] or [N, K/group_size] fp32, positive.
    """
    groups = weight.float().reshape(-1, group_size or weight.shape[1])
    low, high = code_range(bits)
    largest = _positive(groups.abs().amax(1, keepdim=True) / high)
    if search == "mse":
        rows = max(1, _SEARCH_ELEMENTS // groups.shape[1])
        largest = torch.cat([_least_error(*part, low, high) for part in zip(groups.split(rows), largest.split(rows))])
    return largest.reshape(len(weight), -1)


def _positive(scale: Tensor) -> Tensor:
    """1 in place of 0, where all values are zero or too small to be divided; NaN stays, so that it is seen."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _least_error(groups: Tensor, largest: Tensor, low: int, high: int) -> Tensor:
    best, least = largest, torch.full_like(largest, torch.inf)
    rounded = torch.empty_like(groups)
    for ratio in CLIP_RATIOS:
        scale = largest * ratio
        torch.div(groups, scale, out=rounded).round_().clamp_(low, high).mul_(scale).sub_(groups)
        error = rounded.square_().sum(1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def quantize_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of a weight.

    Args:
        weight: [N, K], floating point.
        scale: [N, G], G divides K.
        bits: 4 or 8.

    Returns:
        [N, K] int8 within `code_range(bits)`.
    """
    groups = weight.float().reshape(*scale.shape, -1)
    return (groups / scale.unsqueeze(-1)).round_().clamp_(*code_range(bits)).to(torch.int8).reshape(weight.shape)


def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Values of codes [N, K] under scales [N, G]; fp32."""
    return (codes.float().reshape(*scale.shape, -1) * scale.unsqueeze(-1)).reshape(codes.shape)


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds every token to int8 by its own scale (dynamic, per token).

    Args:
        x: [M, K], fp32, finite.

    Returns:
        codes [M, K] int8 within -127..127, and act_scale [M, 1] fp32; a token of zeros has scale 1.
    """
    scale = _positive(x.abs().amax(-1, keepdim=True) / ACTIVATION_MAX)
    return (x / scale).round().clamp(-ACTIVATION_MAX, ACTIVATION_MAX).to(torch.int8), scale


def fake_quantize_activation(x: Tensor) -> Tensor:
    """The values that `quantize_activation` keeps of x [M, K]; fp32 [M, K]."""
    codes, scale = quantize_activation(x)
    return codes.float() * scale


def gaussian_int8_error(width: int) -> float:
    """Relative error that int8 leaves of Gaussian rows: the least to expect of activations, however well transformed.

    The errors of a row are uniform over a step, of mean square step^2 / 12, and the step is the largest of its
    magnitudes, m, over 127: sqrt(E[m^2] / 12) / 127. Right to 1% from 64 channels on.

    Args:
        width: K, independent values a row.
    """
    m = torch.linspace(0, 12, 10_001, dtype=torch.float64)
    exceeded = 1 - torch.erf(m / math.sqrt(2)) ** width  # P(largest > m)
    return math.sqrt(torch.trapezoid(2 * m * exceeded, m).item() / 12) / ACTIVATION_MAX
