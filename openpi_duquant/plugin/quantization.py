"""What is asked of a quantized config: how to quantize, and what runs it."""

import dataclasses
import functools

import torch

from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.environment import RUNTIMES
from openpi_duquant.environment import Environment
from openpi_duquant.environment import read_environment


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a config's checkpoints are quantized and run.

    Attributes:
        config: What an original checkpoint is converted with.
        asked: Fields of `config` that somebody asked for: a converted checkpoint must have been converted with them.
        environment: Runtime, backend and the other switches.
        device: Where the model is asked to be; none for openpi's choice, the GPU where there is one.
    """

    config: DuQuantConfig = dataclasses.field(default_factory=DuQuantConfig)
    asked: tuple[str, ...] = ()
    environment: Environment = dataclasses.field(default_factory=Environment)
    device: str | None = None

    @property
    def place(self) -> str:
        """Where the model is made."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def from_environment(cls) -> "Quantization":
        """The `default` preset under the OPENPI_DUQUANT_* variables, as they were when first read.

        Raises:
            DuQuantError: As `read_environment`.
        """
        environment = _environment()
        return cls(DuQuantConfig(**environment.fields), tuple(environment.fields), environment)

    def but(self, config: DuQuantConfig | None, runtime: str | None, backend: str | None) -> "Quantization":
        """The same with what is given in place of its own.

        Raises:
            DuQuantError: On an unknown runtime.
        """
        given = {name: value for name, value in (("runtime", runtime), ("backend", backend)) if value is not None}
        environment = dataclasses.replace(self.environment, **given)
        if environment.runtime not in RUNTIMES:
            raise DuQuantError(f"unknown runtime {environment.runtime!r}: choose from {', '.join(RUNTIMES)}")
        if config is None:
            return dataclasses.replace(self, environment=environment)
        return Quantization(config, tuple(field.name for field in dataclasses.fields(config)), environment)


@functools.cache
def _environment() -> Environment:
    return read_environment()
