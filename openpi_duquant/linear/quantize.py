"""From floating-point weights to the tensors of quantized layers, group by group."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import logging
import math

import torch
from torch import Tensor
from torch import nn

from openpi_duquant import fitting
from openpi_duquant import packing
from openpi_duquant import quant
from openpi_duquant import transforms
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.gptq import Feedback
from openpi_duquant.linear.calibration import Calibration
from openpi_duquant.linear.calibration import executed_groups
from openpi_duquant.linear.calibration import input_moment
from openpi_duquant.linear.calibration import runner
from openpi_duquant.linear.module import QuantLinear
from openpi_duquant.linear.rounding import InputMoment
from openpi_duquant.linear.rounding import fit_feedback
from openpi_duquant.linear.rounding import round_together
from openpi_duquant.linear.select import select_linears
from openpi_duquant.linear.spec import LayerSpec
from openpi_duquant.profiling import span

logger = logging.getLogger(__name__)

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def group_leaders(widths: Mapping[str, int]) -> dict[str, str]:
    """Every layer's group: the first among q/k/v or gate/up siblings as wide as it is, else the layer itself.

    Args:
        widths: in_features of the layers, by name.
    """
    leaders: dict[tuple[str, int | str, int], str] = {}
    groups = {}
    for name, width in widths.items():
        parent, _, child = name.rpartition(".")
        siblings = next((index for index, family in enumerate(_SIBLINGS) if child in family), child)
        groups[name] = leaders.setdefault((parent, siblings, width), name)
    return groups


def members_by_group(specs: Mapping[str, LayerSpec]) -> dict[str, list[str]]:
    """The layers of every group, in order."""
    members: dict[str, list[str]] = {}
    for name, spec in specs.items():
        members.setdefault(spec.group, []).append(name)
    return members


def plan_layers(
    shapes: Mapping[str, tuple[int, int]], biased: Iterable[str], config: DuQuantConfig
) -> dict[str, LayerSpec]:
    """Specs of the layers that `config` selects, every transform done at run time (see `folds` for what is folded).

    A rotation block that does not divide a layer's width becomes the greatest common divisor of the two; where that
    is 1, the layer is not rotated. The spec says which block it got.

    Args:
        shapes: (out_features, in_features) of every linear layer, by name.
        biased: Those that have a bias.
        config: The configuration.

    Raises:
        DuQuantError: If nothing is selected, or a width fits neither int4 packing nor the group size.
    """
    selected = select_linears(shapes, config)
    groups = group_leaders({name: shapes[name][1] for name in selected})
    with_bias = set(biased)
    specs = {}
    for name in selected:
        n, k = shapes[name]
        bits = config.bits_of(name)
        _check_fits(name, k, bits, config.group_size)
        rotation, block = _fit(config.rotation, config.rotation_block, k)
        output_rotation, output_block = _fit(config.rotation, config.output_block, n)
        specs[name] = LayerSpec(
            in_features=k,
            out_features=n,
            bias=name in with_bias,
            weight_bits=bits,
            activation_bits=config.activation_bits,
            group_size=config.group_size,
            pre_rotation=config.permute and config.rotation == "duquant" and block > 0,
            permute=config.permute,
            rotation=rotation,
            rotation_block=block,
            output_rotation=output_rotation,
            output_rotation_block=output_block,
            group=groups[name],
        )
    return specs


def _check_fits(name: str, width: int, bits: int, group_size: int | None) -> None:
    if bits == 4 and width % 2:
        raise DuQuantError(
            f"{name}: in_features {width} is odd, int4 fills bytes in pairs; exclude it or give it 8 bits"
        )
    if group_size and width % group_size:
        raise DuQuantError(f"{name}: in_features {width} is not a multiple of group_size {group_size}")


def _fit(rotation: str, block: int, width: int) -> tuple[str, int]:
    """Stored kind and block of a rotation for channels of that width."""
    fitting = math.gcd(block, width) if block else 1
    if rotation == "none" or fitting == 1:
        return "none", 0
    return ("hadamard" if rotation == "hadamard" else "matrix"), fitting


def quantize_group(
    weights: Mapping[str, Tensor],
    specs: Mapping[str, LayerSpec],
    config: DuQuantConfig,
    moment: InputMoment | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Quantizes layers that read one input, with one permutation and one rotation.

    Args:
        weights: [N_i, K] floating point, by layer name; all of one group.
        specs: Their specs.
        config: smoothing, scale_search, gptq_dampening and the block of the zigzag are read.
        moment: Of the inputs: rounds by GPTQ. None: to the nearest.

    Returns:
        By layer, the tensors that `LayerSpec.tensors` names; shared ones are the same object.

    Raises:
        DuQuantError: If the moment is not finite, or singular.
    """
    lead = specs[next(iter(weights))]
    stacked = torch.cat([weight.float() for weight in weights.values()])
    with span("weight_prequant", stacked, next(iter(weights))), transforms.full_precision(stacked):
        transform = fitting.fit_transform(
            stacked,
            config.rotation if lead.rotation_block else "none",
            math.gcd(config.rotation_block, lead.in_features),
            permute=lead.permute,
            smoothing=config.smoothing,
        )
        shared = {name: part for name, part in transform._asdict().items() if isinstance(part, Tensor)}
        stacked = transform.dual().apply(stacked)
        feedback = moment and fit_feedback(moment, transform, stacked, lead.weight_bits, config.gptq_dampening)
        parts = dict(zip(weights, stacked.split([specs[name].out_features for name in weights])))
        tensors: dict[str, dict[str, Tensor]] = {}
        for bits in dict.fromkeys(specs[name].weight_bits for name in weights):
            alike = {name: part for name, part in parts.items() if specs[name].weight_bits == bits}
            tensors |= _quantize_rows(alike, specs, config, feedback)
        return {name: shared | tensors[name] for name in weights}


