"""The pi0.5 policy: images and prompt fill a cache once, ten denoising steps read it.

Flow matching as in pi0 (Black et al. 2024, arXiv:2410.24164) and pi0.5 (arXiv:2504.16054). Its tensors have openpi's
names; it leaves out what cannot change an action: the language model's final norm and the unread parts of its last
layer, the expert's lm_head, masked cameras and prompt padding.
"""

import itertools
import math

import torch
from torch import Tensor
from torch import nn
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.engine.architecture import Architecture
from openpi_duquant.engine.gemma import ActionExpert
from openpi_duquant.engine.gemma import KeyValue
from openpi_duquant.engine.gemma import LanguageModel
from openpi_duquant.engine.observation import Observation
from openpi_duquant.engine.observation import Prefix
from openpi_duquant.engine.observation import preprocess
from openpi_duquant.engine.siglip import VisionModel


class Policy(nn.Module):
    """pi0.5 for inference. Build it under `torch.device("meta")` and assign a checkpoint's tensors.

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
        self.paligemma_with_expert = nn.ModuleDict(
            {
                "paligemma": nn.ModuleDict(
                    {"model": paligemma, "lm_head": nn.Embedding(architecture.vocab_size, language.width)}
                ),
                "gemma_expert": nn.ModuleDict({"model": ActionExpert(expert)}),
            }
        )
        self.action_in_proj = nn.Linear(architecture.action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, architecture.action_dim)
        self.time_mlp_in = nn.Linear(expert.width, expert.width)
        self.time_mlp_out = nn.Linear(expert.width, expert.width)
        self._modulations: dict[int, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations have between layers."""
        return self._embedding.weight.dtype

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
            DuQuantError: As `preprocess`.
        """
        prefix = preprocess(observation)
        x, mask = self.embed_prefix(prefix)
        positions = mask.cumsum(1) - 1
        caches = self._language_model(x, positions, _attention_mask(mask, queries=mask.shape[1]))
        return self.denoise(caches, mask, noise.float(), num_steps)

    def embed_prefix(self, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """Embeddings [B, P, W] of images and prompt, and which of them are valid, [B, P] bool."""
        batch, cameras = prefix.image_mask.shape
        paligemma = self.paligemma_with_expert["paligemma"]
        features = paligemma["model"]["vision_tower"]["vision_model"](prefix.images.flatten(0, 1), self.dtype)
        images = paligemma["model"]["multi_modal_projector"]["linear"](features).reshape(batch, -1, self._width)
        text = self._embedding(prefix.tokens) * math.sqrt(self._width)
        image_mask = prefix.image_mask.repeat_interleave(images.shape[1] // cameras, dim=1)
        return torch.cat((images, text), dim=1), torch.cat((image_mask, prefix.token_mask), dim=1)

    def denoise(self, caches: list[KeyValue], prefix_mask: Tensor, noise: Tensor, num_steps: int) -> Tensor:
        """Integrates the velocity field from noise [B, S, A] at time 1 to actions at time 0 (Euler)."""
        steps = noise.shape[1]
        positions = prefix_mask.sum(1, keepdim=True) + torch.arange(steps, device=noise.device)
        visible = F.pad(prefix_mask, (0, steps), value=True)
        mask = _attention_mask(visible, queries=steps)
        actions = noise
        for modulations in self.modulations(num_steps):
            x = self.action_in_proj(actions).to(self.dtype)
            x = self._expert(x, positions, mask, caches, modulations)
            actions = actions - self.action_out_proj(x.float()) / num_steps
        return actions

    @torch.no_grad()
    def modulations(self, num_steps: int) -> Tensor:
        """The expert's adaRMS modulations, [num_steps, norms, 3 W] fp32: they depend on the time step alone."""
        if num_steps not in self._modulations:
            condition = self._time_condition(num_steps)
            self._modulations[num_steps] = torch.stack([norm.dense(condition) for norm in self._expert.norms()], dim=1)
        return self._modulations[num_steps]

    def _time_condition(self, num_steps: int) -> Tensor:
        """Embeddings [num_steps, W] of the times 1, 1 - 1/n, ..., 1/n, summed up in fp32 as openpi does."""
        width = self.architecture.expert.width
        steps = itertools.repeat(torch.tensor(-1.0 / num_steps), num_steps - 1)
        times = torch.stack(list(itertools.accumulate(steps, torch.add, initial=torch.tensor(1.0))))
        period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
        angles = times.double()[:, None] * (2 * math.pi / period)
        embedding = torch.cat((angles.sin(), angles.cos()), dim=1).float().to(self._embedding.weight.device)
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedding))))

    @property
    def _width(self) -> int:
        return self.architecture.language.width

    @property
    def _embedding(self) -> nn.Embedding:
        return self.paligemma_with_expert["paligemma"]["lm_head"]

    @property
    def _language_model(self) -> LanguageModel:
        return self.paligemma_with_expert["paligemma"]["model"]["language_model"]

    @property
    def _expert(self) -> ActionExpert:
        return self.paligemma_with_expert["gemma_expert"]["model"]


def _attention_mask(visible: Tensor, *, queries: int) -> Tensor | None:
    """[B, 1, queries, keys] bool from visible keys [B, keys]; None when all are visible."""
    if visible.all():
        return None
    return visible[:, None, None, :].expand(-1, 1, queries, -1)
