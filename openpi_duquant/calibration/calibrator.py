"""The quantization of decoder layers, one after the other."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch import nn

from openpi_duquant.accuracy import weight_error
from openpi_duquant.architecture import Architecture
from openpi_duquant.calibration.protection import PROTECTED
from openpi_duquant.calibration.states import States
from openpi_duquant.calibration.states import Stream
from openpi_duquant.checkpoint.load import tensors_of
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import LANGUAGE_MODEL
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.gemma import DecoderLayer
from openpi_duquant.engine.gemma import LastLanguageLayer
from openpi_duquant.engine.load import cast
from openpi_duquant.folds import decoder_layer
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import quantize_group
from openpi_duquant.linear.calibration import input_moment
from openpi_duquant.linear.quantize import by_full_name
from openpi_duquant.linear.quantize import members_by_group
from openpi_duquant.linear.quantize import quant_linear
from openpi_duquant.linear.quantize import replace_modules
from openpi_duquant.linear.rounding import InputMoment

_RUN_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Weights = Mapping[str, Tensor]


class Calibrator:
    """Quantizes the decoder layers of both Gemmas, in order.

    Args:
        architecture: Sizes of the policy.
        config: The configuration.
        specs: The quantized layers.
        states: What enters the first layers, see `record_states`.
        schedule: Of their denoising steps, see `Policy.tabulated`.
        dtype: Type of floating-point weights and of activations.

    Attributes:
        specs: The quantized layers, with the bits that they got.
        errors: Relative error of every layer's outputs, by its weight alone.
        corrections: Factors in the weight scales, see `protection`, by layer.
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
        self._architecture, self._config, self._dtype = architecture, config, dtype
        self._stream = Stream(architecture, states, schedule, dtype)
        protected = config.attention_temperature or config.output_energy
        self._original = Stream(architecture, states, schedule, dtype) if protected else None
        self.specs = dict(specs)
        self.errors: dict[str, float] = {}
        self.corrections: dict[str, list[float]] = {}

    def quantize(self, index: int, weights: Weights) -> dict[str, Tensor]:
        """Quantizes the decoder layers of one index; `specs`, `errors` and `corrections` then say how.

        Args:
            index: Of the decoder layer of both models.
            weights: Their folded tensors.

        Returns:
            The tensors of their quantized layers, by full name.

        Raises:
            DuQuantError: As `quantize_group`; names the layer whose inputs are not finite.
        """
        return self._advance(index, weights)

    def restore(self, index: int, weights: Weights, tensors: Weights, record: Mapping[str, Any]) -> None:
        """As `quantize`, with what an earlier call came to: the tensors of its layers, and its `record`."""
        self.specs |= {name: LayerSpec(**spec) for name, spec in record["specs"].items()}
        self.errors |= record["errors"]
        self.corrections |= record["corrections"]
        self._advance(index, weights, tensors)

    def record(self, index: int) -> dict[str, Any]:
        """What `quantize` found out about the layers of one index, as JSON values."""

        def own(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if decoder_layer(name) == index}

        specs = {name: dataclasses.asdict(spec) for name, spec in own(self.specs).items()}
        return {"specs": specs, "errors": own(self.errors), "corrections": own(self.corrections)}

    def _advance(self, index: int, weights: Weights, done: Weights | None = None) -> dict[str, Tensor]:
        """Quantizes the layers of one index, or takes what is done, and moves the states behind them."""
        tensors: dict[str, Tensor] = {}
        for model in (LANGUAGE_MODEL, ACTION_EXPERT):
            layer = self._decoder_layer(model, index, weights)
            for names in self._groups(f"{model}layers.{index}."):
                present = [name for name in names if _place_in_run(name) >= 0 and _submodule(layer, name)]
                if done is None:
                    moment = self._moment(model, index, layer, present[0]) if present else None
                    tensors |= self._quantize_group({name: weights[f"{name}.weight"] for name in names}, moment)
                for name in present:
                    self._place(layer, name, tensors if done is None else done)
                if done is None and self._original is not None:
                    self._protect(model, index, layer, weights, names, tensors)
            self._stream.run(model, index, layer)
            if self._original is not None:
                self._original.run(model, index, self._decoder_layer(model, index, weights))
        return tensors

    def _decoder_layer(self, model: str, index: int, weights: Weights) -> nn.Module:
        """In floating point."""
        architecture = self._architecture
        with torch.device("meta"):
            if model == ACTION_EXPERT:
                layer = DecoderLayer(architecture.expert, adaptive=architecture.pi05)
            elif index < architecture.language.depth - 1:
                layer = DecoderLayer(architecture.language)
            else:
                layer = LastLanguageLayer(architecture.language)
        names = {name: f"{model}layers.{index}.{name}" for name in layer.state_dict()}
        state = {name: cast(full, weights[full], {}, self._dtype) for name, full in names.items()}
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_(requires_grad=False)

    def _groups(self, prefix: str) -> list[list[str]]:
        """Quantized layers of a decoder layer that read one input, as they run."""
        specs = {name: spec for name, spec in self.specs.items() if name.startswith(prefix)}
        return sorted(members_by_group(specs).values(), key=lambda names: _place_in_run(names[0]))

    def _moment(self, model: str, index: int, layer: nn.Module, name: str) -> InputMoment:
        linear = _submodule(layer, name)
        moment = InputMoment(linear.in_features, linear.weight.device)

        def run(layer: nn.Module) -> None:
            for call in self._stream.calls(model, index):
                moment.sample = call.first  # all steps of an observation are in one half
                call.run(layer)

        return input_moment(layer, name, linear, run, moment)

    def _place(self, layer: nn.Module, name: str, tensors: Weights) -> None:
        """Puts a quantized layer into its decoder layer."""
        linear, own = _submodule(layer, name), tensors_of(name, self.specs, tensors)
        replace_modules(layer, {linear: quant_linear(linear, self.specs[name], own, "fake")})

    def _quantize_group(self, weights: Weights, moment: InputMoment | None) -> dict[str, Tensor]:
        """Quantizes a group: to nearest without a moment; with 8 bits, where 4 leave too much error."""
        tensors, errors = self._attempt(weights, moment)
        limit = self._config.keep_error_below
        if limit is not None and max(errors.values(), default=0.0) > limit:
            self.specs |= {name: dataclasses.replace(self.specs[name], weight_bits=8) for name in weights}
            tensors, errors = self._attempt(weights, moment)
        self.errors |= errors
        return tensors

    def _attempt(self, weights: Weights, moment: InputMoment | None) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors of a group, and the error of each layer's outputs if the inputs are known."""
        tensors = quantize_group(weights, self.specs, self._config, moment)
        errors: dict[str, float] = {}
        if moment is not None:
            whole = moment.whole
            errors = {name: weight_error(weights[name], self.specs[name], tensors[name], whole) for name in weights}
        return by_full_name(tensors), errors

    def _protect(
        self, model: str, index: int, layer: nn.Module, weights: Weights, group: Sequence[str], tensors: Weights
    ) -> None:
        """Multiplies the weight scales of q or o, if they are of the group, by what the configuration asks for."""
        for name in group:
            field, measure = PROTECTED.get(name.rpartition(".")[2], (None, None))
            if field is None or not getattr(self._config, field) or not isinstance(layer, DecoderLayer):
                continue
            wanted = measure(self._decoder_layer(model, index, weights), self._original.calls(model, index))
            found = measure(layer, self._stream.calls(model, index))
            factors = torch.where(found > 0, wanted / found, 1.0)
            scale, block = tensors[f"{name}.weight_scale"], self.specs[name].output_rotation_block
            rows = len(scale) // len(factors)
            if block and rows % block:
                raise DuQuantError(f"{field}: the output rotation of {name} mixes heads; take a smaller block")
            scale *= factors.to(scale).repeat_interleave(rows)[:, None]  # in place: the layer holds it too
            self.corrections[name] = factors.tolist()


def _place_in_run(name: str) -> int:
    """Of a layer among those of its decoder layer; -1 of adaRMS' dense, which reads the time step alone."""
    projection = name.rpartition(".")[2]
    return _RUN_ORDER.index(projection) if projection in _RUN_ORDER else -1


def _submodule(layer: nn.Module, name: str) -> nn.Module | None:
    """The module of a decoder layer that has this full name."""
    index = decoder_layer(name)
    return dict(layer.named_modules()).get(name.partition(f"layers.{index}.")[2])
