"""Weights of one group to codes: to the nearest, or by GPTQ where the inputs are known."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openpi_duquant import gptq
from openpi_duquant import quant
from openpi_duquant.gptq import Feedback
from openpi_duquant.transforms import Transform
from openpi_duquant.transforms import full_precision

DAMPENINGS = (0.01, 0.1, 1.0)
"""Dampenings that are tried on the other half of the calibration samples."""

_TRIAL_ROWS = 256


class InputMoment:
    """E[x x^T] of the inputs of one group, of every second sample apart, so that one half can judge the other.

    Args:
        width: K.
        device: Where the two [K, K] fp32 sums are held.

    Attributes:
        sample: Number of the next sample; to be set where samples come again, so that each stays in its half.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(2, width, width, device=device)
        self._rows = [0, 0]
        self.sample = 0

    def add(self, x: Tensor) -> None:
        """Counts in inputs [..., K]; a sample is one index of the first dimension, as in a batch."""
        samples = x.detach().reshape(len(x), -1, x.shape[-1]) if x.ndim > 1 else x.detach().reshape(1, 1, -1)
        for half in (0, 1):
            rows = samples[(half + self.sample) % 2 :: 2].flatten(0, 1).float()
            with full_precision(rows):
                self._sums[half].addmm_(rows.T, rows)
            self._rows[half] += len(rows)
        self.sample += len(samples)

    @property
    def rows(self) -> int:
        """Inputs counted in."""
        return sum(self._rows)

    @property
    def is_finite(self) -> bool:
        """Whether no input was NaN, Inf, or so large that its square was."""
        return bool(self._sums.sum(dtype=torch.float64).isfinite())

    @property
    def whole(self) -> Tensor:
        """[K, K] fp32, of all samples."""
        return self._sums.sum(0) / max(1, self.rows)

    @property
    def halves(self) -> list[Tensor]:
        """[K, K] fp32 of the first, third, ... sample and of the others; empty where there is one sample only."""
        return [total / rows for total, rows in zip(self._sums, self._rows)] if all(self._rows) else []


def fit_feedback(
    moment: InputMoment, transform: Transform, weight: Tensor, bits: int, dampening: float | None
) -> Feedback:
    """GPTQ's error feedback for transformed inputs.

    Args:
        moment: Of the inputs before they are transformed.
        transform: Of the inputs.
        weight: [N, K], transformed; some of its rows try the dampenings out.
        bits: 4 or 8.
        dampening: See `gptq.dampened`. None: that of `DAMPENINGS` which, fitted to half of the samples, has the least
            error to expect on the other half; with a single sample, the middle one.

    Raises:
        DuQuantError: As `gptq.dampened` and `gptq.error_feedback`.
    """

    def feedback(of: Tensor, share: float) -> Feedback:
        return gptq.error_feedback(transform.of_moment(gptq.dampened(of, share)))

    halves = moment.halves
    if dampening is not None or not halves:
        return feedback(moment.whole, dampening or DAMPENINGS[len(DAMPENINGS) // 2])
    held_out = transform.of_moment(halves[1].double()).float()
    trial = weight[:: -(-len(weight) // _TRIAL_ROWS)]
    scale = quant.weight_scale(trial, bits)
    rounding = trial - quant.dequantize_weight(quant.quantize_weight(trial, scale, bits), scale)
    errors = {}
    for share in DAMPENINGS:
        error = gptq.error_to_expect(rounding, feedback(halves[0], share))
        errors[share] = gptq.output_error(error, held_out).sum().item()
    return feedback(moment.whole, min(errors, key=errors.__getitem__))


def round_together(
    weights: Sequence[Tensor], scales: Sequence[Tensor], bits: int, feedback: Feedback | None
) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of weights that read the same inputs: by GPTQ, all at once, or to the nearest.

    Args:
        weights: [N_i, K], transformed.
        scales: [N_i, G] fp32, of each.
        bits: 4 or 8.
        feedback: Of the inputs. None: to the nearest.

    Returns:
        For each weight [N_i, K] int8 and [N_i, G] fp32.
    """
    if feedback is None:
        return [(quant.quantize_weight(weight, scale, bits), scale) for weight, scale in zip(weights, scales)]
    sizes = [len(weight) for weight in weights]
    codes, scale = gptq.fitted_gptq(torch.cat(weights), torch.cat(scales), bits, feedback)
    return list(zip(codes.split(sizes), scale.split(sizes)))
