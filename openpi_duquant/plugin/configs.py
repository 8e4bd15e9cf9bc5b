"""The quantized twins of openpi's configs, and their registration."""

import dataclasses
import pathlib

from openpi.models import pi0_config
from openpi.training import config as openpi_configs
from torch import nn
import tyro

from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.plugin.loading import load_model
from openpi_duquant.plugin.quantization import Quantization

SUFFIX = "_duquant"

TrainConfig = openpi_configs.TrainConfig

_VARIANTS = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}


@dataclasses.dataclass(frozen=True)
class DuQuantPi0Config(pi0_config.Pi0Config):
    """A Pi0Config whose PyTorch checkpoints are loaded quantized."""

    quantization: tyro.conf.Suppress[Quantization] = dataclasses.field(default_factory=Quantization)

    def load_pytorch(self, train_config: TrainConfig, weight_path: str) -> nn.Module:
        """The model of the checkpoint whose `model.safetensors` is given; the quantized layers are never in bf16.

        What was loaded is put into the config's `policy_metadata`, under "duquant".

        Raises:
            DuQuantError: As `loading.load_model`.
        """
        model = load_model(pathlib.Path(weight_path).parent, self, self.quantization)
        metadata = (train_config.policy_metadata or {}) | {"duquant": model.duquant}
        object.__setattr__(train_config, "policy_metadata", metadata)  # which openpi gives to the policy next
        return model

    def create(self, rng: object) -> None:
        """Raises DuQuantError: openpi makes a JAX model for training, or to load a JAX checkpoint."""
        raise DuQuantError(
            "a *_duquant config runs converted PyTorch checkpoints; train with the config it was made from, and turn "
            "a JAX checkpoint into PyTorch with openpi's examples/convert_jax_model_to_pytorch.py"
        )


def register(
    config_name: str,
    duquant: DuQuantConfig | None = None,
    *,
    runtime: str | None = None,
    backend: str | None = None,
    name: str | None = None,
) -> TrainConfig:
    """Adds the quantized twin of one of openpi's configs; replaces one of the same name.

    Args:
        config_name: The config, "pi05_libero".
        duquant: How to quantize; the `default` preset under the OPENPI_DUQUANT_* variables when not given.
        runtime: "engine" or "module"; OPENPI_DUQUANT_RUNTIME when not given.
        backend: As `kernels.resolve`; OPENPI_DUQUANT_BACKEND when not given.
        name: Of the twin; `<config_name>_duquant` when not given.

    Returns:
        The twin, which `get_config(name)` returns from now on.

    Raises:
        DuQuantError: If there is no such config, or no PyTorch model for it.
    """
    try:
        config = openpi_configs.get_config(config_name)
    except ValueError as error:
        raise DuQuantError(str(error)) from None
    quantization = Quantization.from_environment().but(duquant, runtime, backend)
    twin = quantized_twin(config, quantization, name or config_name + SUFFIX)
    openpi_configs._CONFIGS_DICT[twin.name] = twin  # noqa: SLF001
    return twin


def register_all() -> None:
    """Adds the twins of all configs that openpi has a PyTorch model for."""
    quantization = Quantization.from_environment()
    for config in list(openpi_configs._CONFIGS_DICT.values()):  # noqa: SLF001
        if _why_not(config) is None:
            twin = quantized_twin(config, quantization, config.name + SUFFIX)
            openpi_configs._CONFIGS_DICT.setdefault(twin.name, twin)  # noqa: SLF001


def quantized_twin(config: TrainConfig, quantization: Quantization, name: str) -> TrainConfig:
    """A copy of `config` whose model is loaded quantized.

    Raises:
        DuQuantError: If openpi has no PyTorch model for it.
    """
    reason = _why_not(config)
    if reason:
        raise DuQuantError(f"{config.name}: {reason}")
    own = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(pi0_config.Pi0Config)}
    environment = quantization.environment
    if not environment.compile or environment.profile:
        own["pytorch_compile_mode"] = None
    model = DuQuantPi0Config(**own, quantization=quantization)
    return dataclasses.replace(config, name=name, model=model)


def _why_not(config: TrainConfig) -> str | None:
    """Why a config cannot be quantized."""
    if not isinstance(config.model, pi0_config.Pi0Config):
        return f"its model is {type(config.model).__name__}; pi0 and pi0.5 can be quantized"
    for field, variant in _VARIANTS.items():
        given = getattr(config.model, field)
        if given != variant:
            return f"its {field} is {given!r}; openpi's PyTorch models are {variant!r}"
    return None
