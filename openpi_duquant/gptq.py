"""GPTQ: rounding in which every channel makes up for the errors of those rounded before it.

Frantar et al. 2022, arXiv:2210.17323, in the form that Chee et al. 2023, arXiv:2307.13304, show to be the same. With
the second moment of the inputs H = L L^T, the squared error of the outputs is that of E L, E = W - Q, and column k of
it is `(E_k + sum_{j>k} E_j L_jk / L_kk) L_kk`. From the last channel to the first, each is rounded so that this is as
small as it can be. The inverse of H is never needed.

`fitted_gptq` lessens what GPTQ leaves: in a second turn, every code is set to what is best given all others (coordinate
descent, as in QuantEase, Behdin et al. 2023, arXiv:2309.01885), and of some scales, every row takes the one with which
its output errs least.
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

SCALE_RATIOS = (0.95, 1.0, 1.05)
"""Shares of a row's scale that are tried."""


class Feedback(NamedTuple):
    """How the errors of channels reach those that are rounded after them.

    Attributes:
        order: [K] int64, channels; rounded from the last to the first.
        factors: [K, K] fp32 in that order: L_jk / L_kk below the diagonal.
        moment: [K, K] fp32 in that order: H.
    """

    order: Tensor
    factors: Tensor
    moment: Tensor


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
        moment: [K, K] E[x x^T] of the inputs as the weight meets them, floating point, positive definite.
        order: [K] int64, channels from the last to be rounded to the first; by ascending energy when not given.

    Raises:
        DuQuantError: If it is not positive definite.
    """
    order = moment.diagonal().argsort(stable=True) if order is None else order
    moment = moment[order[:, None], order]
    factor, failed = torch.linalg.cholesky_ex(moment.double())
    if failed:
        raise DuQuantError("gptq_dampening: the second moment of the inputs is singular; take more dampening")
    factor /= factor.diagonal().clone()
    return Feedback(order, factor.float(), moment.float())


def gptq(weight: Tensor, scale: Tensor, bits: int, feedback: Feedback, *, descend: bool = False) -> Tensor:
    """Codes of a weight, rounded channel after channel.

    Args:
        weight: [N, K], floating point, finite.
        scale: [N, G] fp32, G divides K; a channel keeps its scale whatever the order.
        bits: 4 or 8.
        feedback: Of the inputs.
        descend: In a second turn, set every code to what is best given all others.

    Returns:
        [N, K] int8 within `code_range(bits)`.
    """
    codes, _ = _in_turns(weight, scale, bits, feedback, descend=descend)
    return _rows(codes, feedback.order)


def fitted_gptq(weight: Tensor, scale: Tensor, bits: int, feedback: Feedback) -> tuple[Tensor, Tensor]:
    """Codes and scales by `gptq`, descending, of every row with the scale that suits it best.

    Args:
        weight: [N, K], floating point, finite.
        scale: [N, G] fp32, G divides K; every row takes it times one of `SCALE_RATIOS`.
        bits: 4 or 8.
        feedback: Of the inputs.

    Returns:
        [N, K] int8 within `code_range(bits)`, and [N, G] fp32.
    """
    scales = torch.cat([scale * ratio for ratio in SCALE_RATIOS])
    codes, errors = _in_turns(weight, scales, bits, feedback, descend=True)
    best = output_error(errors.T, feedback.moment).view(-1, len(weight)).argmin(0)
    chosen = best * len(weight) + torch.arange(len(weight), device=best.device)
    return _rows(codes[:, chosen], feedback.order), scales[chosen]


def _rows(codes: Tensor, order: Tensor) -> Tensor:
    """Codes [K, N] of channels in that order, as [N, K] with the channels in their places."""
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def _in_turns(weight: Tensor, scales: Tensor, bits: int, feedback: Feedback, *, descend: bool) -> tuple[Tensor, Tensor]:
    """Codes [K, S N] int8 and errors [K, S N] fp32, in the feedback's order; scales [S N, G] are S for each row."""
    order, factors, moment = feedback
    values = weight.float().T[order].repeat(1, len(scales) // len(weight))
    grid = _Grid(scales.T.contiguous(), order // (weight.shape[1] // scales.shape[1]), bits)
    codes, errors = torch.empty_like(values, dtype=torch.int8), torch.zeros_like(values)
    _round_in_turn(values, grid, factors, codes, errors)
    if descend:
        pulls = (moment / moment.diagonal()).fill_diagonal_(0)
        _round_in_turn(values, grid, pulls, codes, errors)
    return codes, errors


class _Grid(NamedTuple):
    """Values that can be had: scales [G, N], the row of them that each channel has [K], and the bits of codes."""

    scales: Tensor
    groups: Tensor
    bits: int


def _round_in_turn(values: Tensor, grid: _Grid, pulls: Tensor, codes: Tensor, errors: Tensor) -> None:
    """Rounds the channels of `values` [K, N] from the last to the first.

    To channel k, sum_j pulls_jk errors_j is added; errors = values - codes * scales, which both are updated, start as
    zeros or as those of an earlier turn.
    """
    for end in range(len(values), 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        block = slice(start, end)
        wanted = values[block] + pulls[:start, block].T @ errors[:start] + pulls[end:, block].T @ errors[end:]
        scales = grid.scales[grid.groups[block]]
        _round_block(values[block], scales, code_range(grid.bits), pulls[block, block], wanted, errors[block])
        codes[block] = wanted


def _round_block(
    values: Tensor, scales: Tensor, limits: tuple[int, int], pulls: Tensor, wanted: Tensor, errors: Tensor
) -> None:
    """The same within a block; codes take the place of what is wanted [B, N].

    Five operations a channel: on a GPU, calibration waits for their launches.
    """
    low, high = limits
    channels = zip(*(of.unbind() for of in (values, scales, pulls.T, wanted, errors)))
    for value, scale, pull, code, error in reversed(list(channels)):
        code.addmv_(errors.T, pull).div_(scale).round_().clamp_(low, high)
        torch.addcmul(value, code, scale, value=-1, out=error)


def error_to_expect(rounding: Tensor, feedback: Feedback) -> Tensor:
    """The error that GPTQ leaves of a weight, if rounding the channels in turn leaves these errors.

    Channel k is rounded once `sum_{j>k} E_j L_jk / L_kk` has been added: what rounding leaves is E times the factors.
    It looks like what rounding to nearest leaves, so that the error is known without rounding channel after channel.

    Args:
        rounding: [N, K] fp32, for example of the same weight rounded to nearest.
        feedback: Of the inputs.

    Returns:
        [N, K] fp32, E = W - Q.
    """
    error = torch.empty_like(rounding)
    error[:, feedback.order] = torch.linalg.solve_triangular(
        feedback.factors, rounding[:, feedback.order], upper=False, left=False, unitriangular=True
    )
    return error


def output_error(error: Tensor, moment: Tensor) -> Tensor:
    """The diagonal of E H E^T: the mean squared error of every output, over inputs.

    Args:
        error: [N, K], E = W - Q.
        moment: [K, K], H = E[x x^T].

    Returns:
        [N], the moment's dtype.
    """
    error = error.to(moment.dtype)
    return ((error @ moment) * error).sum(1)
