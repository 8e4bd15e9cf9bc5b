"""Recorded observations on their way through the decoder layers."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch import nn

from openpi_duquant.architecture import Architecture
from openpi_duquant.config import LANGUAGE_MODEL
from openpi_duquant.engine.gemma import KeyValue
from openpi_duquant.engine.gemma import LastLanguageLayer
from openpi_duquant.engine.gemma import rotary
from openpi_duquant.engine.observation import Prefix
from openpi_duquant.engine.observation import preprocess
from openpi_duquant.engine.policy import Policy
from openpi_duquant.linear.calibration import watched
from openpi_duquant.recording import Example

_BATCH = 8
"""Observations that run together."""


@dataclasses.dataclass
class States:
    """Observations of one shape between two decoder layers.

    Attributes:
        language: [B, P, W], what enters the next layer of the language model.
        expert: [T, B, S, W], what enters the next layer of the action expert at each denoising step.
    """

    language: Tensor
    expert: Tensor


def record_states(
    policy: Policy, examples: Sequence[Example], schedule: Tensor, progress: Callable[[int], None] = lambda _: None
) -> list[States]:
    """What enters the first decoder layers of a policy.

    Args:
        policy: The original, not optimized.
        examples: Observations, with the noise that each starts from.
        schedule: Of the denoising steps, see `Policy.tabulated`.
        progress: Called with the number of observations done since the last call.

    Raises:
        DuQuantError: As `preprocess`.
    """
    states = []
    for prefix, state, noise in _batches(policy, examples):
        language: list[Tensor] = []
        expert: list[Tensor] = []
        with torch.no_grad(), watched({policy.language_model: language.append, policy.expert: expert.append}):
            features = policy.run(policy.see, [prefix.images])
            policy.run(policy.act, [features, *policy.inputs(prefix, state, noise)], schedule)
        states.append(States(language[0], torch.stack(expert)))
        progress(len(noise))
    return states


def _batches(policy: Policy, examples: Sequence[Example]) -> Iterator[tuple[Prefix, Tensor | None, Tensor]]:
    """Prefixes, states and noise of observations that have the same shapes, at most `_BATCH` together."""
    alike: dict[object, list[tuple[Prefix, Tensor | None, Tensor]]] = {}
    for example in examples:
        prefix, state = preprocess(example.observation), policy.read_state(example.observation.state, 1)
        shapes = prefix.images.shape, prefix.tokens.shape, example.noise.shape
        alike.setdefault(shapes, []).append((prefix, state, example.noise))
    for group in alike.values():
        for start in range(0, len(group), _BATCH):
            prefixes, states, noises = zip(*group[start : start + _BATCH])
            fields = zip(*((p.images, p.image_mask, p.tokens, p.token_mask) for p in prefixes))
            prefix = Prefix(*map(torch.cat, fields))
            yield prefix, None if states[0] is None else torch.cat(states), torch.cat(noises)


class Call(NamedTuple):
    """What a decoder layer is called with.

    Attributes:
        x: [B, S, W].
        first: Number of the first of the B observations.
        rotation: Cosines and sines of the positions.
        cached: Of an expert's layer, the keys and values of the language model's.
        modulations: Of the two norms.
        state_first: See `attention.attend`.
    """

    x: Tensor
    first: int
    rotation: tuple[Tensor, Tensor]
    cached: KeyValue | None = None
    modulations: Sequence[Tensor | None] = (None, None)
    state_first: bool = False

    def run(self, layer: nn.Module) -> tuple[Tensor, KeyValue]:
        """What leaves the layer, and its keys and values; of the last language layer, what enters it."""
        if isinstance(layer, LastLanguageLayer):
            return self.x, layer(self.x, self.rotation)
        return layer(self.x, self.rotation, None, self.cached, self.modulations, state_first=self.state_first)


class Stream:
    """States, moved on layer by layer.

    Args:
        architecture: Sizes of the policy.
        states: What enters the first layers, see `record_states`.
        schedule: Of their denoising steps, see `Policy.tabulated`.
        dtype: Type of activations.
    """

    def __init__(
        self, architecture: Architecture, states: Sequence[States], schedule: Tensor, dtype: torch.dtype
    ) -> None:
        self._architecture, self._schedule, self._dtype = architecture, schedule, dtype
        self._states = [dataclasses.replace(each) for each in states]
        self._firsts = list(itertools.accumulate((len(each.language) for each in self._states[:-1]), initial=0))
        self._caches: list[KeyValue] = []

    def calls(self, model: str, index: int) -> Iterator[Call]:
        """Of the decoder layer of that index; of the expert's, step after step, once the language model's has run.

        Args:
            model: LANGUAGE_MODEL or ACTION_EXPERT.
            index: Of the layer.
        """
        language, expert, pi05 = self._architecture.language, self._architecture.expert, self._architecture.pi05
        if model == LANGUAGE_MODEL:
            for first, states in zip(self._firsts, self._states, strict=True):
                yield Call(states.language, first, self._rotation(0, states.language, language.head_dim))
            return
        for first, states, cached in zip(self._firsts, self._states, self._caches, strict=True):
            rotation = self._rotation(states.language.shape[1], states.expert[0], expert.head_dim)
            for x, entry in zip(states.expert, self._schedule, strict=True):
                modulations = entry[2 * index : 2 * index + 2] if pi05 else (None, None)
                yield Call(x, first, rotation, cached, modulations, state_first=not pi05)

    def _rotation(self, first: int, x: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(first, first + x.shape[1], device=x.device).expand(len(x), -1)
        return rotary(positions, head_dim, self._dtype)

    @torch.no_grad()
    def run(self, model: str, index: int, layer: nn.Module) -> None:
        """Moves the states behind a layer; arguments as `calls`."""
        outputs = [call.run(layer) for call in self.calls(model, index)]
        if model == LANGUAGE_MODEL:
            self._caches = [cached for _, cached in outputs]
            for states, (x, _) in zip(self._states, outputs, strict=True):
                states.language = x
            return
        steps = iter([x for x, _ in outputs])
        for states in self._states:
            states.expert = torch.stack([next(steps) for _ in self._schedule])
