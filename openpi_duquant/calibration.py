"""Calibration of a policy: each decoder layer reads what its quantized predecessors make of recorded observations.

The original runs once, to record what enters its two Gemmas: the embedded prefix, and the embedded suffix of every
denoising step. After that, one decoder layer of each is in memory at a time, and the hidden states before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools

import torch
from torch import Tensor
from torch import nn

from openpi_duquant.accuracy import weight_error
from openpi_duquant.architecture import Architecture
from openpi_duquant.checkpoint.load import stored_name
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import LANGUAGE_MODEL
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.engine.gemma import DecoderLayer
from openpi_duquant.engine.gemma import KeyValue
from openpi_duquant.engine.gemma import LastLanguageLayer
from openpi_duquant.engine.gemma import rotary
from openpi_duquant.engine.load import cast
from openpi_duquant.engine.observation import Prefix
from openpi_duquant.engine.observation import preprocess
from openpi_duquant.engine.policy import Policy
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import quantize_group
from openpi_duquant.linear.calibration import input_moment
from openpi_duquant.linear.quantize import members_by_group
from openpi_duquant.linear.quantize import quant_linear
from openpi_duquant.linear.quantize import replace_modules
from openpi_duquant.linear.rounding import InputMoment
from openpi_duquant.recording import Example

_BATCH = 8
"""Observations that run together; even, so that the two halves of a moment hold different observations."""

_RUN_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Weights = Mapping[str, Tensor]

Run = Callable[[nn.Module], object]
"""Runs a decoder layer on all states."""


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
        with torch.no_grad(), _inputs_of(policy.language_model) as language, _inputs_of(policy.expert) as expert:
            policy.compute(policy.inputs(prefix, state, noise), schedule)
        states.append(States(language[0], torch.stack(expert)))
        progress(len(noise))
    return states


def _batches(policy: Policy, examples: Sequence[Example]) -> Iterator[tuple[Prefix, Tensor | None, Tensor]]:
    """Prefixes, states and noise of observations that have the same shapes, at most `_BATCH` together."""
    alike: dict[object, list[tuple[Prefix, Tensor | None, Tensor]]] = {}
    for example in examples:
        prefix, state = preprocess(example.observation), policy.read_state(example.observation.state, 1)
        alike.setdefault((prefix.images.shape, prefix.tokens.shape), []).append((prefix, state, example.noise))
    for group in alike.values():
        for start in range(0, len(group), _BATCH):
            prefixes, states, noises = zip(*group[start : start + _BATCH])
            fields = zip(*((p.images, p.image_mask, p.tokens, p.token_mask) for p in prefixes))
            prefix = Prefix(*map(torch.cat, fields))
            yield prefix, None if states[0] is None else torch.cat(states), torch.cat(noises)


@contextlib.contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of every call of a module."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        handle.remove()


class Calibrator:
    """Quantizes the decoder layers of both Gemmas, in order, and moves the states on.

    Args:
        architecture: Sizes of the policy.
        config: The configuration.
        specs: The quantized layers.
        states: What enters the first layers, see `record_states`; changed in place.
        schedule: Of their denoising steps, see `Policy.tabulated`.
        dtype: Type of floating-point weights and of activations.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: DuQuantConfig,
        specs: Mapping[str, LayerSpec],
        states: Sequence[States],
        schedule: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.architecture, self.config, self.dtype = architecture, config, dtype
        self.states, self.schedule = states, schedule
        self.specs = dict(specs)
        self.errors: dict[str, float] = {}

    def quantize(self, index: int, weights: Weights) -> dict[str, Tensor]:
        """Quantizes the decoder layers of one index; `specs` and `errors` then say how.

        Args:
            index: Of the decoder layer of both models.
            weights: Their folded tensors.

        Returns:
            The tensors of their quantized layers, by full name.

        Raises:
            DuQuantError: As `quantize_group`; names the layer whose inputs are not finite.
        """
        tensors: dict[str, Tensor] = {}

        def quantize_layer(prefix: str, layer: nn.Module, run: Run) -> None:
            tensors.update(self._quantize(prefix, layer, run, weights))

        self._advance(index, weights, quantize_layer)
        return tensors

    def restore(
        self,
        index: int,
        weights: Weights,
        tensors: Mapping[str, Tensor],
        specs: Mapping[str, LayerSpec],
        errors: Mapping[str, float],
    ) -> None:
        """As `quantize`, with what an earlier one of the same index and weights came to."""
        self.specs |= specs
        self.errors |= errors

        def place(prefix: str, layer: nn.Module, _: Run) -> None:
            for names in self._groups(prefix):
                self._place(prefix, layer, names, tensors)

        self._advance(index, weights, place)

    def _advance(self, index: int, weights: Weights, quantize_layer: Callable[[str, nn.Module, Run], None]) -> None:
        """Quantizes the layers of one index and moves the states behind them."""
        language = self._decoder_layer(LANGUAGE_MODEL, index, weights)
        quantize_layer(f"{LANGUAGE_MODEL}layers.{index}.", language, self._run_language)
        caches = []
        for states, (x, cached) in zip(self.states, self._run_language(language)):
            states.language = x
            caches.append(cached)
        expert = self._decoder_layer(ACTION_EXPERT, index, weights)
        run = functools.partial(self._run_expert, index, caches)
        quantize_layer(f"{ACTION_EXPERT}layers.{index}.", expert, run)
        for states, x in zip(self.states, run(expert)):
            states.expert = x

    def _decoder_layer(self, model: str, index: int, weights: Weights) -> nn.Module:
        architecture = self.architecture
        with torch.device("meta"):
            if model == ACTION_EXPERT:
                layer = DecoderLayer(architecture.expert, adaptive=architecture.pi05)
            elif index < architecture.language.depth - 1:
                layer = DecoderLayer(architecture.language)
            else:
                layer = LastLanguageLayer(architecture.language)
        names = {name: f"{model}layers.{index}.{name}" for name in layer.state_dict()}
        state = {name: cast(full, weights[full], {}, self.dtype) for name, full in names.items()}
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(requires_grad=False)

    @torch.no_grad()
    def _run_language(self, layer: nn.Module) -> list[tuple[Tensor, KeyValue]]:
        """What leaves the layer, and its keys and values, for all states."""
        outputs = []
        for states in self.states:
            x = states.language
            rotation = self._rotation(torch.arange(x.shape[1], device=x.device), self.architecture.language.head_dim)
            last = isinstance(layer, LastLanguageLayer)
            outputs.append((x, layer(x, rotation)) if last else layer(x, rotation, None))
        return outputs

    @torch.no_grad()
    def _run_expert(self, index: int, caches: Sequence[KeyValue], layer: nn.Module) -> list[Tensor]:
        """What leaves the layer at each step, for all states."""
        outputs = []
        for states, cached in zip(self.states, caches):
            places = torch.arange(states.expert.shape[2], device=states.expert.device) + states.language.shape[1]
            rotation = self._rotation(places, self.architecture.expert.head_dim)
            steps = [
                layer(x, rotation, None, cached, modulations, state_first=not self.architecture.pi05)[0]
                for x, modulations in zip(states.expert, self._modulations(index))
            ]
            outputs.append(torch.stack(steps))
        return outputs

    def _rotation(self, places: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        return rotary(places[None], head_dim, self.dtype)

    def _modulations(self, index: int) -> list[Sequence[Tensor | None]]:
        """Of the two norms of a layer of the expert, at each step."""
        if not self.architecture.pi05:
            return [(None, None)] * len(self.schedule)
        return list(self.schedule[:, 2 * index : 2 * index + 2])

    def _groups(self, prefix: str) -> list[list[str]]:
        """Quantized layers of a decoder layer that read one input, as they run."""
        specs = {name: spec for name, spec in self.specs.items() if name.startswith(prefix)}
        return sorted(members_by_group(specs).values(), key=lambda names: _RUN_ORDER.index(names[0].split(".")[-1]))

    def _quantize(self, prefix: str, layer: nn.Module, run: Run, weights: Weights) -> dict[str, Tensor]:
        """Quantizes one decoder layer in place, group after group; what never runs, as nothing reads it, to nearest."""
        tensors: dict[str, Tensor] = {}
        for names in self._groups(prefix):
            linears = {name: module for name in names if (module := _submodule(layer, name.removeprefix(prefix)))}
            first = next(iter(linears), None)
            moment = input_moment(layer, first, linears[first], run) if first else None
            tensors |= self._quantize_group({name: weights[f"{name}.weight"] for name in names}, moment)
            self._place(prefix, layer, names, tensors)
        return tensors

    def _place(self, prefix: str, layer: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Puts quantized layers where a decoder layer has layers of these names."""
        for name in names:
            linear = _submodule(layer, name.removeprefix(prefix))
            if linear is not None:
                spec = self.specs[name]
                own = {part: tensors[stored_name(f"{name}.{part}", self.specs)] for part in spec.tensors()}
                replace_modules(layer, {linear: quant_linear(linear, spec, own, "fake")})

    def _quantize_group(self, weights: Weights, moment: InputMoment | None) -> dict[str, Tensor]:
        """Quantizes a group; with 8 bits, where 4 leave more error than config.keep_error_below."""
        tensors, errors = self._attempt(weights, moment)
        limit = self.config.keep_error_below
        if limit is not None and errors and max(errors.values()) > limit:
            self.specs |= {name: dataclasses.replace(self.specs[name], weight_bits=8) for name in weights}
            tensors, errors = self._attempt(weights, moment)
        self.errors |= errors
        return tensors

    def _attempt(self, weights: Weights, moment: InputMoment | None) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors of a group, and the error of each layer's outputs if the inputs are known."""
        tensors = quantize_group(weights, self.specs, self.config, moment)
        flat = {f"{layer}.{name}": tensor for layer, parts in tensors.items() for name, tensor in parts.items()}
        if moment is None:
            return flat, {}
        return flat, {
            name: weight_error(weight, self.specs[name], tensors[name], moment.whole)
            for name, weight in weights.items()
        }


def _submodule(layer: nn.Module, name: str) -> nn.Module | None:
    return dict(layer.named_modules()).get(name)
