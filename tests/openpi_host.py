"""The real openpi as a test host: importable from a checkout, and shrunk to sizes that a CPU runs in a second.

Nothing of openpi is stored here. Call `import_openpi` first: every other function imports openpi when it is called.
"""

from collections.abc import Iterator
import contextlib
import copy
import dataclasses
import importlib
import json
import math
import pathlib
import sys
import types
from typing import Any
from unittest import mock

import numpy as np
from safetensors.torch import save_model
import torch
from torch import Tensor
from torch import nn


def import_openpi(source: pathlib.Path) -> None:
    """Make openpi importable from the checkout `source`, with its transformers overlay and stand-ins for lerobot.

    Idempotent. Raises RuntimeError where another openpi, or a module that the overlay replaces, was imported before.
    """
    package = source.resolve() / "src" / "openpi"
    for folder in (package.parent, source.resolve() / "packages" / "openpi-client" / "src"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    _import_from("openpi", package / "__init__.py")
    for file in sorted((package / "models_pytorch" / "transformers_replace" / "models").glob("*/*.py")):
        parent = importlib.import_module(f"transformers.models.{file.parent.name}")
        if str(file.parent) not in parent.__path__:
            parent.__path__.insert(0, str(file.parent))
        _import_from(f"{parent.__name__}.{file.stem}", file)
    check = importlib.import_module("transformers.models.siglip.check")
    if not check.check_whether_transformers_replace_is_installed_correctly():
        raise RuntimeError("openpi's transformers overlay needs transformers 4.53.2")
    for name in ("lerobot", "lerobot.common", "lerobot.common.datasets", "lerobot.common.datasets.lerobot_dataset"):
        sys.modules.setdefault(name, types.ModuleType(name))


def _import_from(name: str, file: pathlib.Path) -> None:
    module = importlib.import_module(name)
    if module.__file__ is None or pathlib.Path(module.__file__).resolve() != file:
        raise RuntimeError(f"{name} comes from {module.__file__}, not from {file}")


@dataclasses.dataclass(frozen=True)
class TinyPi0:
    """Sizes of a shrunken pi0 or pi0.5. Images stay 224x224 in patches of 14; there is one key/value head."""

    width: int = 256
    depth: int = 3  # of the language model and of the expert, which read one KV cache
    mlp_dim: int = 512
    num_heads: int = 4
    head_dim: int = 64
    expert_width: int = 128
    expert_mlp_dim: int = 256
    vision_width: int = 144  # heads of 72 channels, as in the full-size model
    vision_depth: int = 2
    vision_mlp_dim: int = 272
    vocab_size: int = 512
    action_dim: int = 32
    action_horizon: int = 10
    pi05: bool = True

    def __post_init__(self) -> None:
        if self.vision_width % 72:
            raise ValueError(f"vision_width must be a multiple of 72, not {self.vision_width}")


@contextlib.contextmanager
def shrunken_openpi(sizes: TinyPi0) -> Iterator[None]:
    """While it lasts, every PI0Pytorch that openpi (or a plugin of it) builds has these sizes."""
    from openpi.models import gemma
    from openpi.models_pytorch import gemma_pytorch

    real_paligemma = gemma_pytorch.PaliGemmaForConditionalGeneration
    real_expert = gemma_pytorch.GemmaForCausalLM
    widths = {"gemma_2b": (sizes.width, sizes.mlp_dim), "gemma_300m": (sizes.expert_width, sizes.expert_mlp_dim)}
    heads: dict[str, Any] = {"num_heads": sizes.num_heads, "num_kv_heads": 1, "head_dim": sizes.head_dim}

    def get_config(variant: str) -> Any:
        return gemma.Config(width=widths[variant][0], depth=sizes.depth, mlp_dim=widths[variant][1], **heads)

    def paligemma(config: Any) -> nn.Module:
        config.text_config.vocab_size = sizes.vocab_size
        config.vision_config.hidden_size = sizes.vision_width
        config.vision_config.num_hidden_layers = sizes.vision_depth
        config.vision_config.num_attention_heads = sizes.vision_width // 72
        config.vision_config.intermediate_size = sizes.vision_mlp_dim
        config.vision_config.projection_dim = sizes.width
        return real_paligemma(config=config)

    def expert(config: Any) -> nn.Module:
        config.vocab_size = sizes.vocab_size
        return real_expert(config=config)

    with (
        mock.patch.object(gemma, "get_config", get_config),
        mock.patch.object(gemma_pytorch, "PaliGemmaForConditionalGeneration", paligemma),
        mock.patch.object(gemma_pytorch, "GemmaForCausalLM", expert),
    ):
        yield


def tiny_openpi_model(sizes: TinyPi0, *, seed: int, dtype: str = "float32") -> nn.Module:
    """A real `PI0Pytorch` of these sizes in eval mode, uncompiled, filled with values that make every path matter.

    With dtype "bfloat16" its values and dtypes are those that openpi holds after loading a bf16 checkpoint.
    """
    from openpi.models.pi0_config import Pi0Config
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

    shape: dict[str, Any] = {"action_dim": sizes.action_dim, "action_horizon": sizes.action_horizon, "pi05": sizes.pi05}
    with shrunken_openpi(sizes), torch.random.fork_rng(devices=[]):
        model = PI0Pytorch(Pi0Config(dtype=dtype, pytorch_compile_mode=None, **shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = _mean_and_std(model, name, parameter)
            value = mean + std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value.to(getattr(torch, dtype)))
    if dtype == "bfloat16":
        model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    return model.eval()


def _mean_and_std(model: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:
    owner, _, kind = name.rpartition(".")
    if kind == "bias":
        return 0.0, 0.5 if owner.endswith(".dense") else 0.1  # adaRMS gates must not vanish
    if isinstance(model.get_submodule(owner), nn.LayerNorm):
        return 1.0, 0.2
    if parameter.dim() == 1 or owner.endswith("position_embedding"):  # one-dimensional: the gains of Gemma's norms
        return 0.0, 0.5
    return 0.0, 1 / math.sqrt(parameter[0].numel())


def save_openpi_checkpoint(model: nn.Module, folder: pathlib.Path) -> None:
    """Write `folder` as openpi's converter does, uniformly bf16 or fp32, with norm stats under LIBERO's asset id."""
    host: Any = model
    dtype = host.paligemma_with_expert.paligemma.model.language_model.layers[0].self_attn.q_proj.weight.dtype
    folder.mkdir(parents=True, exist_ok=True)
    save_model(copy.deepcopy(model).to(dtype), str(folder / "model.safetensors"))
    keys = ("action_dim", "action_horizon", "paligemma_variant", "action_expert_variant")
    record = {key: getattr(host.config, key) for key in keys} | {"precision": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(record, indent=2))
    save_norm_stats(folder, "physical-intelligence/libero", state=8, actions=7)


def save_norm_stats(folder: pathlib.Path, asset_id: str, **sizes: int) -> None:
    """Write norm stats of these sizes into a checkpoint."""
    from openpi.shared import normalize

    stats = {}
    for key, size in sizes.items():
        mean, std = np.linspace(-0.3, 0.4, size), np.linspace(0.2, 0.6, size)
        stats[key] = normalize.NormStats(mean=mean, std=std, q01=mean - 2 * std, q99=mean + 2.2 * std)
    normalize.save(folder / "assets" / asset_id, stats)


def make_tokenizer(data_home: pathlib.Path, *, vocab_size: int) -> None:
    """Write a sentencepiece model where openpi keeps PaliGemma's tokenizer, for OPENPI_DATA_HOME=data_home."""
    import sentencepiece

    sentences = iter([f"do something, State: {n} {n + 1}; Task: pick up the black bowl\nAction: " for n in range(256)])
    path = data_home / "big_vision" / "paligemma_tokenizer.model"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=file,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )


def openpi_actions(
    model: nn.Module,
    *,
    images: dict[str, Tensor],
    image_masks: dict[str, Tensor],
    state: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    noise: Tensor,
    num_steps: int,
) -> Tensor:
    """Run the model's own `sample_actions` where the noise lies; returns actions [batch, action_horizon, action_dim].

    images: float [batch, 3, 224, 224] in [-1, 1] under openpi's three camera names; image_masks: bool [batch];
    state: [batch, action_dim]; tokens: int64 [batch, length]; token_mask: bool [batch, length];
    noise: float32 [batch, action_horizon, action_dim].
    """
    fields = {"images": images, "image_masks": image_masks, "state": state, "tokenized_prompt": tokens}
    unread = {"token_ar_mask": None, "token_loss_mask": None}
    observation = types.SimpleNamespace(**fields, tokenized_prompt_mask=token_mask, **unread)
    host: Any = model
    return host.sample_actions(str(noise.device), observation, noise=noise, num_steps=num_steps)
