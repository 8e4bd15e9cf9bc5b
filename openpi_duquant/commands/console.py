"""What commands show: text, and progress with an ETA, on the terminal."""

from collections.abc import Callable, Iterator
import contextlib

from rich.console import Console
from rich.progress import BarColumn
from rich.progress import DownloadColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.progress import TimeRemainingColumn

console = Console(highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over bytes with elapsed time and ETA; yields the function that moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)
