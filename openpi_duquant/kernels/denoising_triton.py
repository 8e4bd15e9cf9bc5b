"""The kernels of `embed_actions` and `euler_step`: a few outputs of one token a program, in registers."""

from torch import Tensor
import triton
import triton.language as tl

from openpi_duquant.kernels.reference import NORM_EPS

_TILE = 4096
"""Elements of a matrix that a program reads."""


def launch_embed(out: Tensor, actions: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Fills out [B, H, W] from actions [B, H, A], weight [W, A] and bias [W], all contiguous."""
    (width, channels), tokens = weight.shape, actions[..., 0].numel()
    padded = triton.next_power_of_2(channels)
    outputs = min(max(_TILE // padded, 1), 64)
    _embed_actions[(tokens, triton.cdiv(width, outputs))](
        out, actions, weight, bias, WIDTH=width, CHANNELS=channels, PADDED=padded, OUTPUTS=outputs,
    )  # fmt: skip


def launch_step(
    out: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor, actions: Tensor,
    steps: int,
) -> None:  # fmt: skip
    """Fills out [B, H, A]; x [B, S, W], scale and shift [W], weight [A, W], bias [A], actions [B, H, A], contiguous."""
    (batch, tokens, width), (_, horizon, channels) = x.shape, actions.shape
    padded = triton.next_power_of_2(width)
    outputs = min(max(_TILE // padded, 1), triton.next_power_of_2(channels))
    _euler_step[(batch * horizon, triton.cdiv(channels, outputs))](
        out, x, scale, shift, weight, bias, actions, tokens, horizon, steps, WIDTH=width, CHANNELS=channels,
        PADDED=padded, OUTPUTS=outputs, EPS=NORM_EPS, num_warps=8,
    )  # fmt: skip


@triton.jit
def _embed_actions(
    out_ptr, actions_ptr, weight_ptr, bias_ptr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """A program a token and OUTPUTS columns."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, PADDED)
    actions = tl.load(actions_ptr + token * CHANNELS + channel, mask=channel < CHANNELS, other=0.0)
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    y = _project(actions, channel, column, weight_ptr, bias_ptr, WIDTH, CHANNELS)
    tl.store(out_ptr + token * WIDTH + column, y.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _euler_step(
    out_ptr, x_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr, actions_ptr, tokens, horizon, steps,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, OUTPUTS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """A program a token of actions and OUTPUTS of its channels; each normalizes the token."""
    action = tl.program_id(0)
    token = (action // horizon + 1) * tokens - horizon + action % horizon
    channel = tl.arange(0, PADDED)
    known = channel < WIDTH
    x = tl.load(x_ptr + token.to(tl.int64) * WIDTH + channel, mask=known, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x) / WIDTH + EPS)
    if scale_ptr is not None:
        x *= 1.0 + tl.load(scale_ptr + channel, mask=known, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + channel, mask=known, other=0.0).to(tl.float32)
    x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    velocity = _project(x, channel, column, weight_ptr, bias_ptr, CHANNELS, WIDTH)
    at = action * CHANNELS + column
    before = tl.load(actions_ptr + at, mask=column < CHANNELS, other=0.0)
    tl.store(out_ptr + at, before - velocity / steps, mask=column < CHANNELS)


@triton.jit
def _project(x, channel, column, weight_ptr, bias_ptr, N: tl.constexpr, K: tl.constexpr):
    """Columns of x [K] times a matrix [N, K], plus bias."""
    known = (column < N)[:, None] & (channel < K)[None, :]
    weight = tl.load(weight_ptr + column[:, None] * K + channel[None, :], mask=known, other=0.0)
    return tl.sum(weight * x[None, :], axis=1) + tl.load(bias_ptr + column, mask=column < N, other=0.0)
