"""`create_trained_policy` with openpi's signature."""

from collections.abc import Mapping
import pathlib
from typing import TYPE_CHECKING, Any

from openpi import transforms
from openpi.shared import download
from openpi.training import config as openpi_configs

from openpi_duquant.checkpoint.files import WEIGHTS_NAME
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.plugin.configs import DuQuantPi0Config
from openpi_duquant.plugin.configs import quantized_twin
from openpi_duquant.plugin.quantization import Quantization

if TYPE_CHECKING:
    from openpi.policies.policy import Policy


def create_trained_policy(
    train_config: openpi_configs.TrainConfig,
    checkpoint_dir: pathlib.Path | str,
    *,
    duquant: DuQuantConfig | None = None,
    runtime: str | None = None,
    backend: str | None = None,
    repack_transforms: transforms.Group | None = None,
    sample_kwargs: dict[str, Any] | None = None,
    default_prompt: str | None = None,
    norm_stats: Mapping[str, transforms.NormStats] | None = None,
    pytorch_device: str | None = None,
) -> "Policy":
    """A quantized policy, by openpi's own function of this name.

    Args:
        train_config: Any pi0 or pi0.5 config, a quantized twin or not: the policy is quantized.
        checkpoint_dir: Converted, or original (then it is converted once); a local folder, or a gs:// address.
        duquant: How to quantize; when not given, as the config says if it is a twin, else the `default` preset under
            the OPENPI_DUQUANT_* variables.
        runtime: "engine" or "module"; when not given, likewise.
        backend: As `kernels.resolve`; when not given, likewise.
        repack_transforms: As openpi's, and so are those below.
        sample_kwargs: Passed to `sample_actions`.
        default_prompt: Used where an observation has none.
        norm_stats: The checkpoint's when not given.
        pytorch_device: "cuda" where there is one when not given.

    Returns:
        openpi's Policy. Its `metadata["duquant"]` says what is quantized and what runs it.

    Raises:
        DuQuantError: If the policy cannot be quantized, see `loading.load_model`; if the checkpoint is none of PyTorch.
    """
    from openpi.policies import policy_config  # noqa: PLC0415 - imports lerobot, which a look at configs does not need

    model = train_config.model
    own = model.quantization if isinstance(model, DuQuantPi0Config) else Quantization.from_environment()
    twin = quantized_twin(train_config, own.but(duquant, runtime, backend), train_config.name)
    folder = download.maybe_download(str(checkpoint_dir))
    if not (folder / WEIGHTS_NAME).exists():
        raise DuQuantError(
            f"{folder}: has no {WEIGHTS_NAME}; turn a JAX checkpoint into PyTorch with openpi's "
            "examples/convert_jax_model_to_pytorch.py"
        )
    return policy_config.create_trained_policy(
        twin,
        folder,
        repack_transforms=repack_transforms,
        sample_kwargs=sample_kwargs,
        default_prompt=default_prompt,
        norm_stats=norm_stats,
        pytorch_device=pytorch_device,
    )
