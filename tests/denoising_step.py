"""One denoising step of an expert, on random tokens and a random cache."""

import torch
from torch import Tensor

from openpi_duquant.engine import Policy
from openpi_duquant.engine import gemma


def step(policy: Policy, shape: tuple[int, int], prefix: int, *, state_first: bool, masked: bool) -> Tensor:
    """What the expert makes of shape [B, S] tokens and `prefix` cached keys, none or a fifth of them masked."""
    random = torch.Generator().manual_seed(0)
    (batch, tokens), size, device = shape, policy.architecture.expert, policy.device
    x, *cached = (
        torch.randn(sizes, generator=random).bfloat16().to(device, policy.dtype)
        for sizes in ((batch, tokens, size.width), *[(size.depth, batch, prefix, size.head_dim)] * 2)
    )
    visible = (torch.rand(batch, prefix, generator=random) > 0.2).to(device) if masked else None
    modulations: object = [None] * (2 * size.depth + 1)
    if policy.architecture.pi05:
        modulations = torch.randn(2 * size.depth + 1, 3 * size.width, generator=random).to(device) / 4
    rotation = gemma.rotary(prefix + torch.arange(tokens, device=device).expand(batch, -1), size.head_dim, x.dtype)
    with torch.no_grad():
        return policy.expert(x, rotation, visible, tuple(cached), modulations, state_first=state_first)
