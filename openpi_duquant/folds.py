"""Exact changes to floating-point weights that take a transform off the run time.

(a) `norm_gain`: Gemma's (1 + w) into the columns of all consumers of the norm, save what balances the two.
(b) `down_permutation`: the permutation of `down`'s input into the rows of `gate` and `up` (GeGLU is elementwise).
(c) `value_head`: one permutation and rotation of the value head per layer, into the rows of `v` and the columns of `o`,
    the same for all query heads and in both models, because the expert attends to the language model's values.

Each works on a dict of one decoder layer's tensors, whatever is quantized later; both runtimes read the result.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor

from openpi_duquant import fitting
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import LANGUAGE_MODEL
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.linear import LayerSpec

_DECODER_LAYER = re.compile(f"^({re.escape(LANGUAGE_MODEL)}|{re.escape(ACTION_EXPERT)})layers\\.(\\d+)\\.")
_NORM_CONSUMERS = {
    "input_layernorm.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm.weight": ("mlp.gate_proj", "mlp.up_proj"),
}

_FOLDED_INPUT = {"pre_rotation": False, "permute": False, "rotation": "none", "rotation_block": 0}

_WEAKEST = 1e-4
"""Energy of a channel that hardly is read, as a share of the mean."""

Weights = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Fold:
    """One fold.

    Attributes:
        kind: "norm_gain", "down_permutation" or "value_head".
        tensors: Names of all tensors it changes, in the order in which its function takes them.
        block: Of a value head, the block of its zigzag and rotation.
    """

    kind: str
    tensors: tuple[str, ...]
    block: int = 0

    def to_json(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


def decoder_layer(name: str) -> int | None:
    """Index of the decoder layer that a tensor or module belongs to, of either Gemma; None elsewhere."""
    match = _DECODER_LAYER.match(name)
    return int(match[2]) if match else None


def plan_folds(
    tensors: Mapping[str, tuple[int, ...]], specs: Mapping[str, LayerSpec], config: DuQuantConfig
) -> tuple[list[Fold], dict[str, LayerSpec]]:
    """The folds that the selected layers call for, and the specs of what is left for the run time.

    Args:
        tensors: Shapes of all tensors of the checkpoint.
        specs: What `plan_layers` returned.
        config: The configuration.

    Returns:
        Folds in the order in which they are applied, and specs of the same layers.

    Raises:
        DuQuantError: On row_rotation="propagate" when no `v` is selected.
    """
    prefixes = dict.fromkeys(match[0] for name in tensors if (match := _DECODER_LAYER.match(name)))
    spreads = config.rotation in ("hadamard", "duquant")  # else a weight that takes a gain has outliers of its own
    folds, remaining = [], dict(specs)
    for prefix in prefixes:
        for norm, consumers in _NORM_CONSUMERS.items():
            if spreads and prefix + norm in tensors and any(prefix + consumer in specs for consumer in consumers):
                names = (prefix + norm, *(f"{prefix}{consumer}.weight" for consumer in consumers))
                folds.append(Fold("norm_gain", names))
        down = prefix + "mlp.down_proj"
        if down in specs and specs[down].permute and not specs[down].pre_rotation:
            names = tuple(f"{prefix}mlp.{projection}_proj.weight" for projection in ("gate", "up", "down"))
            folds.append(Fold("down_permutation", names))
            remaining[down] = dataclasses.replace(specs[down], permute=False)
    for prefix in (prefix for prefix in prefixes if prefix.startswith(LANGUAGE_MODEL)):
        fold, changed = _plan_value_head(prefix, tensors, specs, config)
        folds += fold
        remaining |= changed
    if config.row_rotation == "propagate" and not any(spec.output_rotation == "folded" for spec in remaining.values()):
        raise DuQuantError("row_rotation: 'propagate' rotates the rows of v_proj only, and none is selected")
    return folds, remaining


def _plan_value_head(
    prefix: str, tensors: Mapping[str, tuple[int, ...]], specs: Mapping[str, LayerSpec], config: DuQuantConfig
) -> tuple[list[Fold], dict[str, LayerSpec]]:
    """The fold of a layer's value head, if one is called for, and the specs that it changes."""
    both = prefix, prefix.replace(LANGUAGE_MODEL, ACTION_EXPERT)
    names = tuple(f"{each}self_attn.{projection}_proj.weight" for each in both for projection in ("v", "o"))
    values, outputs = _quantized(names[::2], specs), _quantized(names[1::2], specs)
    propagated = values if config.row_rotation == "propagate" else []
    if not (outputs or propagated) or not (config.permute or config.rotation != "none"):
        return [], {}
    block = math.gcd(config.rotation_block, tensors[prefix + "self_attn.v_proj.weight"][0])
    changed = {name: dataclasses.replace(specs[name], **_FOLDED_INPUT) for name in outputs}
    for name in propagated:
        changed[name] = dataclasses.replace(specs[name], output_rotation="folded", output_rotation_block=block)
    return [Fold("value_head", names, block)], changed


