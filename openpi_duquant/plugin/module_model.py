"""openpi's own PI0Pytorch with quantized layers in place of its linear layers."""

import pathlib

from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
import torch
from torch import nn

from openpi_duquant.checkpoint import Manifest
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.checkpoint.load import fill_openpi_model
from openpi_duquant.checkpoint.load import verify
from openpi_duquant.config import DuQuantError
from openpi_duquant.plugin.engine_model import Pi0ConfigLike


def load_module(
    folder: pathlib.Path, manifest: Manifest, config: Pi0ConfigLike, *, backend: str, device: str
) -> nn.Module:
    """openpi's PI0Pytorch of a converted checkpoint; its quantized layers are never held in floating point.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.
        config: openpi's config of the model; its pytorch_compile_mode is obeyed.
        backend: Backend of the quantized layers.
        device: Where to put it.

    Raises:
        DuQuantError: If the checkpoint is damaged, or does not fit the model; if the backend cannot run.
    """
    with torch.device("meta"):
        model = PI0Pytorch(config)
    dtype = getattr(torch, config.dtype)
    with SafetensorsReader(folder) as reader:
        verify(reader, manifest, folder)
        try:
            fill_openpi_model(model, reader, manifest.layers, backend=backend, dtype=dtype, device=device)
        except DuQuantError as error:
            raise DuQuantError(f"{folder}: {error}") from None
    return model
