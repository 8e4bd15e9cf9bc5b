"""The pi0 and pi0.5 policies: images and prompt fill a cache once, ten denoising steps read it.

Flow matching as in pi0 (Black et al. 2024, arXiv:2410.24164) and pi0.5 (arXiv:2504.16054). Tensors have openpi's names.
What cannot change an action is left out: the language model's final norm and the unread parts of its last layer, the
expert's lm_head, masked cameras and prompt padding.
"""

import abc
from collections.abc import Sequence
import itertools
import math

import torch
from torch import Tensor
from torch import nn
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.architecture import Architecture
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.gemma import ActionExpert
from openpi_duquant.engine.gemma import KeyValue
from openpi_duquant.engine.gemma import LanguageModel
from openpi_duquant.engine.observation import Observation
from openpi_duquant.engine.observation import Prefix
from openpi_duquant.engine.observation import preprocess
from openpi_duquant.engine.siglip import VisionModel


class Policy(nn.Module, abc.ABC):
    """What pi0 and pi0.5 have in common. Build one with `build_policy`.

    Args:
        architecture: Sizes.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        language, expert = architecture.language, architecture.expert
        projector = nn.Linear(architecture.vision.width, language.width)
        paligemma = nn.ModuleDict(
            {
                "vision_tower": nn.ModuleDict({"vision_model": VisionModel(architecture.vision)}),
                "multi_modal_projector": nn.ModuleDict({"linear": projector}),
                "language_model": LanguageModel(language),
            }
        )
        embedding = nn.Embedding(architecture.vocab_size, language.width)
        self.paligemma_with_expert = nn.ModuleDict(
            {
                "paligemma": nn.ModuleDict({"model": paligemma, "lm_head": embedding}),
                "gemma_expert": nn.ModuleDict({"model": ActionExpert(expert, adaptive=architecture.pi05)}),
            }
        )
        self.action_in_proj = nn.Linear(architecture.action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, architecture.action_dim)

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations have between layers."""
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> nn.Embedding:
        """Token embeddings, stored under the name that they are tied to."""
        return self.paligemma_with_expert["paligemma"]["lm_head"]

    @property
    def expert(self) -> ActionExpert:
        """The action expert."""
        return self.paligemma_with_expert["gemma_expert"]["model"]

    @torch.no_grad()
    def sample_actions(self, observation: Observation, noise: Tensor, *, num_steps: int = 10) -> Tensor:
        """Actions for a batch of observations.

        Args:
            observation: B observations.
            noise: [B, action_horizon, action_dim], standard normal: the starting point.
            num_steps: Denoising steps.

        Returns:
            [B, action_horizon, action_dim] fp32, in the policy's normalised units.

        Raises:
            DuQuantError: As `preprocess`; on noise of another shape, no steps, or a state that pi0 cannot read.
        """
        expected = len(observation.tokenized_prompt), noise.shape[1:2].numel(), self.architecture.action_dim
        if noise.shape != expected or num_steps < 1:
            raise DuQuantError(
                f"noise {tuple(noise.shape)} must be {expected}, batch x action_horizon x action_dim, "
                f"and num_steps {num_steps} at least 1"
            )
        x, mask = self.embed_prefix(preprocess(observation))
        language_model: LanguageModel = self.paligemma_with_expert["paligemma"]["model"]["language_model"]
        prefix_mask = _attention_mask(mask, torch.ones(x.shape[1], 0, dtype=torch.bool, device=x.device))
        caches = language_model(x, mask.cumsum(1) - 1, prefix_mask)
        return self.denoise(caches, mask, observation.state, noise.float(), num_steps)

    def embed_prefix(self, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """Embeddings [B, P, W] of images and prompt, and which of them are valid, [B, P] bool."""
        width = self.architecture.language.width
        paligemma = self.paligemma_with_expert["paligemma"]["model"]
        features = paligemma["vision_tower"]["vision_model"](prefix.images.flatten(0, 1), self.dtype)
        images = paligemma["multi_modal_projector"]["linear"](features).reshape(len(prefix.tokens), -1, width)
        text = self.embedding(prefix.tokens) * math.sqrt(width)
        image_mask = prefix.image_mask.repeat_interleave(features.shape[1], dim=1)
        return torch.cat((images, text), dim=1), torch.cat((image_mask, prefix.token_mask), dim=1)

    def denoise(
        self, caches: Sequence[KeyValue], prefix_mask: Tensor, state: Tensor | None, noise: Tensor, num_steps: int
    ) -> Tensor:
        """Integrates the velocity field from noise [B, S, A] at time 1 to actions at time 0 (Euler)."""
        horizon = noise.shape[1]
        visible = self.suffix_mask(horizon).to(noise.device)
        positions = prefix_mask.sum(1, keepdim=True) + torch.arange(len(visible), device=noise.device)
        mask = _attention_mask(prefix_mask, visible)
        actions = noise
        for entry in self.schedule(num_steps):
            x, modulations = self.embed_suffix(state, actions, entry)
            x = self.expert(x.to(self.dtype), positions, mask, caches, modulations)
            actions = actions - self.action_out_proj(x[:, -horizon:].float()) / num_steps
        return actions

    @abc.abstractmethod
    def schedule(self, num_steps: int) -> Tensor:
        """What each step needs to know of its time, [num_steps, ...] fp32; the same for every observation."""

    @abc.abstractmethod
    def embed_suffix(
        self, state: Tensor | None, actions: Tensor, entry: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """What the expert reads at a step: embeddings [B, S, W], actions last, and the modulations of its norms.

        `entry` is the step's of `schedule`.
        """

    @abc.abstractmethod
    def suffix_mask(self, horizon: int) -> Tensor:
        """Which suffix tokens each of them may look at, [S, S] bool."""

    def time_embeddings(self, num_steps: int) -> Tensor:
        """Sinusoidal embeddings [num_steps, W] fp32 of the times 1, 1 - 1/n, ..., 1/n; summed in fp32, as in openpi."""
        width = self.architecture.expert.width
        steps = itertools.repeat(torch.tensor(-1.0 / num_steps), num_steps - 1)
        times = torch.stack(list(itertools.accumulate(steps, torch.add, initial=torch.tensor(1.0))))
        period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
        angles = times.double()[:, None] * (2 * math.pi / period)
        return torch.cat((angles.sin(), angles.cos()), dim=1).float().to(self.embedding.weight.device)


class Pi05Policy(Policy):
    """pi0.5: the time step modulates the expert's norms; the state, if used at all, is part of the prompt."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        width = architecture.expert.width
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)

    def embed_suffix(
        self, state: Tensor | None, actions: Tensor, entry: Tensor
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Embedded actions [B, S, W], and the modulations that the schedule gives this step."""
        del state
        return self.action_in_proj(actions), entry

    def suffix_mask(self, horizon: int) -> Tensor:
        """All actions see each other."""
        return torch.ones(horizon, horizon, dtype=torch.bool)

    def schedule(self, num_steps: int) -> Tensor:
        """The modulations of every norm, [num_steps, norms, 3 W]: a table, for they depend on the time alone."""
        embedding = self.time_embeddings(num_steps)
        condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedding))))
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
        if state is None or state.shape != (len(actions), self.architecture.action_dim):
            shape = None if state is None else tuple(state.shape)
            raise DuQuantError(f"state: pi0 reads [{len(actions)}, {self.architecture.action_dim}], got {shape}")
        time = entry.expand(*actions.shape[:2], -1)
        mixed = self.action_time_mlp_in(torch.cat((self.action_in_proj(actions), time), dim=-1))
        embedded = self.action_time_mlp_out(F.silu(mixed))
        suffix = torch.cat((self.state_proj(state.float())[:, None], embedded), dim=1)
        return suffix, [None] * (2 * self.architecture.expert.depth + 1)

    def schedule(self, num_steps: int) -> Tensor:
        """Embeddings of the times, [num_steps, W]."""
        return self.time_embeddings(num_steps)

    def suffix_mask(self, horizon: int) -> Tensor:
        """The state sees itself only; actions see it and each other."""
        mask = torch.ones(1 + horizon, 1 + horizon, dtype=torch.bool)
        mask[0, 1:] = False
        return mask


def build_policy(architecture: Architecture) -> Policy:
    """A policy without weights; under `torch.device("meta")` it takes no memory until tensors are assigned."""
    return (Pi05Policy if architecture.pi05 else Pi0Policy)(architecture)


def _attention_mask(prefix: Tensor, own: Tensor) -> Tensor | None:
    """Visible prefix [B, P] and visible own tokens [S, S'] -> [B, 1, S, P + S'] bool; None when all is visible."""
    if prefix.all() and own.all():
        return None
    rows = prefix[:, None, :].expand(-1, len(own), -1)
    return torch.cat((rows, own.expand(len(prefix), -1, -1)), dim=2)[:, None]
