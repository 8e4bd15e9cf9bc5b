"""The pi0 and pi0.5 policies: images and prompt fill a cache once, ten denoising steps read it.

Flow matching as in pi0 (Black et al. 2024, arXiv:2410.24164) and pi0.5 (arXiv:2504.16054). Tensors have openpi's names.
What cannot change an action is left out: the language model's final norm and the unread parts of its last layer, the
expert's lm_head, masked cameras and prompt padding.
"""

import abc
from collections.abc import Callable, Sequence
import itertools
import math

import torch
from torch import Tensor
from torch import nn

from openpi_duquant.architecture import Architecture
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.expert import ActionExpert
from openpi_duquant.engine.gemma import KeyValue
from openpi_duquant.engine.gemma import LanguageModel
from openpi_duquant.engine.gemma import rotary
from openpi_duquant.engine.graphs import Graphs
from openpi_duquant.engine.graphs import on
from openpi_duquant.engine.graphs import padded
from openpi_duquant.engine.observation import Observation
from openpi_duquant.engine.observation import Prefix
from openpi_duquant.engine.observation import layout
from openpi_duquant.engine.observation import live_images
from openpi_duquant.engine.observation import live_masks
from openpi_duquant.engine.placement import HostEmbedding
from openpi_duquant.engine.siglip import VisionModel
from openpi_duquant.kernels import denoising
from openpi_duquant.kernels.reference import Prologue

_PLACES = 2048
"""Positions whose rotary embeddings an optimized policy holds."""


