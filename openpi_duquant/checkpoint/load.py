"""What loading a converted checkpoint needs, whichever model it is loaded into."""

from collections.abc import Mapping
import pathlib

import torch
from torch import Tensor
from torch import nn

from openpi_duquant.architecture import EMBEDDING
from openpi_duquant.architecture import LANGUAGE_MODEL
from openpi_duquant.architecture import kept_in_float32
from openpi_duquant.checkpoint.files import SafetensorsReader
from openpi_duquant.checkpoint.files import TensorType
from openpi_duquant.checkpoint.manifest import Manifest
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels.backend import USUAL_TOKENS
from openpi_duquant.kernels.backend import Workload
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear import prepare_
from openpi_duquant.linear.spec import SHARED_TENSORS

TIED_EMBEDDING = LANGUAGE_MODEL + "embed_tokens.weight"
"""The second name that openpi's model has for the token embedding, which a checkpoint stores once."""


TOKENS: dict[str, Workload] = {LANGUAGE_MODEL: ((544, 1), (968, 1)), ACTION_EXPERT: ((10, 10), (50, 10))}
"""What layers of pi0 and pi0.5 see in a call of ten steps: a prompt with two images or three; 10 or 50 actions."""


def tokens_seen(name: str) -> Workload:
    """What the layer of that name sees, see `Problem.tokens`."""
    return next((tokens for prefix, tokens in TOKENS.items() if name.startswith(prefix)), USUAL_TOKENS)


def verify(reader: SafetensorsReader, manifest: Manifest, folder: pathlib.Path) -> None:
    """Raises DuQuantError unless names, dtypes, shapes and bytes are those that the manifest records."""
    expected: dict[str, TensorType] = manifest.types()
    for name in sorted(set(expected) | set(reader.types)):
        if expected.get(name) != reader.types.get(name):
            raise DuQuantError(
                f"{folder}: tensor {name} is {reader.types.get(name, 'missing')}, its manifest says "
                f"{expected.get(name, 'there is none')}; convert the source again"
            )
    packed = sum(name.endswith(".weight_packed") for name in reader.types)
    if not packed == len(manifest.layers) == manifest.counts["layers"]:
        raise DuQuantError(f"{folder}: holds {packed} quantized layers, its manifest says {manifest.counts['layers']}")
    if reader.digest() != manifest.sha256:
        raise DuQuantError(f"{folder}: the weights are not the manifest's (sha256 differs); convert the source again")


def place_quant_linears(
    model: nn.Module, layers: Mapping[str, LayerSpec], *, backend: str, dtype: torch.dtype
) -> list[str]:
    """Puts empty quantized layers (on the meta device) where `model` has layers of these names; returns those names.

    The engine leaves out layers that nothing reads; of those that a checkpoint has, the rest is placed.

    Raises:
        DuQuantError: If a layer of the model has another shape, or on an unknown backend.
    """
    modules = dict(model.named_modules())
    placed = [name for name in layers if name in modules]
    for name in placed:
        has, wanted = tuple(modules[name].weight.shape), (layers[name].out_features, layers[name].in_features)
        if has != wanted:
            raise DuQuantError(f"{name}: is {wanted} in the checkpoint and {has} in the model; take the model it is of")
        parent, _, child = name.rpartition(".")
        given = {"backend": backend, "dtype": dtype, "tokens": tokens_seen(name)}
        layer = QuantLinear(layers[name], **given, device="meta")
        setattr(modules[parent], child, layer)
    return placed


def stored_name(name: str, layers: Mapping[str, LayerSpec]) -> str:
    """The name under which a tensor of a model is stored: of shared ones, that of the group's first layer."""
    layer, _, tensor = name.rpartition(".")
    return f"{layers[layer].group}.{tensor}" if layer in layers and tensor in SHARED_TENSORS else name


def tensors_of(layer: str, layers: Mapping[str, LayerSpec], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that `LayerSpec.tensors` names, of one layer of a checkpoint; looked up one by one."""
    return {name: tensors[stored_name(f"{layer}.{name}", layers)] for name in layers[layer].tensors()}


def fill_openpi_model(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, LayerSpec],
    *,
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Gives openpi's PI0Pytorch its tensors and its quantized layers, which are never held in floating point.

    Args:
        model: On the meta device.
        tensors: By name, as in a checkpoint; looked up one by one, what it does not use never.
        layers: The quantized layers.
        backend: Their backend.
        dtype: Type of floating-point tensors (fp32 where openpi computes in fp32).
        device: Where to put them.

    Raises:
        DuQuantError: If a layer or a tensor is missing or of a wrong shape, or the backend cannot run.
    """
    model.paligemma_with_expert.gemma_expert.lm_head = None  # never called, and not in converted checkpoints
    placed = place_quant_linears(model, layers, backend=backend, dtype=dtype)
    missing = sorted(set(layers) - set(placed))
    if missing:
        raise DuQuantError(f"openpi's model has no layer {missing[0]} ({len(missing)} missing)")
    try:
        model.load_state_dict(_openpi_state(model, tensors, layers, dtype, device), assign=True)
    except RuntimeError as error:
        raise DuQuantError(f"the checkpoint does not fit openpi's model: {' '.join(str(error).split())}") from None
    _compute_buffers(model, device)
    prepare_(model)
    model.requires_grad_(requires_grad=False).eval()


def _openpi_state(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, LayerSpec],
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """What `model` asks for, in its types; tensors that layers share, and the tied embedding, are one object."""
    stored: dict[str, Tensor] = {}
    state = {}
    for name in model.state_dict():
        source = EMBEDDING + ".weight" if name == TIED_EMBEDDING else stored_name(name, layers)
        if source not in tensors:
            raise DuQuantError(f"the checkpoint has no {source}, which openpi's model needs")
        if source not in stored:
            quantized = name.rpartition(".")[0] in layers
            kind = None if quantized else torch.float32 if kept_in_float32(name) else dtype
            stored[source] = tensors[source].to(device, kind)
        state[name] = stored[source]
    return state


def _compute_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Computes what no checkpoint holds and a model built without memory lacks: rotary frequencies, patch positions."""
    for module in model.modules():
        if hasattr(module, "rope_init_fn"):
            module.inv_freq, module.attention_scaling = module.rope_init_fn(module.config, torch.device(device))
            module.original_inv_freq = module.inv_freq
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.num_positions, device=device).expand(1, -1)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise DuQuantError(f"nothing fills {name} of openpi's model; this openpi is not supported")
