"""What commands show: text, and progress with an ETA, on the terminal."""

from collections.abc import Callable, Iterator
import contextlib

from rich.console import Console
from rich.progress import BarColumn
from rich.progress import Progress
from rich.progress import TaskProgressColumn
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.progress import TimeRemainingColumn
import torch

from openpi_duquant.config import ENVIRONMENT_PREFIX
from openpi_duquant.config import DuQuantError
from openpi_duquant.config import Environment
from openpi_duquant.config import read_environment

console = Console(highlight=False, markup=False, soft_wrap=True)


def progress_bars() -> Progress:
    """Bars with the share done, elapsed time and ETA, on stderr; a context manager."""
    eta = TextColumn("ETA"), TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), *eta
    return Progress(*columns, console=Console(stderr=True))


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """One bar; yields the function that moves it."""
    with progress_bars() as bars:
        task = bars.add_task(title, total=total)
        yield lambda done: bars.advance(task, done)


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
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DuQuantError(f"device {name}: {count} CUDA devices are visible here; see openpi-duquant doctor")
    return device


def refuse_variables(command: str) -> None:
    """For a command that compares presets as they are: no OPENPI_DUQUANT_* variable may be set.

    Raises:
        DuQuantError: If one is, or is not known at all.
    """
    environment = read_environment()
    if environment != Environment(compile=environment.compile):
        raise DuQuantError(f"{command} takes presets as they are; unset the {ENVIRONMENT_PREFIX}* variables")