class Policy(nn.Module, abc.ABC):
    """What pi0 and pi0.5 have in common.

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
        embedding = HostEmbedding(architecture.vocab_size, language.width)
        self.paligemma_with_expert = nn.ModuleDict(
            {
                "paligemma": nn.ModuleDict({"model": paligemma, "lm_head": embedding}),
                "gemma_expert": nn.ModuleDict({"model": ActionExpert(expert, adaptive=architecture.pi05)}),
            }
        )
        self.action_in_proj = nn.Linear(architecture.action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, architecture.action_dim)
        self.graphs: Graphs | None = None
        self._schedules: dict[int, Tensor] | None = None
        self.register_buffer("_angles", None, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations have between layers."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where calls are computed."""
        vision = self.paligemma_with_expert["paligemma"]["model"]["vision_tower"]["vision_model"]
        return vision.embeddings["patch_embedding"].weight.device

    @property
    def embedding(self) -> HostEmbedding:
        """Token embeddings, stored under the name that they are tied to."""
        return self.paligemma_with_expert["paligemma"]["lm_head"]

    @property
    def language_model(self) -> LanguageModel:
        """The language model."""
        return self.paligemma_with_expert["paligemma"]["model"]["language_model"]

    @property
    def expert(self) -> ActionExpert:
        """The action expert."""
        return self.paligemma_with_expert["gemma_expert"]["model"]

    def optimize_(self) -> None:
        """For many calls with weights that do not change any more: merges layers, tabulates what depends on the time
        alone, and on a GPU runs calls of the same shapes as CUDA graphs.
        """
        for module in self.modules():
            if module is not self and hasattr(module, "optimize_"):
                module.optimize_()
        self.graphs = Graphs()
        self._schedules = {}
        places = torch.arange(_PLACES, device=self.device)[None]
        self._angles = torch.cat(rotary(places, self.architecture.language.head_dim, self.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Policy":  # noqa: FBT001, FBT002
        if fn(torch.empty(0, dtype=self.dtype)).dtype != self.dtype:
            raise DuQuantError("a loaded policy keeps its types: load it with dtype=..., for another one")
        if self.graphs is not None:  # they hold the addresses of the weights
            self.graphs.clear()
        if self._schedules is not None:
            self._schedules.clear()
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def sample_actions(self, observation: Observation, noise: Tensor, *, num_steps: int = 10) -> Tensor:
        """Actions for a batch of observations.

        Args:
            observation: B observations.
            noise: [B, action_horizon, action_dim], standard normal: the starting point.
            num_steps: Denoising steps.

        Returns:
            [B, action_horizon, action_dim] fp32, in the policy's normalised units, where the noise is.

        Raises:
            DuQuantError: As `preprocess`; on noise of another shape, no steps, or a state that pi0 cannot read.
        """
        expected = len(observation.tokenized_prompt), noise.shape[1:2].numel(), self.architecture.action_dim
        if noise.shape != expected or num_steps < 1:
            raise DuQuantError(
                f"noise {tuple(noise.shape)} must be {expected}, batch x action_horizon x action_dim, "
                f"and num_steps {num_steps} at least 1"
            )
        images = live_images(observation, self.device)
        features = self.run(self.see, [images])
        # from here on the GPU is busy with the images: what the host does takes no time
        prefix, state = Prefix(images, *live_masks(observation)), self.read_state(observation.state, len(noise))
        inputs = self.inputs(prefix, state, noise)
        return self.run(self.act, [features, *inputs], self.tabulated(num_steps)).to(noise.device)

    def run(self, compute: Callable[..., Tensor], inputs: Sequence[Tensor | None], *constants: Tensor) -> Tensor:
        """compute(*inputs, *constants) on the policy's device; on a GPU as a CUDA graph, once optimized."""
        if self.graphed:
            return self.graphs(compute, inputs, constants, device=self.device)
        return compute(*on(inputs, self.device), *constants)

    @property
    def graphed(self) -> bool:
        """Whether calls run as CUDA graphs."""
        return self.graphs is not None and self.device.type == "cuda"

    def tabulated(self, num_steps: int) -> Tensor:
        """`schedule`, on the policy's device; kept, once the policy is optimized."""
        if self._schedules is None:
            return self.schedule(num_steps).to(self.device)
        if num_steps not in self._schedules:
            self._schedules[num_steps] = self.schedule(num_steps).to(self.device)
        return self._schedules[num_steps]

    def inputs(self, prefix: Prefix, state: Tensor | None, noise: Tensor) -> tuple[Tensor | None, ...]:
        """What `act` reads beside features, on whatever devices; embeddings are looked up on the host."""
        prefix = padded(prefix) if self.graphed else prefix
        text = self.embedding(prefix.tokens, self.device)
        visible, places = layout(prefix, noise.shape[1] + (state is not None))
        return text, visible, places, state, noise.float()

    def see(self, images: Tensor) -> Tensor:
        """Features [B, I, W] of images, see `Prefix`; as `act`."""
        paligemma, width = self.paligemma_with_expert["paligemma"]["model"], self.architecture.language.width
        features = paligemma["vision_tower"]["vision_model"](images.flatten(0, 1), self.dtype)
        return paligemma["multi_modal_projector"]["linear"](features).reshape(len(images), -1, width)

    def act(
        self,
        features: Tensor,
        text: Tensor,
        visible: Tensor,
        places: Tensor,
        state: Tensor | None,
        noise: Tensor,
        schedule: Tensor,
    ) -> Tensor:
        """Actions [B, S, A] fp32; the same kernels for the same shapes, and never a look at a value from the host.

        Args:
            features: [B, I, W], of images.
            text: [B, L, W], embedded prompts.
            visible: [B, I + L] bool, which of both are valid.
            places: [B, I + L + S] int64, their positions and the suffix's; pi0's has a place for the state.
            state: [B, A] fp32, or None.
            noise: [B, S, A] fp32.
            schedule: See `tabulated`.
        """
        x = torch.cat((features, text * math.sqrt(text.shape[-1])), dim=1)
        of_prefix, of_suffix = self.rotations(places, x.shape[1])
        cached = self.language_model(x, of_prefix, visible)
        return self.denoise(cached, visible, of_suffix, state, noise, schedule)

    def rotations(self, places: Tensor, prefix: int) -> list[tuple[Tensor, ...]]:
        """Cosines and sines [B, ..., D] of rotary embeddings at places [B, P + S], of the prefix's P and of the rest;
        from a table, once optimized."""
        parts = places.split((prefix, places.shape[1] - prefix), dim=1)
        if self._angles is None or places.shape[1] > _PLACES:
            return [rotary(part, self.architecture.language.head_dim, self.dtype) for part in parts]
        return [self._angles[:, part].unbind() for part in parts]

    def denoise(
        self,
        cached: KeyValue,
        visible: Tensor,
        rotation: tuple[Tensor, Tensor],
        state: Tensor | None,
        noise: Tensor,
        schedule: Tensor,
    ) -> Tensor:
        """Integrates the velocity field from noise [B, S, A] at time 1 to actions at time 0 (Euler)."""
        state_first = state is not None
        actions = noise
        for entry in schedule:
            x, modulations = self.embed_suffix(state, actions, entry)
            x = self.expert(x.to(self.dtype), rotation, visible, cached, modulations, state_first=state_first)
            actions = self.euler_step(x, self.expert.norm.prologue(modulations[-1])[0], actions, len(schedule))
        return actions

    def euler_step(self, x: Tensor, norm: Prologue, actions: Tensor, steps: int) -> Tensor:
        """Actions [B, S, A] fp32 after a step, by what the expert's layers made, x [B, S or 1 + S, W]."""
        head = self.action_out_proj
        if self._fuses(head):
            return denoising.euler_step(x, norm, head.weight, head.bias, actions, steps)
        return actions - head(norm.apply(x[:, -actions.shape[1] :]).float()) / steps

    def _fuses(self, head: nn.Module) -> bool:
        """Whether a head may be part of a kernel: nobody watches those of optimized policies, see `optimize_`."""
        return self._schedules is not None and type(head) is nn.Linear

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
    def read_state(self, state: Tensor | None, batch: int) -> Tensor | None:
        """The state that the expert reads, [batch, A] fp32; None if it reads none.

        Raises:
            DuQuantError: On a state that it cannot read.
        """

    def time_embeddings(self, num_steps: int) -> Tensor:
        """Sinusoidal embeddings [num_steps, W] fp32 of the times 1, 1 - 1/n, ..., 1/n; summed in fp32, as in openpi."""
        width = self.architecture.expert.width
        steps = itertools.repeat(torch.tensor(-1.0 / num_steps), num_steps - 1)
        times = torch.stack(list(itertools.accumulate(steps, torch.add, initial=torch.tensor(1.0))))
        period = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
        angles = times.double()[:, None] * (2 * math.pi / period)
        return torch.cat((angles.sin(), angles.cos()), dim=1).float().to(self.embedding.weight.device)
