"""What stands before and after the expert's layers in a denoising step; on a GPU a launch each."""

import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.kernels.reference import Prologue


def embed_actions(actions: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Actions as the expert reads them, multiplied and summed in fp32.

    Args:
        actions: [B, H, A] fp32.
        weight: [W, A] fp32.
        bias: [W] fp32.
        dtype: Of the result.

    Returns:
        [B, H, W].
    """
    if actions.is_cuda:
        return torch.ops.openpi_duquant.embed_actions(actions, weight, bias, dtype)
    return F.linear(actions, weight, bias).to(dtype)


def euler_step(x: Tensor, norm: Prologue, weight: Tensor, bias: Tensor, actions: Tensor, steps: int) -> Tensor:
    """Moves actions along the velocity that the expert saw, in fp32.

    Args:
        x: [B, S, W], what the expert's layers made; the last H tokens are the actions'.
        norm: What is done to x first.
        weight: [A, W] fp32, of the projection that makes the velocity.
        bias: [A] fp32.
        actions: [B, H, A] fp32.
        steps: Of the whole integration from time 1 to 0.

    Returns:
        [B, H, A] fp32.
    """
    if x.is_cuda:
        return torch.ops.openpi_duquant.euler_step(x, norm.scale, norm.shift, weight, bias, actions, steps)
    velocity = F.linear(norm.apply(x[:, -actions.shape[1] :]).float(), weight, bias)
    return actions - velocity / steps


torch.library.define(
    "openpi_duquant::embed_actions", "(Tensor actions, Tensor weight, Tensor bias, ScalarType dtype) -> Tensor"
)
torch.library.define(
    "openpi_duquant::euler_step",
    "(Tensor x, Tensor? scale, Tensor? shift, Tensor weight, Tensor bias, Tensor actions, int steps) -> Tensor",
)


@torch.library.register_fake("openpi_duquant::embed_actions")
def _embed_fake(actions: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    del bias
    return actions.new_empty(*actions.shape[:2], len(weight), dtype=dtype)


@torch.library.register_fake("openpi_duquant::euler_step")
def _step_fake(x: Tensor, *operands: object) -> Tensor:
    del x
    actions = operands[-2]
    return actions.new_empty(actions.shape)


@torch.library.impl("openpi_duquant::embed_actions", "CUDA")
def _embed_on_gpu(actions: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    from openpi_duquant.kernels import denoising_triton  # noqa: PLC0415  triton is there where CUDA is

    out = _embed_fake(actions, weight, bias, dtype)
    with torch.cuda.device_of(out):
        denoising_triton.launch_embed(out, actions.contiguous(), weight, bias)
    return out


@torch.library.impl("openpi_duquant::euler_step", "CUDA")
def _step_on_gpu(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor, actions: Tensor, steps: int
) -> Tensor:
    from openpi_duquant.kernels import denoising_triton  # noqa: PLC0415  triton is there where CUDA is

    actions = actions.contiguous()
    out = actions.new_empty(actions.shape)
    with torch.cuda.device_of(out):
        denoising_triton.launch_step(out, x.contiguous(), scale, shift, weight, bias, actions, steps)
    return out
