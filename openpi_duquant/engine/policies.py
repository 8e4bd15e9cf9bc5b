"""What pi0 and pi0.5 do not have in common: how they read the state and the time."""

from collections.abc import Sequence
import itertools

import torch
from torch import Tensor
from torch import nn
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.architecture import Architecture
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.placement import HostLinear
from openpi_duquant.engine.policy import Policy
from openpi_duquant.kernels import denoising


class Pi05Policy(Policy):
    """pi0.5: the time step modulates the expert's norms; the state, if used at all, is part of the prompt."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        width = architecture.expert.width
        self.time_mlp_in = HostLinear(width, width)
        self.time_mlp_out = HostLinear(width, width)

    def embed_suffix(
        self, state: Tensor | None, actions: Tensor, entry: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Embedded actions [B, S, W], and the modulations that the schedule gives this step."""
        del state
        head = self.action_in_proj
        if self._fuses(head):
            return denoising.embed_actions(actions, head.weight, head.bias, self.dtype), entry
        return head(actions), entry

    def read_state(self, state: Tensor | None, batch: int) -> None:
        """None: the state, if used at all, is part of the prompt."""
        del state, batch

    def schedule(self, num_steps: int) -> Tensor:
        """The modulations of every norm, [num_steps, norms, 3 W]: a table, for they depend on the time alone."""
        embedding = self.time_embeddings(num_steps)
        place = next(itertools.chain(self.time_mlp_in.parameters(), self.time_mlp_in.buffers())).device
        condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedding.to(place))))).to(embedding.device)
        return torch.stack([norm.dense(condition) for norm in self.expert.norms()], dim=1)


class Pi0Policy(Policy):
    """pi0: the expert reads one token of state, and actions mixed with the time step."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        width = architecture.expert.width
        self.state_proj = nn.Linear(architecture.action_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)

    def embed_suffix(
        self, state: Tensor | None, actions: Tensor, entry: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The state's token and the embedded actions, [B, 1 + S, W], and no modulation."""
        time = entry.expand(*actions.shape[:2], -1)
        mixed = self.action_time_mlp_in(torch.cat((self.action_in_proj(actions), time), dim=-1))
        embedded = self.action_time_mlp_out(F.silu(mixed))
        suffix = torch.cat((self.state_proj(state)[:, None], embedded), dim=1)
        return suffix, [None] * (2 * self.architecture.expert.depth + 1)

    def schedule(self, num_steps: int) -> Tensor:
        """Embeddings of the times, [num_steps, W]."""
        return self.time_embeddings(num_steps)

    def read_state(self, state: Tensor | None, batch: int) -> Tensor:
        """A copy of the state in fp32; raises DuQuantError unless it is [batch, action_dim]."""
        expected = batch, self.architecture.action_dim
        if state is None or state.shape != expected:
            shape = None if state is None else tuple(state.shape)
            raise DuQuantError(f"state: pi0 reads {list(expected)}, got {shape}")
        return state.to(torch.float32, copy=True)  # nobody waits for its copy to the GPU: the caller may refill his


def build_policy(architecture: Architecture) -> Policy:
    """A policy without weights; under `torch.device("meta")` it takes no memory until tensors are assigned."""
    return (Pi05Policy if architecture.pi05 else Pi0Policy)(architecture)
