"""A policy so small that its actions take milliseconds."""

import torch
from torch import Tensor

from openpi_duquant import synthetic
from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import TransformerSize
from openpi_duquant.architecture import parameter_shapes

TINY = Architecture(
    vision=TransformerSize(72, 1, 40, 1, 72),
    language=TransformerSize(64, 3, 128, 2, 64),
    expert=TransformerSize(32, 3, 64, 2, 64),
    vocab_size=64,
    action_dim=32,
)


def random_state(architecture: Architecture) -> dict[str, Tensor]:
    """fp32 tensors by openpi's names."""
    generator = torch.Generator().manual_seed(1)
    shapes = parameter_shapes(architecture)
    return {name: synthetic.random_parameter(name, shape, architecture, generator) for name, shape in shapes.items()}
