"""openpi's own PI0Pytorch with quantized layers in place of its linear layers."""

import pathlib

from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
import torch
from torch import Tensor
from torch import nn

from openpi_duquant.architecture import EMBEDDING
from openpi_duquant.architecture import LANGUAGE_MODEL
from openpi_duquant.architecture import kept_in_float32
from openpi_duquant.checkpoint import Manifest
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.checkpoint.load import place_quant_linears
from openpi_duquant.checkpoint.load import stored_name
from openpi_duquant.checkpoint.load import verify
from openpi_duquant.config import DuQuantError
from openpi_duquant.plugin.engine_model import Pi0ConfigLike

TIED_EMBEDDING = LANGUAGE_MODEL + "embed_tokens.weight"
"""The second name of the token embedding, which a checkpoint stores once."""


def load_module(folder: pathlib.Path, manifest: Manifest, config: Pi0ConfigLike, *, backend: str) -> nn.Module:
    """openpi's PI0Pytorch of a converted checkpoint; its quantized layers are never held in floating point.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        config: openpi's config of the model; its pytorch_compile_mode is obeyed.
        backend: Backend of the quantized layers.

    Raises:
        DuQuantError: If the checkpoint is damaged, or does not fit the model.
    """
    with torch.device("meta"):
        model = PI0Pytorch(config)
    model.paligemma_with_expert.gemma_expert.lm_head = None  # never called, and not in the checkpoint
    dtype = getattr(torch, config.dtype)
    placed = place_quant_linears(model, manifest.layers, backend=backend, dtype=dtype)
    missing = sorted(set(manifest.layers) - set(placed))
    if missing:
        raise DuQuantError(f"{folder}: openpi's model has no layer {missing[0]} ({len(missing)} missing)")
    with SafetensorsReader(folder) as reader:
        verify(reader, manifest, folder)
        state = _read_state(model, reader, manifest, dtype, folder)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise DuQuantError(f"{folder}: does not fit openpi's model: {' '.join(str(error).split())}") from None
    _compute_buffers(model, folder)
    return model.requires_grad_(requires_grad=False).eval()


def _read_state(
    model: nn.Module, reader: SafetensorsReader, manifest: Manifest, dtype: torch.dtype, folder: pathlib.Path
) -> dict[str, Tensor]:
    """What `model` asks for, in its types; tensors that layers share, and the tied embedding, are one object."""
    stored: dict[str, Tensor] = {}
    state = {}
    for name in model.state_dict():
        source = EMBEDDING + ".weight" if name == TIED_EMBEDDING else stored_name(name, manifest.layers)
        if source not in reader:
            raise DuQuantError(f"{folder}: has no {source}, which openpi's model needs")
        if source not in stored:
            quantized = name.rpartition(".")[0] in manifest.layers
            kind = None if quantized else torch.float32 if kept_in_float32(name) else dtype
            stored[source] = reader.read(source).to(kind)
        state[name] = stored[source]
    return state


def _compute_buffers(model: nn.Module, folder: pathlib.Path) -> None:
    """Computes what no checkpoint holds and a model built without memory lacks: rotary frequencies, patch positions."""
    for module in model.modules():
        if hasattr(module, "rope_init_fn"):
            module.inv_freq, module.attention_scaling = module.rope_init_fn(module.config, torch.device("cpu"))
            module.original_inv_freq = module.inv_freq
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.num_positions).expand(1, -1)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise DuQuantError(f"{folder}: nothing fills {name} of openpi's model; this openpi is not supported")
