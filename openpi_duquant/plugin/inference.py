"""openpi's `Policy.infer` for the engine: what a robot sees stays on the host until the engine copies it, as bytes."""

from collections.abc import Mapping
import functools
import time
from typing import Any

import jax
import numpy as np
from openpi.policies.policy import Policy
import torch
from torch import Tensor

from openpi_duquant.engine import Observation
from openpi_duquant.plugin.engine_model import EngineModel


def install() -> None:
    """Replaces `Policy.infer` for policies whose model is the engine; all others keep it.

    openpi's copies every array to the GPU and turns images into floats there, in 24 launches of its own, and compiles a
    function to check the types of each observation: 5 to 6 ms beside the 7 of a call.
    """
    by_openpi = Policy.infer

    @functools.wraps(by_openpi)
    def infer(self: Policy, obs: dict[str, Any], *, noise: np.ndarray | None = None) -> dict[str, Any]:
        if isinstance(self._model, EngineModel):
            return _infer(self, obs, noise)
        return by_openpi(self, obs, noise=noise)

    Policy.infer = infer


def as_observation(inputs: Mapping[str, Any]) -> Observation:
    """The engine's observation of what openpi's transforms make, as tensors [B, ...]; images may stay bytes."""
    names = "image", "image_mask", "tokenized_prompt", "tokenized_prompt_mask", "state"
    return Observation(*(inputs[name] for name in names))


def _infer(policy: Policy, obs: dict[str, Any], noise: np.ndarray | None) -> dict[str, Any]:
    """As openpi's; `infer_ms` ends when the actions are on the host."""
    inputs = policy._input_transform(jax.tree.map(lambda x: x, obs))  # noqa: SLF001  which may change them in place
    inputs = jax.tree.map(lambda x: torch.from_numpy(np.array(x))[None], inputs)
    given = dict(policy._sample_kwargs)  # noqa: SLF001
    if noise is not None:
        given["noise"] = _batched(torch.from_numpy(noise))
    start = time.monotonic()
    actions = policy._sample_actions(policy._pytorch_device, as_observation(inputs), **given)  # noqa: SLF001
    outputs = {"state": inputs["state"][0].numpy(), "actions": actions[0].cpu().numpy()}
    seconds = time.monotonic() - start
    return {**policy._output_transform(outputs), "policy_timing": {"infer_ms": 1e3 * seconds}}  # noqa: SLF001


def _batched(noise: Tensor) -> Tensor:
    """[1, S, A] of [S, A], or as it is."""
    return noise[None] if noise.ndim == 2 else noise
