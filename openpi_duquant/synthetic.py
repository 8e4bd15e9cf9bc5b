"""Random pi0 and pi0.5 checkpoints in openpi's exact format, with outlier channels as trained models have them."""

from collections.abc import Callable, Iterator, Mapping
import json
import math
import pathlib
import zlib

import torch
from torch import Tensor

from openpi_duquant.architecture import EXPERT_LM_HEAD
from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import parameter_shapes
from openpi_duquant.checkpoint.files import WEIGHTS_NAME
from openpi_duquant.checkpoint.files import SafetensorsWriter
from openpi_duquant.checkpoint.files import TensorType
from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.checkpoint.files import renamed_when_whole
from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.observation import CAMERAS
from openpi_duquant.engine.observation import Observation

OUTLIER_SHARE = 0.01
OUTLIER_GAIN = 12.0
ASSETS_NAME = "physical-intelligence/libero"


def make_checkpoint(
    folder: pathlib.Path,
    architecture: Architecture,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    action_horizon: int = 10,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes `model.safetensors`, `config.json` and `assets/` as openpi's converter does.

    Args:
        folder: Folder to make.
        architecture: Sizes.
        seed: Of the random weights.
        dtype: Of all tensors; released checkpoints are bf16 or fp32.
        action_horizon: Recorded in `config.json`.
        progress: Called with bytes as they are written.

    Raises:
        DuQuantError: If the folder exists.
    """
    if folder.exists():
        raise DuQuantError(f"{folder}: exists already; name another folder or remove it")
    types = {name: (dtype, shape) for name, shape in checkpoint_shapes(architecture).items()}
    generator = torch.Generator().manual_seed(seed)
    with renamed_when_whole(folder) as partial:
        with SafetensorsWriter(partial / WEIGHTS_NAME, types) as writer:
            for name, kind in types.items():
                writer.write(name, random_parameter(name, kind[1], architecture, generator).to(dtype))
                progress(sum(iter_bytes({name: kind})))
        config = {
            "action_dim": architecture.action_dim,
            "action_horizon": action_horizon,
            "precision": str(dtype).removeprefix("torch."),
        }
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        assets = partial / "assets" / ASSETS_NAME
        assets.mkdir(parents=True)
        (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": _norm_stats()}, indent=2))


def checkpoint_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the file, the expert's unused lm_head included."""
    head = {EXPERT_LM_HEAD: (architecture.vocab_size, architecture.expert.width)}
    return parameter_shapes(architecture) | head


class RandomWeights(Mapping[str, Tensor]):
    """Such a checkpoint without a file: every tensor is made on its device when it is looked up, each time the same.

    Args:
        architecture: Sizes.
        device: Where tensors are made; they differ from device to device.
        seed: Of the random weights.
        dtype: Of all tensors.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.architecture = architecture
        self.types: dict[str, TensorType] = {
            name: (dtype, shape) for name, shape in checkpoint_shapes(architecture).items()
        }
        self._device, self._seed = device, seed

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name."""
        dtype, shape = self.types[name]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        return random_parameter(name, shape, self.architecture, generator).to(dtype)

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of a checkpoint."""
        return iter(self.types)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self.types)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name; makes none."""
        return name in self.types


def random_parameter(
    name: str, shape: tuple[int, ...], architecture: Architecture, generator: torch.Generator
) -> Tensor:
    """One tensor, fp32, on the generator's device: outlier channels in norms, open gates, residuals scaled by depth."""

    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device) * std

    if name.endswith("norm.weight") and "vision" not in name:
        return _with_outliers(normal(0.3), generator)
    if ".dense." in name:
        return _modulation(name, normal(0.02), generator)
    if name.endswith(".bias"):
        return normal(0.02)
    if "norm" in name:
        return 1.0 + normal(0.1)
    if name.endswith("lm_head.weight") or "position_embedding" in name:
        return normal(0.05)
    depth = architecture.expert.depth if name.startswith(ACTION_EXPERT) else architecture.language.depth
    residual = name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight"))
    return normal(1.0 / math.sqrt(math.prod(shape[1:]) * (2 * depth if residual else 1)))


def _with_outliers(values: Tensor, generator: torch.Generator) -> Tensor:
    """One channel in a hundred, at least one, with twelve times the gain of the others."""
    count = max(1, round(OUTLIER_SHARE * len(values)))
    values[torch.randperm(len(values), generator=generator, device=generator.device)[:count]] += OUTLIER_GAIN - 1.0
    return values


def _modulation(name: str, values: Tensor, generator: torch.Generator) -> Tensor:
    """adaRMS: scale with outlier channels, small shift, gate around one half."""
    if name.endswith(".bias"):
        scale, _, gate = values.chunk(3)
        _with_outliers(scale, generator)
        gate += 0.5
    return values


def _norm_stats() -> dict[str, dict[str, list[float]]]:
    def stats(width: int) -> dict[str, list[float]]:
        return {"mean": [0.0] * width, "std": [1.0] * width, "q01": [-1.0] * width, "q99": [1.0] * width}

    return {"state": stats(8), "actions": stats(7)}


def libero_like_observation(
    architecture: Architecture,
    *,
    seed: int = 0,
    action_horizon: int = 10,
    prompt_tokens: int = 24,
    cameras: int = 2,
) -> tuple[Observation, Tensor]:
    """One observation as openpi's LIBERO policies see it, and the noise to start from.

    Args:
        architecture: Sizes.
        seed: Of the random images, tokens and noise.
        action_horizon: Actions to denoise.
        prompt_tokens: Length of the prompt, padded to 200.
        cameras: That are live; the others of the three are masked.

    Returns:
        The observation (batch of one, uint8 images) and noise [1, action_horizon, action_dim].
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(len(CAMERAS), 1, 3, 14, 14, generator=generator)
    images = torch.nn.functional.interpolate(coarse.flatten(0, 1), size=(224, 224), mode="bicubic").clamp(0, 1) * 255
    tokens = torch.zeros(1, 200, dtype=torch.int64)
    tokens[:, :prompt_tokens] = torch.randint(architecture.vocab_size, (1, prompt_tokens), generator=generator)
    observation = Observation(
        images={camera: image[None].permute(0, 2, 3, 1).contiguous().byte() for camera, image in zip(CAMERAS, images)},
        image_masks={camera: torch.tensor([index < cameras]) for index, camera in enumerate(CAMERAS)},
        tokenized_prompt=tokens,
        tokenized_prompt_mask=torch.arange(200)[None] < prompt_tokens,
        state=torch.rand(1, architecture.action_dim, generator=generator) * 2 - 1,
    )
    return observation, torch.randn(1, action_horizon, architecture.action_dim, generator=generator)
