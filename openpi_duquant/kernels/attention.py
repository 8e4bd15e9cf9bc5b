"""Attention of many query heads over one key/value head; on a GPU in one launch, or in two for few queries."""

import torch
from torch import Tensor
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.kernels import attention_cuda
from openpi_duquant.kernels import transform
from openpi_duquant.kernels.rotary import on_gpu
from openpi_duquant.transforms import Transform


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    own: tuple[Tensor, Tensor] | None = None,
    *,
    state_first: bool = False,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the visible keys, and over the queries' own keys where there are any.

    Args:
        q: [B, S, H, D].
        k: [B, T, D].
        v: [B, T, D].
        visible: [B, T] bool, the keys that may be looked at; None for all.
        own: Keys and values [B, S, D] that come after these, all visible.
        state_first: The first query looks at no own key but the first.

    Returns:
        [B, S, H * D].
    """
    if on_gpu(q, q.shape[-1]):
        own_k, own_v = own if own is not None else (None, None)
        return torch.ops.openpi_duquant.attend(q, k, v, visible, own_k, own_v, state_first).flatten(2)
    batch, length, heads, _ = q.shape
    mask = (
        None
        if visible is None or (not visible.is_cuda and visible.all())
        else visible[:, None, None, :].expand(-1, 1, length, -1)
    )
    if own is not None:
        mask = _with_own(mask, (batch, length, k.shape[1]), q.device, state_first=state_first)
        k, v = torch.cat((k, own[0]), dim=1), torch.cat((v, own[1]), dim=1)
    k, v = (x.unsqueeze(1).expand(-1, heads, -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def attend_quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    own: tuple[Tensor, Tensor] | None = None,
    *,
    state_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fused_transform` without a transform makes of `attend`, token by token; arguments as there.

    Where the keys are shared out on a GPU, the launch that puts the partial sums together also rounds.

    Returns:
        codes [B S, H D] int8, act_scale [B S, 1] fp32, row_sum [B S, 1] int32 (sums of the codes).
    """
    if on_gpu(q, q.shape[-1]):
        own_k, own_v = own if own is not None else (None, None)
        return torch.ops.openpi_duquant.attend_quantized(q, k, v, visible, own_k, own_v, state_first)
    y = attend(q, k, v, visible, own, state_first=state_first)
    return transform.fused_transform(y.flatten(0, 1), Transform(None, None, None))


def _with_own(
    mask: Tensor | None, shape: tuple[int, int, int], device: torch.device, *, state_first: bool
) -> Tensor | None:
    """The mask [B, 1, S, T + S] of visible keys and own keys; None if nothing is hidden."""
    batch, length, keys = shape
    if mask is None and not state_first:
        return None
    if mask is None:
        mask = torch.ones(batch, 1, length, keys, dtype=torch.bool, device=device)
    own = torch.ones(length, length, dtype=torch.bool, device=device)
    if state_first:
        own[0, 1:] = False
    return torch.cat((mask, own.expand(batch, 1, -1, -1)), dim=3)


_OPERANDS = "(Tensor q, Tensor k, Tensor v, Tensor? visible, Tensor? own_k, Tensor? own_v, bool state_first)"
torch.library.define("openpi_duquant::attend", f"{_OPERANDS} -> Tensor")
torch.library.define("openpi_duquant::attend_quantized", f"{_OPERANDS} -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake("openpi_duquant::attend")
def _attend_fake(q: Tensor, *operands: object) -> Tensor:
    del operands
    return q.new_empty(q.shape)


@torch.library.impl("openpi_duquant::attend", "CUDA")
def _attend_on_gpu(q: Tensor, *operands: object) -> Tensor:
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415  triton is there where CUDA is

    *tensors, state_first = operands
    k, v, visible, own_k, _ = tensors
    out = q.new_empty(q.shape)
    with torch.cuda.device_of(q):
        if attention_cuda.takes(q, k, v, own_k, rounded=False):
            attention_cuda.launch(out, q, k, v, visible)
        else:
            exact = q.dtype == torch.float32
            attention_triton.launch_attend(out, q, *tensors, state_first=bool(state_first), exact=exact)
    return out


@torch.library.register_fake("openpi_duquant::attend_quantized")
def _attend_quantized_fake(q: Tensor, *operands: object) -> tuple[Tensor, Tensor, Tensor]:
    del operands
    batch, length, heads, size = q.shape
    return transform.empty(q, batch * length, heads * size)


@torch.library.impl("openpi_duquant::attend_quantized", "CUDA")
def _attend_quantized_on_gpu(q: Tensor, *operands: object) -> tuple[Tensor, Tensor, Tensor]:
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415  triton is there where CUDA is

    *tensors, state_first = operands
    k, v, visible, own_k, _ = tensors
    outputs = _attend_quantized_fake(q)
    with torch.cuda.device_of(q):
        if attention_cuda.takes(q, k, v, own_k, rounded=True):
            attention_cuda.launch(outputs, q, k, v, visible)
        else:
            exact = q.dtype == torch.float32
            attention_triton.launch_attend_quantized(outputs, q, *tensors, state_first=bool(state_first), exact=exact)
    return outputs
