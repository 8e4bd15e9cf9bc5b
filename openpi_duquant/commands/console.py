"""What commands have in common: where they write, which device they take, which variables they refuse."""

from collections.abc import Collection, Iterable

from rich.console import Console
import torch

from openpi_duquant.config import DuQuantError
from openpi_duquant.environment import ENVIRONMENT_PREFIX
from openpi_duquant.environment import Environment
from openpi_duquant.environment import read_environment
from openpi_duquant.kernels.backend import require_device

console = Console(highlight=False, markup=False, soft_wrap=True)


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        DuQuantError: If there is no such device here.
    """
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DuQuantError(f"unknown device {name!r}: give cpu, cuda, cuda:<index> or auto")
    require_device(device)
    return device


def require_known(what: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises DuQuantError if one of the names given for an option is not known; lists those that are."""
    for name in given:
        if name not in known:
            raise DuQuantError(f"{what}: there is no {name!r}; choose from {', '.join(known)}")


def refuse_variables(command: str) -> None:
    """For a command that compares presets as they are: no OPENPI_DUQUANT_* variable may be set.

    Raises:
        DuQuantError: If one is, or is not known at all.
    """
    environment = read_environment()
    if environment != Environment(compile=environment.compile):
        raise DuQuantError(f"{command} takes presets as they are; unset the {ENVIRONMENT_PREFIX}* variables")
