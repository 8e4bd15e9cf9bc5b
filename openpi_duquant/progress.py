"""Progress of long work, with the share done and an ETA, on stderr."""

from collections.abc import Callable, Iterator
import contextlib

from rich.console import Console
from rich.progress import BarColumn
from rich.progress import Progress
from rich.progress import TaskProgressColumn
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.progress import TimeRemainingColumn


def progress_bars() -> Progress:
    """Bars with the share done, elapsed time and ETA; a context manager."""
    eta = TextColumn("ETA"), TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), *eta
    return Progress(*columns, console=Console(stderr=True))


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """One bar; yields the function that moves it."""
    with progress_bars() as bars:
        task = bars.add_task(title, total=total)
        yield lambda done: bars.advance(task, done)