def _quantized(weights: Iterable[str], specs: Mapping[str, LayerSpec]) -> list[str]:
    """Names of the layers of these weights that are quantized."""
    return [layer for name in weights if (layer := name.removesuffix(".weight")) in specs]


def apply_folds(
    weights: Weights, folds: Iterable[Fold], specs: Mapping[str, LayerSpec], config: DuQuantConfig
) -> Weights:
    """Applies folds whose tensors are all in `weights`, in fp32.

    Args:
        weights: Tensors by name: at least those of the decoder layers that the folds name.
        folds: From `plan_folds`.
        specs: The quantized layers.
        config: rotation, permute and smoothing are read.

    Returns:
        `weights` itself, with what changed replaced, in fp32.
    """
    for fold in folds:
        if fold.kind == "norm_gain":
            weights |= fold_norm_gain(weights, *fold.tensors)
        elif fold.kind == "down_permutation":
            weights |= fold_down_permutation(weights, *fold.tensors, config)
        else:
            weights |= fold_value_head(weights, fold, specs, config)
    return weights


def fold_norm_gain(weights: Weights, norm: str, *consumers: str) -> Weights:
    """Balances the gain (1 + w) [K] of a norm and the columns of its consumers [N, K]; returns what changed.

    Where inputs have energies h_k, and columns w_k that a rotation spreads, rounding errs by about
    sqrt(sum_k h_k sum_k w_k). Of all ways to divide the products h_k w_k between the two, equal shares give the least
    (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, for mean squares). A normed input has about unit energy before its
    gain, so the norm keeps the fourth root of the columns' energy under the whole gain.

    The gain that is kept is one of bf16, so that it is stored exactly.
    """
    gain = 1.0 + weights[norm].float()
    energy = sum(len(weights[name]) * fitting.channel_energy(weights[name]) for name in consumers) * gain.double() ** 2
    energy = energy.clamp(min=_WEAKEST * energy.mean() + torch.finfo(torch.float64).tiny)
    kept = (0.25 * (energy.log() - energy.log().mean())).exp() - 1.0
    kept = kept.bfloat16().float()
    return {name: weights[name].float() * (gain / (1.0 + kept)) for name in consumers} | {norm: kept}


def fold_down_permutation(weights: Weights, gate: str, up: str, down: str, config: DuQuantConfig) -> Weights:
    """Permutes the rows of `gate` and `up` and the columns of `down`, by the zigzag of `down`; returns what changed."""
    energy = fitting.channel_energy(weights[down], config.smoothing)
    permutation = fitting.zigzag_permutation(energy, math.gcd(config.rotation_block, len(energy)))
    return {gate: weights[gate][permutation], up: weights[up][permutation], down: weights[down][:, permutation]}


def fold_value_head(weights: Weights, fold: Fold, specs: Mapping[str, LayerSpec], config: DuQuantConfig) -> Weights:
    """Transforms the value head in the rows of `v` and, head by head, the columns of `o`.

    The transform suits the quantized `o` layers of both models, all heads taken together, or the quantized `v` layers
    where no `o` is.

    Returns:
        The `v` and `o` weights of both models.
    """
    values, outputs = fold.tensors[::2], fold.tensors[1::2]
    head_dim = len(weights[values[0]])
    samples = [weights[layer + ".weight"].float() for layer in _quantized(outputs, specs)]
    samples = samples or [weights[layer + ".weight"].float().T for layer in _quantized(values, specs)]
    heads = torch.cat([sample.reshape(-1, head_dim) for sample in samples])
    transform = fitting.fit_transform(
        heads, config.rotation, fold.block, permute=config.permute, smoothing=config.smoothing
    )
    changed = {}
    for value, output in zip(values, outputs):
        changed[value] = transform.apply(weights[value].float().T).T.contiguous()
        by_head = weights[output].float().unflatten(1, (-1, head_dim))
        changed[output] = transform.dual().apply(by_head).flatten(1)
    return changed
