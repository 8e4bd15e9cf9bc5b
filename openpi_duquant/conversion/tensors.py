"""The arithmetic of a conversion: tensors in, tensors out, those of one decoder layer at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import itertools

from torch import Tensor

from openpi_duquant.architecture import EXPERT_LM_HEAD
from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.conversion.plan import Plan
from openpi_duquant.conversion.plan import layer_of
from openpi_duquant.folds import apply_folds
from openpi_duquant.folds import decoder_layer
from openpi_duquant.linear import quantize_group
from openpi_duquant.linear.quantize import by_full_name
from openpi_duquant.linear.quantize import members_by_group
from openpi_duquant.linear.quantize import require_finite

Read = Callable[[str], Tensor]
"""Returns a tensor of the source by name, on the device where the arithmetic is done."""

Progress = Callable[[int], None]
"""Called with the number, of source bytes or of observations, that are done since the last call."""


def convert_tensors(
    read: Read,
    plan: Plan,
    progress: Progress = lambda _: None,
    calibrated: Callable[[int], Mapping[str, Tensor]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the result, one decoder layer of both Gemmas after the other.

    Args:
        read: See `Read`.
        plan: The plan.
        progress: Called with source bytes as they are done.
        calibrated: The tensors of a decoder layer that is converted already, by its index.

    Raises:
        DuQuantError: On a weight that is not finite.
    """
    for names in units(plan):
        index = decoder_layer(names[0])
        if calibrated is not None and index is not None:
            yield from calibrated(index).items()
            continue
        weights = folded_unit(read, plan, names)
        yield from kept(weights, round_to_nearest(weights, plan), plan)
        progress(source_bytes(names, plan))
        del weights
    progress(source_bytes([name for name in plan.source if name == EXPERT_LM_HEAD], plan))


def source_bytes(names: Iterable[str], plan: Plan) -> int:
    """Bytes of these tensors of the source."""
    return sum(iter_bytes({name: plan.source[name] for name in names}))


def folded_tensors(read: Read, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the source with the folds of the plan, not quantized; those that changed in fp32."""
    for names in units(plan):
        yield from folded_unit(read, plan, names).items()


def folded_unit(read: Read, plan: Plan, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of one of the `units`, folded; originals are let go as they are replaced.

    Raises:
        DuQuantError: On a weight that is not finite, before or after.
    """
    folds = [fold for fold in plan.folds if fold.tensors[0] in names]
    weights = apply_folds(_read_finite(read, names), folds, plan.layers, plan.config)
    for name in itertools.chain.from_iterable(fold.tensors for fold in folds):
        require_finite(name, weights[name])
    return weights


def _read_finite(read: Read, names: Sequence[str]) -> dict[str, Tensor]:
    weights = {name: read(name) for name in names}
    for name, weight in weights.items():
        require_finite(name, weight)
    return weights


def units(plan: Plan) -> list[list[str]]:
    """Names of source tensors that must be at hand together."""
    by_key: dict[object, list[str]] = {}
    for name in plan.source:
        if name == EXPERT_LM_HEAD:
            continue
        layer = plan.layers.get(layer_of(name))
        index = decoder_layer(name)
        key = index if index is not None else layer.group if layer else name
        by_key.setdefault(key, []).append(name)
    return list(by_key.values())


def round_to_nearest(weights: Mapping[str, Tensor], plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the quantized layers among these folded weights, group after group."""
    present = {layer: spec for layer, spec in plan.layers.items() if layer + ".weight" in weights}
    for layers in members_by_group(present).values():
        tensors = quantize_group({layer: weights[layer + ".weight"] for layer in layers}, plan.layers, plan.config)
        yield from by_full_name(tensors).items()


def kept(
    weights: Mapping[str, Tensor], quantized: Iterable[tuple[str, Tensor]], plan: Plan
) -> Iterator[tuple[str, Tensor]]:
    """What the result keeps of quantized and of floating-point tensors, in its dtypes."""
    types = plan.types
    yield from ((name, tensor) for name, tensor in quantized if name in types)
    yield from ((name, weight.to(types[name][0])) for name, weight in weights.items() if name in types)