def by_full_name(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of layers, as `quantize_group` returns them, by the names that a checkpoint has for them."""
    return {f"{layer}.{name}": tensor for layer, parts in tensors.items() for name, tensor in parts.items()}


def _quantize_rows(
    weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], config: DuQuantConfig, feedback: Feedback | None
) -> dict[str, dict[str, Tensor]]:
    """Quantizes transformed weights of as many bits, side by side."""
    bits = specs[next(iter(weights))].weight_bits
    tensors: dict[str, dict[str, Tensor]] = {}
    turned, scales = [], []
    for name, weight in weights.items():
        rows, tensors[name] = _rotate_outputs(weight, specs[name], config)
        turned.append(rows)
        scales.append(quant.weight_scale(rows, bits, specs[name].group_size, config.scale_search))
    for name, (codes, scale) in zip(weights, round_together(turned, scales, bits, feedback)):
        tensors[name] |= {"weight_packed": packing.pack(codes, bits), "weight_scale": scale}
    return tensors


def _rotate_outputs(weight: Tensor, spec: LayerSpec, config: DuQuantConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight with its rows rotated, if the layer restores them, and the matrix for that, if there is one."""
    if spec.output_rotation not in ("hadamard", "matrix"):
        return weight, {}
    restore = transforms.inverse(fitting.fit_rotation(weight.T, config.rotation, spec.output_rotation_block))
    tensors = {}
    if isinstance(restore, Tensor):
        restore = tensors["output_rotation"] = restore.bfloat16().contiguous()
    return transforms.rotate_rows(weight, transforms.inverse(restore)), tensors


def quantize_(
    model: nn.Module, config: DuQuantConfig, *, backend: str = "auto", calibration: Calibration | None = None
) -> dict[str, LayerSpec]:
    """Replaces the selected nn.Linear layers of any model by `QuantLinear`, in place; nothing is folded.

    A layer that the model holds under two names is replaced under both. On an error the model is as it was.

    With calibration, weights are rounded by GPTQ, group after group in the order in which they run, each calibrated on
    what its quantized predecessors feed it. The model is run over all calibration inputs once for each group and once
    more before; the memory is that of one group's moment, 8 K^2 bytes, and of what GPTQ makes of it. Layers that turn
    out to read different inputs are parted; one that never runs is rounded to nearest, with a warning.

    Args:
        model: Any module.
        config: The configuration.
        backend: A name that `kernels.resolve` knows.
        calibration: Inputs of the model, or what runs the model it is given on them; see `Calibration`. Not looked at
            if config.weight_rounding is "nearest".

    Returns:
        The specs of the replaced layers, by name.

    Raises:
        DuQuantError: As `plan_layers`; on a weight or input that is not finite; on row_rotation="propagate", which is
            a fold; on weight_rounding="gptq" without calibration, or if it leaves a layer out.
    """
    if config.row_rotation == "propagate":
        raise DuQuantError(
            "row_rotation: 'propagate' is a fold, made when a checkpoint is converted; use '0' or 'restore'"
        )
    if config.weight_rounding == "gptq" and calibration is None:
        raise DuQuantError("weight_rounding: 'gptq' needs calibration data; give quantize_ calibration=")
    linears, specs = _plan_model(model, config)
    if calibration is None or config.weight_rounding == "nearest":
        tensors = {}
        for names in members_by_group(specs).values():
            tensors |= quantize_group({name: linears[name].weight.detach() for name in names}, specs, config)
    else:
        specs, tensors = calibrate_groups(model, linears, specs, config, runner(calibration))
    layers = {name: quant_linear(linears[name], specs[name], tensors[name], backend) for name in specs}
    replace_modules(model, {linears[name]: layer for name, layer in layers.items()})
    return specs


def _plan_model(model: nn.Module, config: DuQuantConfig) -> tuple[dict[str, nn.Linear], dict[str, LayerSpec]]:
    """The selected layers of a model, checked, and their specs."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: (module.out_features, module.in_features) for name, module in linears.items()}
    if "" in linears:
        raise DuQuantError("the model is itself an nn.Linear, which cannot be replaced in place; put it into a module")
    for name in select_linears(shapes, config):
        if type(linears[name]) is not nn.Linear:
            kind = type(linears[name]).__name__
            raise DuQuantError(f"{name}: is a {kind}, whose host may read its weight directly; exclude it")
    specs = plan_layers(shapes, [name for name, module in linears.items() if module.bias is not None], config)
    for name in specs:
        require_finite(name, linears[name].weight.detach())
    return {name: linears[name] for name in specs}, specs


def calibrate_groups(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    specs: Mapping[str, LayerSpec],
    config: DuQuantConfig,
    run: Callable[[nn.Module], object],
) -> tuple[dict[str, LayerSpec], dict[str, dict[str, Tensor]]]:
    """Specs, with the groups that were found, and tensors of all layers; the model is left as it was."""
    groups = executed_groups(model, linears, {name: spec.group for name, spec in specs.items()}, run)
    idle = [[name] for name in specs if not any(name in group for group in groups)]
    if idle:
        message = f"{', '.join(name for (name,) in idle)}: not run by the calibration inputs"
        if config.weight_rounding == "gptq":
            raise DuQuantError(f"{message}; exclude it or take weight_rounding 'auto'")
        logger.warning("%s; rounded to nearest", message)
    parted: dict[str, LayerSpec] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    stand_ins: dict[nn.Module, nn.Module] = {}
    try:
        for group in [*groups, *idle]:
            names = [name for name in specs if name in group]
            parted |= {name: dataclasses.replace(specs[name], group=names[0]) for name in names}
            moment = None if group in idle else input_moment(model, group[0], linears[group[0]], run)
            weights = {name: linears[name].weight.detach() for name in names}
            for name, by_name in quantize_group(weights, parted, config, moment).items():
                tensors[name] = by_name
                stand_ins[linears[name]] = quant_linear(linears[name], parted[name], by_name, "fake")
            replace_modules(model, {linears[name]: stand_ins[linears[name]] for name in names})
    finally:
        replace_modules(model, {stand_in: linear for linear, stand_in in stand_ins.items()})
    return {name: parted[name] for name in specs}, tensors


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces modules within a model, each under all of its names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacements[module])


def require_finite(name: str, weight: Tensor) -> None:
    """Raises DuQuantError, naming the weight, if it holds NaN or Inf."""
    if not all(extreme.isfinite() for extreme in weight.aminmax()):
        raise DuQuantError(f"{name}: the weight holds NaN or Inf; a policy with such a weight cannot be quantized")


def quant_linear(linear: nn.Linear, spec: LayerSpec, tensors: Mapping[str, Tensor], backend: str) -> QuantLinear:
    """The `QuantLinear` that takes the place of `linear`, with tensors from `quantize_group`."""
    layer = QuantLinear(spec, backend=backend, dtype=linear.weight.dtype, device="meta")
    state = {name: tensor.to(linear.weight.device) for name, tensor in tensors.items()}
    if linear.bias is not None:
        state["bias"] = linear.bias.detach()
    layer.load_state_dict(state, assign=True)
    return layer.train(linear.training)
