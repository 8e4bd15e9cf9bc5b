"""The engine behind the interface that openpi's Policy expects of a PI0Pytorch."""

import pathlib
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import nn

from openpi_duquant.checkpoint import Manifest
from openpi_duquant.engine import Observation
from openpi_duquant.engine import Policy
from openpi_duquant.engine import load_policy


class Pi0ConfigLike(Protocol):
    """What is read of openpi's Pi0Config."""

    action_dim: int
    action_horizon: int
    dtype: str
    pi05: bool


class EngineModel(nn.Module):
    """Our engine, driven as openpi drives PI0Pytorch.

    Args:
        policy: The engine.
        config: openpi's config of the model.
    """

    def __init__(self, policy: Policy, config: Pi0ConfigLike) -> None:
        super().__init__()
        self.policy = policy
        self.config = config
        self.paligemma_with_expert = _AlreadyCast()

    @classmethod
    def load(
        cls, folder: pathlib.Path, manifest: Manifest, config: Pi0ConfigLike, *, backend: str, device: str
    ) -> "EngineModel":
        """The engine of a converted checkpoint; raises DuQuantError as `engine.load_policy`."""
        del manifest
        return cls(load_policy(folder, backend=backend, dtype=getattr(torch, config.dtype), device=device), config)

    @torch.no_grad()
    def sample_actions(
        self,
        device: torch.device | str,
        observation: Any,  # noqa: ANN401
        noise: Tensor | None = None,
        num_steps: int = 10,
    ) -> Tensor:
        """As PI0Pytorch.sample_actions, the same noise from the same seed.

        Args:
            device: Where the observation and the model are.
            observation: openpi's Observation, batched.
            noise: [B, action_horizon, action_dim] fp32; drawn when not given.
            num_steps: Denoising steps.

        Returns:
            [B, action_horizon, action_dim] fp32.

        Raises:
            DuQuantError: As `engine.Policy.sample_actions`.
        """
        if noise is None:
            shape = len(observation.state), self.config.action_horizon, self.config.action_dim
            noise = torch.normal(mean=0.0, std=1.0, size=shape, dtype=torch.float32, device=device)
        # what the host looks at goes there first: later, it would wait until the GPU has seen the images
        seen = Observation(
            images=observation.images,
            image_masks={camera: mask.cpu() for camera, mask in observation.image_masks.items()},
            tokenized_prompt=observation.tokenized_prompt.cpu(),
            tokenized_prompt_mask=observation.tokenized_prompt_mask.cpu(),
            state=observation.state,
        )
        return self.policy.sample_actions(seen, noise, num_steps=num_steps)


class _AlreadyCast(nn.Module):
    """Takes the call by which openpi casts a model it has loaded: the engine is loaded in the right types."""

    def to_bfloat16_for_selected_params(self, precision: str = "bfloat16") -> None:
        """Does nothing."""
