"""The addition of a residual and the layer norm that follows; on a GPU one launch."""

import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812


def add_layer_norm(
    x: Tensor, delta: Tensor | None, delta_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Adds to the residual stream, and normalizes what it is then (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: [..., W], the residual stream.
        delta: [..., W], what the last sublayer made, of x's type; None for nothing.
        delta_bias: [W], to be added to delta; None for nothing.
        weight: [W].
        bias: [W].
        eps: Added to the variance.

    Returns:
        The sum x + delta, and (sum - mean) / sqrt(variance + eps) * weight + bias; both [..., W], rounded to x's type.
    """
    if delta is not None and x.is_cuda:
        return torch.ops.openpi_duquant.add_layer_norm(x, delta, delta_bias, weight, bias, eps)
    if delta is not None:
        x = x + delta if delta_bias is None else (x.float() + delta.float() + delta_bias.float()).to(x.dtype)
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


torch.library.define(
    "openpi_duquant::add_layer_norm",
    "(Tensor x, Tensor delta, Tensor? delta_bias, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
)


@torch.library.register_fake("openpi_duquant::add_layer_norm")
def _fake(x: Tensor, *operands: object) -> tuple[Tensor, Tensor]:
    del operands
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.impl("openpi_duquant::add_layer_norm", "CUDA")
def _on_gpu(
    x: Tensor, delta: Tensor, delta_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from openpi_duquant.kernels import layer_norm_triton  # noqa: PLC0415  triton is there where CUDA is

    outputs = _fake(x)
    with torch.cuda.device_of(x):
        layer_norm_triton.launch(outputs, x.contiguous(), delta.contiguous(), delta_bias, weight, bias, eps)
    return outputs
