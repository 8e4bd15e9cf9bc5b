"""A small transformer with what makes trained ones hard to round: outlier channels, heavy tails, correlated inputs."""

import math

import torch
from torch import Tensor
from torch import nn

WIDTH, HIDDEN, HEAD, TOKENS = 256, 768, 32, 48


class Norm(nn.Module):
    """RMSNorm with outliers among its gains."""

    def __init__(self) -> None:
        super().__init__()
        gain = 1 + 0.3 * torch.randn(WIDTH)
        gain[torch.randperm(WIDTH)[:3]] += 11
        self.gain = nn.Parameter(gain)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., WIDTH]."""
        return nn.functional.rms_norm(x, (WIDTH,), self.gain)


class Layer(nn.Module):
    """A decoder layer: grouped-query attention and GeGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = Norm(), Norm()
        self.q_proj, self.o_proj = heavy_tailed(WIDTH, WIDTH), heavy_tailed(WIDTH, WIDTH, 0.5)
        self.k_proj, self.v_proj = heavy_tailed(WIDTH, 2 * HEAD), heavy_tailed(WIDTH, 2 * HEAD)
        self.gate_proj, self.up_proj = heavy_tailed(WIDTH, HIDDEN), heavy_tailed(WIDTH, HIDDEN)
        self.down_proj = heavy_tailed(HIDDEN, WIDTH, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, WIDTH]."""
        normed = self.before_attention(x)
        flat = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in flat)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        normed = self.before_mlp(x)
        return x + self.down_proj(nn.functional.gelu(self.gate_proj(normed)) * self.up_proj(normed))


def heavy_tailed(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """A Linear whose weight is low-rank plus Student's t with five degrees of freedom, like trained ones."""
    linear = nn.Linear(inputs, outputs, bias=False)
    tails = torch.distributions.StudentT(5.0).sample((outputs, inputs)) / math.sqrt(5 / 3)
    rank = inputs // 16
    low_rank = torch.randn(outputs, rank) @ torch.randn(rank, inputs) / math.sqrt(rank)
    linear.weight = nn.Parameter((tails + low_rank) * gain / math.sqrt(2 * inputs))
    return linear


def structured_model(seed: int, layers: int = 2) -> nn.Sequential:
    """The model, in evaluation mode."""
    torch.manual_seed(seed)
    return nn.Sequential(*(Layer() for _ in range(layers))).eval()


def structured_inputs(seed: int, count: int, decay: float) -> list[Tensor]:
    """`count` inputs [1, TOKENS, WIDTH]; along fixed directions, the variance falls with a power of the rank."""
    torch.manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    variance = torch.arange(1, WIDTH + 1) ** -decay
    mean = 0.3 * torch.randn(WIDTH)
    return [
        torch.randn(1, TOKENS, WIDTH) * (variance / variance.mean()).sqrt() @ directions + mean for _ in range(count)
    ]
