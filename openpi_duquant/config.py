"""What a quantized policy is: `DuQuantConfig`, its presets and its JSON. Imports nothing of ours."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
import re
from typing import Any, Literal

LANGUAGE_MODEL = "paligemma_with_expert.paligemma.model.language_model."
ACTION_EXPERT = "paligemma_with_expert.gemma_expert.model."
ACTION_HEAD = r"^(action_in_proj|action_out_proj|state_proj|(action_)?time_mlp_(in|out))$"


Rule = tuple[Callable[[Any], bool], str]
"""Whether a value will do, and what it must be."""


class DuQuantError(Exception):
    """A mistake a user can mend: its text says what is wrong, where, and what to do, in one line."""


@dataclasses.dataclass(frozen=True)
class DuQuantConfig:
    """Which layers are quantized, and how. Stored in every converted checkpoint.

    Attributes:
        scope: Only layers whose name starts with this.
        include: Only layers whose name matches this regular expression (searched, not anchored).
        exclude: No layer whose name matches this regular expression.
        layers: Exactly these layers; scope, include and exclude are then ignored.
        include_action_head: Also quantize action_in_proj, action_out_proj, state_proj and the time MLP.
        weight_bits: 4 or 8.
        layer_bits: Weight bits of single layers, by name.
        activation_bits: 8, or 16 to quantize weights only.
        group_size: Input channels that share a weight scale; none means a whole row.
        weight_rounding: "nearest", or "gptq" (each channel makes up for the errors of others), which needs calibration
            data; "auto" is gptq where there is such data.
        gptq_dampening: Share of its own energy added to every input channel; none tries several on held-out samples.
        keep_error_below: Largest relative error of its outputs that a calibrated layer may have with 4 bits; where it
            has more, it takes 8, and so do those that read the same input. None: all keep their bits.
        attention_temperature: Give calibrated attention logits the original's spread, head by head, in the scales of q.
        output_energy: Give calibrated attention's output the original's energy, layer by layer, in the scales of o.
        scale_search: Weight scales by least squared error ("mse") or by the largest weight ("max").
        permute: Spread large input channels over the rotation blocks (zigzag).
        smoothing: Share of the mean mixed into every channel's energy before the zigzag, 0 to 1.
        rotation: Rotation of input channels: "hadamard", "svd" (right singular vectors), "duquant" (greedy, rotate -
            permute - rotate, as published) or "none".
        rotation_block: Channels that are rotated together; a layer whose width it does not divide takes
            the greatest common divisor.
        row_rotation: Rotation of output rows: "0" (none), "restore" (undone after the matmul) or "propagate" (of v
            only, undone in the columns of o).
        output_rotation_block: Rows that are rotated together; none means rotation_block.
        activation_percentile: Percentile, above 0 and at most 100, at which static activation scales would clip.
        calibration_steps: 0: activation scales are dynamic, per token. Static ones are not made: they err more and save
            next to nothing (docs/accuracy.md).

    Raises:
        DuQuantError: On a value outside the ones named above.
    """

    scope: str = ""
    include: str = r"(^|\.)(q|k|v|o|gate|up|down)_proj$"
    exclude: str = r"vision_tower|multi_modal_projector|lm_head|embed"
    layers: tuple[str, ...] = ()
    include_action_head: bool = False
    weight_bits: int = 4
    layer_bits: dict[str, int] = dataclasses.field(default_factory=dict)
    activation_bits: int = 8
    group_size: int | None = None
    weight_rounding: Literal["auto", "nearest", "gptq"] = "auto"
    gptq_dampening: float | None = None
    keep_error_below: float | None = None
    attention_temperature: bool = False
    output_energy: bool = False
    scale_search: Literal["mse", "max"] = "mse"
    permute: bool = True
    smoothing: float = 0.15
    rotation: Literal["hadamard", "svd", "duquant", "none"] = "hadamard"
    rotation_block: int = 64
    row_rotation: Literal["0", "restore", "propagate"] = "0"
    output_rotation_block: int | None = None
    activation_percentile: float = 99.9
    calibration_steps: int = 0

    def __post_init__(self) -> None:
        for message in _complaints(self):
            raise DuQuantError(message)
        object.__setattr__(self, "layer_bits", dict(self.layer_bits))  # its own: replace() would share it

    @property
    def output_block(self) -> int:
        """Rows that are rotated together and restored at run time; 0 when none are."""
        return self.output_rotation_block or self.rotation_block if self.row_rotation == "restore" else 0

    def bits_of(self, layer: str) -> int:
        """Weight bits that are asked for a layer."""
        return self.layer_bits.get(layer, self.weight_bits)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `from_json` inverts it exactly."""
        return dataclasses.asdict(self) | {"layers": list(self.layers)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DuQuantConfig":
        """The config that `to_json` wrote.

        Raises:
            DuQuantError: On an unknown or missing field, or a value of the wrong type.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        if set(values) != fields:
            raise DuQuantError(f"DuQuantConfig: fields {sorted(fields ^ set(values))} are unknown or missing")
        layers = values["layers"]
        return cls(**{**values, "layers": tuple(layers) if isinstance(layers, list) else layers})


def _one_of(*allowed: object) -> Rule:
    def holds(value: object) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in allowed)

    return holds, f"one of {', '.join(map(str, allowed))}"


def _is_share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_percentile(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= 100


def _optional(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), rule[1]


def _is_regex(value: object) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _is_power_of_two(value: object) -> bool:
    return type(value) is int and value > 1 and value & (value - 1) == 0


def _is_positive_and_even(value: object) -> bool:
    return type(value) is int and value > 0 and value % 2 == 0


def _are_bits_by_name(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and bits in (4, 8) for name, bits in value.items())


_FLAG: Rule = (lambda value: isinstance(value, bool)), "true or false"
_REGEX: Rule = _is_regex, "a regular expression"
_BLOCK: Rule = _is_power_of_two, "a power of two above 1"

_RULES: dict[str, Rule] = {
    "scope": ((lambda value: isinstance(value, str)), "a text"),
    "include": _REGEX,
    "exclude": _REGEX,
    "layers": ((lambda value: isinstance(value, tuple) and all(isinstance(n, str) for n in value)), "a list of names"),
    "include_action_head": _FLAG,
    "weight_bits": _one_of(4, 8),
    "layer_bits": (_are_bits_by_name, "4 or 8 by name"),
    "activation_bits": _one_of(8, 16),
    "group_size": _optional((_is_positive_and_even, "a positive even number")),
    "weight_rounding": _one_of("auto", "nearest", "gptq"),
    "gptq_dampening": _optional((_is_positive, "a positive number")),
    "keep_error_below": _optional((_is_positive, "a positive number")),
    "attention_temperature": _FLAG,
    "output_energy": _FLAG,
    "scale_search": _one_of("mse", "max"),
    "permute": _FLAG,
    "smoothing": (_is_share, "between 0 and 1"),
    "rotation": _one_of("hadamard", "svd", "duquant", "none"),
    "rotation_block": _BLOCK,
    "row_rotation": _one_of("0", "restore", "propagate"),
    "output_rotation_block": _optional(_BLOCK),
    "activation_percentile": (_is_percentile, "above 0 and at most 100"),
    "calibration_steps": (
        (lambda value: type(value) is int and value == 0),
        "0: there are no static scales, docs/accuracy.md says why",
    ),
}
"""What every field must be."""


def _complaints(config: DuQuantConfig) -> Iterator[str]:
    for name, (holds, wanted) in _RULES.items():
        value = getattr(config, name)
        if not holds(value):
            yield f"{name}: {value!r} is not {wanted}"
    if config.row_rotation != "0" and config.rotation == "none":
        yield f"row_rotation: {config.row_rotation!r} needs a rotation"


_RESEARCH = DuQuantConfig(rotation="svd", rotation_block=16, row_rotation="restore")

PRESETS: dict[str, DuQuantConfig] = {
    "default": DuQuantConfig(),
    "simple": DuQuantConfig(scope=ACTION_EXPERT, permute=False, rotation="none"),
    "optimized": dataclasses.replace(_RESEARCH, scope=ACTION_EXPERT),
    "dit_qkvo": dataclasses.replace(_RESEARCH, scope=ACTION_EXPERT, include=r"\.(q|k|v|o)_proj$"),
    "llm": dataclasses.replace(_RESEARCH, scope=LANGUAGE_MODEL),
    "full_llm_dit": dataclasses.replace(_RESEARCH, rotation_block=64),
    "quantvla": dataclasses.replace(
        _RESEARCH, rotation_block=64, exclude=_RESEARCH.exclude + r"|gemma_expert.*self_attn"
    ),
}
"""The presets of the research launchers, and `default`, the best we know."""


def preset(name: str) -> DuQuantConfig:
    """The preset of that name.

    Raises:
        DuQuantError: If there is none; names the presets there are.
    """
    if name not in PRESETS:
        raise DuQuantError(f"unknown preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]
