"""GPTQ: rounding in which every channel makes up for the errors of those rounded before it.

Frantar et al. 2022, arXiv:2210.17323, in the form that Chee et al. 2023, arXiv:2307.13304, show to be the same. With
the second moment of the inputs H = L L^T, the squared error of the outputs is that of E L, E = W - Q, and column k of
it is `(E_k + sum_{j>k} E_j L_jk / L_kk) L_kk`. From the last channel to the first, each is rounded so that this is as
small as it can be. The inverse of H is never needed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from openpi_duquant.config import DuQuantError
from openpi_duquant.quant import code_range

_BLOCK = 128
"""Channels whose errors reach the others in one matmul."""

_UNSEEN = 1e-6
"""Energy of a channel that was never seen, as a share of the mean."""


class Feedback(NamedTuple):
    """How the errors of channels reach those that are rounded after them.

    Attributes:
        order: [K] int64, channels; rounded from the last to the first.
        factors: [K, K] fp32 in that order: L_jk / L_kk below the diagonal.
    """

    order: Tensor
    factors: Tensor


def dampened(moment: Tensor, dampening: float) -> Tensor:
    """The moment with `dampening` times its own energy added to every channel.

    Done before channels are transformed, it keeps apart what a rotation mixes: what is added to an outlier channel
    never covers a small one, as a share of the mean energy (the paper's) does.

    Args:
        moment: [K, K], E[x x^T], floating point.
        dampening: Above 0.

    Returns:
        [K, K] fp64, regular.

    Raises:
        DuQuantError: If the moment is not finite.
    """
    moment = moment.to(torch.float64, copy=True)
    energy = moment.diagonal()
    if not moment.sum().isfinite():
        raise DuQuantError("the calibration inputs hold NaN or Inf, or values whose squares overflow fp32")
    unseen = _UNSEEN * energy.mean() if energy.any() else torch.ones_like(energy)
    moment.diagonal().add_(dampening * energy + unseen)
    return moment


def error_feedback(moment: Tensor, order: Tensor | None = None) -> Feedback:
    """What GPTQ needs of the inputs; shared by all layers that read them.

    Args:
        moment: [K, K] E[x x^T] of the inputs as the weight meets them, floating point, positive definite; only its
            lower triangle is sure to be read.
        order: [K] int64, channels from the last to be rounded to the first; by ascending energy when not given.

    Raises:
        DuQuantError: If it is not positive definite.
    """
    order = moment.diagonal().argsort(stable=True) if order is None else order
    factor, failed = torch.linalg.cholesky_ex(moment[order[:, None], order].double())
    if failed:
        raise DuQuantError("gptq_dampening: the second moment of the inputs is singular; take more dampening")
    factor /= factor.diagonal().clone()
    return Feedback(order, factor.float())


def gptq(weight: Tensor, scale: Tensor, bits: int, feedback: Feedback) -> Tensor:
    """Codes of a weight, rounded channel after channel.

    Args:
        weight: [N, K], floating point, finite.
        scale: [N, G] fp32, G divides K; a channel keeps its scale whatever the order.
        bits: 4 or 8.
        feedback: Of the inputs.

    Returns:
        [N, K] int8 within `code_range(bits)`.
    """
    order, factors = feedback
    values, scales = weight.float().T[order], scale.T[order // (weight.shape[1] // scale.shape[1])]
    codes, errors = torch.empty_like(values), torch.zeros_like(values)
    for end in range(len(values), 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        wanted = values[start:end] + factors[end:, start:end].T @ errors[end:]
        for k in reversed(range(start, end)):
            value = wanted[k - start] + factors[k + 1 : end, k] @ errors[k + 1 : end]
            codes[k] = (value / scales[k]).round_().clamp_(*code_range(bits))
            errors[k] = values[k] - codes[k] * scales[k]
    result = torch.empty_like(codes, dtype=torch.int8)
    result[order] = codes.to(torch.int8)
    return result.T.contiguous()


def output_error(error: Tensor, moment: Tensor) -> Tensor:
    """tr(E H E^T): the mean squared error of the outputs, over inputs, summed over outputs.

    Args:
        error: [N, K], E = W - Q.
        moment: [K, K], H = E[x x^T].

    Returns:
        A scalar, the moment's dtype.
    """
    error = error.to(moment.dtype)
    return ((error @ moment) * error).sum()
