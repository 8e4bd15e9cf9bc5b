"""W4A8 as others have published it, to be measured beside ours: one function a method, as its paper has it.

A method takes the weight of layers that read one input and some of these inputs, and returns what it makes of both.
None is tuned here; where a paper leaves scales open, all get the MSE-searched ones of `quant.weight_scale`.
"""

from collections.abc import Callable
import dataclasses
import math

import torch
from torch import Tensor

from openpi_duquant import fitting
from openpi_duquant import gptq
from openpi_duquant import quant
from openpi_duquant.transforms import Transform

BITS = 4


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a method makes of a layer.

    Attributes:
        transform: x [M, K] -> what is rounded to int8 per token, [M, K].
        weight: [N, K] fp32, the values that the rounded weight has, for transformed inputs.
    """

    transform: Callable[[Tensor], Tensor]
    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's outputs [M, N] for inputs x [M, K], fp32."""
        return quant.fake_quantize_activation(self.transform(x)) @ self.weight.T


Method = Callable[[Tensor, Tensor], Fitted]
"""Weight [N, K] and calibration inputs [M, K], both fp32 -> `Fitted`."""


def round_to_nearest(weight: Tensor, x: Tensor) -> Fitted:
    """RTN: per-row scales from the largest weight."""
    del x
    return Fitted(lambda x: x, _nearest(weight, "max"))


def clipped(weight: Tensor, x: Tensor) -> Fitted:
    """The preset `simple`: RTN with scales of least squared error (OMSE, Choukroun et al. 2019, arXiv:1902.06822)."""
    del x
    return Fitted(lambda x: x, _nearest(weight))


def hadamard(weight: Tensor, x: Tensor, block: int = 64) -> Fitted:
    """Blocks of channels rotated by a Hadamard matrix, nothing else."""
    del x
    transform = Transform(rotation=math.gcd(block, weight.shape[1]))
    return Fitted(transform.apply, _nearest(transform.apply(weight)))


def quarot(weight: Tensor, x: Tensor) -> Fitted:
    """QuaRot's rotation (Ashkboos et al. 2024, arXiv:2404.00456): one Hadamard over all channels, RTN.

    Of a width that is no power of two, the largest power of two that divides it is rotated at a time.
    """
    width = weight.shape[1]
    return hadamard(weight, x, width & -width)


def released_duquant(weight: Tensor, x: Tensor, block: int = 128) -> Fitted:
    """DuQuant (Lin et al. 2024, arXiv:2406.01721) as its released code has it.

    SmoothQuant by 0.5, then rotate - zigzag - rotate; one greedy rotation, of the activations, for all blocks.
    """
    block = math.gcd(block, weight.shape[1])
    smooth = (x.abs().amax(0).clamp(min=1e-5) / weight.abs().amax(0).clamp(min=1e-5)).sqrt()
    first = _shared_rotation(x / smooth, block)
    rotated = Transform(rotation=first).apply(x / smooth)
    order = fitting.zigzag_permutation(rotated.abs().amax(0), block)
    transform = Transform(first, order, _shared_rotation(rotated[:, order], block))
    return Fitted(lambda x: transform.apply(x / smooth), _nearest(transform.apply(weight * smooth)))


def _shared_rotation(x: Tensor, block: int) -> Tensor:
    """The same greedy rotation [K/block, block, block] for every block of x [M, K]."""
    shared = fitting.greedy_rotation(x.reshape(-1, block), block).float()
    return shared.expand(x.shape[1] // block, -1, -1)


def textbook_gptq(weight: Tensor, x: Tensor, block: int = 64) -> Fitted:
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1) on zigzag + Hadamard.

    Channels as they come, dampened by 1% of the mean energy.
    """
    block = math.gcd(block, weight.shape[1])
    transform = Transform(None, fitting.zigzag_permutation(fitting.channel_energy(weight), block), block)
    weight, x = transform.apply(weight), transform.apply(x).double()
    hessian = x.T @ x
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    as_they_come = torch.arange(len(hessian), device=hessian.device).flip(0)
    scale = quant.weight_scale(weight, BITS)
    codes = gptq.gptq(weight, scale, BITS, gptq.error_feedback(hessian, as_they_come))
    return Fitted(transform.apply, quant.dequantize_weight(codes, scale))


def _nearest(weight: Tensor, search: str = "mse") -> Tensor:
    scale = quant.weight_scale(weight, BITS, search=search)
    return quant.dequantize_weight(quant.quantize_weight(weight, scale, BITS), scale)


PUBLISHED: dict[str, Method] = {
    "rtn": round_to_nearest,
    "simple": clipped,
    "hadamard": hadamard,
    "quarot-style": quarot,
    "duquant, as released": released_duquant,
    "textbook gptq": textbook_gptq,
}
"""By the names that tables give them."""
