"""openpi's PI0Pytorch out of a checkout, for `bench-policy`: of openpi only the PyTorch files are imported.

jax is not needed: what those files ask of the rest of openpi is a table of sizes, and a function that resizes images,
which images of 224 x 224 never reach. openpi's changed files of transformers are used without copying them.
"""

import importlib
import pathlib
import sys
import types

import torch
from torch import nn

from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import TransformerSize
from openpi_duquant.config import DuQuantError
from openpi_duquant.installation import TRANSFORMERS
from openpi_duquant.installation import find_transformers


def build(source: pathlib.Path, architecture: Architecture, *, horizon: int, compile_mode: str | None) -> nn.Module:
    """A PI0Pytorch in bf16 without weights, on the meta device; call it once in a process that imports no openpi.

    Args:
        source: The checkout.
        architecture: Sizes.
        horizon: Actions that a call gives.
        compile_mode: As openpi's `pytorch_compile_mode`.

    Raises:
        DuQuantError: If there is no such checkout, or no transformers of the version that it needs.
    """
    package = source.resolve() / "src" / "openpi" / "models_pytorch"
    if not (package / "pi0_pytorch.py").exists():
        raise DuQuantError(f"OPENPI_SRC: {package / 'pi0_pytorch.py'} does not exist; name a checkout of openpi")
    found = find_transformers()
    if not found.state.startswith(f"{TRANSFORMERS},"):
        raise DuQuantError(f"transformers: {found.state}; {found.fix}")
    sizes = {"gemma_2b": _gemma(architecture.language), "gemma_300m": _gemma(architecture.expert)}
    openpi = _stand_in("openpi", models=_stand_in("openpi.models"), shared=_stand_in("openpi.shared"))
    openpi.models.gemma = _stand_in("openpi.models.gemma", get_config=sizes.__getitem__)
    openpi.shared.image_tools = _stand_in("openpi.shared.image_tools")
    _stand_in("openpi.models_pytorch", __path__=[str(package)])
    for file in sorted((package / "transformers_replace" / "models").glob("*/*.py")):
        parent = importlib.import_module(f"transformers.models.{file.parent.name}")
        if str(file.parent) not in parent.__path__:
            parent.__path__.insert(0, str(file.parent))
    pi0_pytorch = importlib.import_module("openpi.models_pytorch.pi0_pytorch")
    _set_sizes(importlib.import_module("openpi.models_pytorch.gemma_pytorch"), architecture)
    config = types.SimpleNamespace(
        pi05=architecture.pi05,
        paligemma_variant="gemma_2b",
        action_expert_variant="gemma_300m",
        dtype="bfloat16",
        action_dim=architecture.action_dim,
        action_horizon=horizon,
        pytorch_compile_mode=compile_mode,
    )
    with torch.device("meta"):
        return pi0_pytorch.PI0Pytorch(config)


def _stand_in(name: str, **attributes: object) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update({"__path__": []} | attributes)
    sys.modules[name] = module
    return module


def _gemma(size: TransformerSize) -> types.SimpleNamespace:
    return types.SimpleNamespace(**vars(size), num_kv_heads=1)


def _set_sizes(gemma_pytorch: types.ModuleType, architecture: Architecture) -> None:
    """Has it build models of these sizes where it fixes its own, which are those of the full-size policy."""
    paligemma, expert = gemma_pytorch.PaliGemmaForConditionalGeneration, gemma_pytorch.GemmaForCausalLM
    size = architecture.vision

    def build_paligemma(config: types.SimpleNamespace) -> nn.Module:
        config.text_config.vocab_size = architecture.vocab_size
        config.vision_config.hidden_size = size.width
        config.vision_config.num_hidden_layers = size.depth
        config.vision_config.num_attention_heads = size.num_heads
        config.vision_config.intermediate_size = size.mlp_dim
        config.vision_config.projection_dim = architecture.language.width
        return paligemma(config=config)

    def build_expert(config: types.SimpleNamespace) -> nn.Module:
        config.vocab_size = architecture.vocab_size
        return expert(config=config)

    gemma_pytorch.PaliGemmaForConditionalGeneration = build_paligemma
    gemma_pytorch.GemmaForCausalLM = build_expert
