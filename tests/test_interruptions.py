"""Whatever stops a conversion, and whenever: its source is untouched, and no half checkpoint lies about."""

from collections.abc import Callable
import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import pytest

from openpi_duquant import PRESETS
from openpi_duquant import DuQuantError
from openpi_duquant import Manifest
from openpi_duquant import convert
from openpi_duquant import load_policy
from openpi_duquant import synthetic
from openpi_duquant.architecture import Architecture
from openpi_duquant.checkpoint import SafetensorsWriter
from openpi_duquant.commands import main

WEIGHTS = "model.safetensors"
STAGES = {
    "weights": (SafetensorsWriter, "write"),
    "manifest": (Manifest, "save"),
    "assets": (shutil, "copytree"),
    "folder": (tempfile, "mkdtemp"),
    "rename": (pathlib.Path, "rename"),
}
FULL, READ_ONLY = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")


def state_of(folder: pathlib.Path) -> dict[str, bytes]:
    """Names and contents of everything in a folder."""
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.mark.parametrize("error", [FULL, READ_ONLY, KeyboardInterrupt()], ids=["full", "read-only", "interrupted"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_or_read_only_disk_and_an_interrupt_leave_nothing(
    own_source: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: BaseException,
) -> None:
    before, calls = state_of(tmp_path), []

    def fail(*arguments: object, **_: object) -> None:
        calls.append(arguments)
        if stage != "weights" or len(calls) == 40:
            raise error

    monkeypatch.setattr(*STAGES[stage], fail)
    monkeypatch.setattr(sys, "argv", ["openpi-duquant", "convert-checkpoint", str(own_source)])
    with pytest.raises(SystemExit, match=f"^error: .*({error.args[-1] if error.args else 'interrupted'})"):
        main()
    assert calls
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, DuQuantError])
@pytest.mark.parametrize("target", ["target", "new/folder/target"])
def test_an_error_in_the_middle_leaves_nothing(
    own_source: pathlib.Path, tmp_path: pathlib.Path, kind: type[Exception], target: str
) -> None:
    before = state_of(tmp_path)

    def fail(_: int) -> None:
        raise kind("in the middle")

    with pytest.raises(kind, match="in the middle"):
        convert(own_source, tmp_path / target, PRESETS["default"], progress=fail)
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("change", ["append", "touch", "replace"])
def test_a_source_that_changes_while_it_is_read_is_refused(
    own_source: pathlib.Path, tmp_path: pathlib.Path, change: str
) -> None:
    path = own_source / WEIGHTS
    spare = pathlib.Path(shutil.copy(path, tmp_path / "spare"))

    def disturb(_: int) -> None:
        if change == "append":
            with path.open("ab") as file:
                file.write(b"more")
        elif change == "touch":
            os.utime(path)
        elif spare.exists():
            spare.replace(path)

    with pytest.raises(DuQuantError, match="changed while it was read"):
        convert(own_source, tmp_path / "target", PRESETS["default"], progress=disturb)
    assert {item.name for item in tmp_path.iterdir()} <= {"own", "spare"}


def test_of_two_conversions_into_one_target_one_wins_and_the_other_says_so(
    source: pathlib.Path, converted: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    expected = (converted("default") / WEIGHTS).read_bytes()
    meeting, outcomes = threading.Barrier(2, timeout=60), []

    def run() -> None:
        first = iter([meeting.wait])
        try:
            convert(source, tmp_path / "target", PRESETS["default"], progress=lambda _: next(first, int)())
        except DuQuantError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [item.name for item in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / WEIGHTS).read_bytes() == expected
    load_policy(tmp_path / "target")
    assert len(outcomes) == 1
    assert outcomes[0].startswith(f"{tmp_path / 'target'}: ")


PREAMBLE = """
import os, pathlib, signal, sys, time
from openpi_duquant import PRESETS, Manifest, convert
from openpi_duquant.checkpoint import SafetensorsWriter
from openpi_duquant.commands import main
source, folder = map(pathlib.Path, sys.argv[1:])
"""
KILLED = """
write, save = SafetensorsWriter.write, Manifest.save
def stopping_at(moment):
    def stop(): os.kill(os.getpid(), signal.SIGKILL)
    def stopping_write(self, *arguments):
        write(self, *arguments)
        if len(self._missing) == moment: stop()
    def stopping_save(*arguments):
        save(*arguments)
        if moment == "manifest": stop()
    SafetensorsWriter.write, Manifest.save = stopping_write, stopping_save
for moment in (70, 40, 0, "manifest", *(0.003 * step for step in range(1, 20))):
    child = os.fork()
    if child == 0:
        if not isinstance(moment, float): stopping_at(moment)
        convert(source, folder / str(moment) / "target", PRESETS["default"])
        os._exit(0)
    if isinstance(moment, float):
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def run_python(script: str, *arguments: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs a script that finds the package as this process does."""
    command = [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_after_a_kill_at_any_moment_nothing_broken_loads_and_the_next_conversion_works(
    source: pathlib.Path, converted: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    expected = (converted("default") / WEIGHTS).read_bytes()
    before = state_of(source)
    finished = run_python(KILLED, source, tmp_path)
    assert finished.returncode == 0, finished.stderr
    moments = sorted(tmp_path.iterdir())
    left = {moment.name: [item for item in moment.iterdir() if item.name != "target"] for moment in moments}
    assert all(left[moment] for moment in ("70", "40", "0", "manifest"))  # these were killed in the middle for sure
    for folder in (folder for moment in moments for folder in moment.iterdir()):
        try:
            load_policy(folder)
        except DuQuantError:
            assert folder.name != "target"
        else:
            assert (folder / WEIGHTS).read_bytes() == expected
    for moment in moments:
        if not (moment / "target").exists():
            convert(source, moment / "target", PRESETS["default"])
        assert (moment / "target" / WEIGHTS).read_bytes() == expected
    assert state_of(source) == before


COMMAND = """
sys.argv = ["openpi-duquant", "convert-checkpoint", str(source), str(folder / "target")]
main()
"""
CUT = """
command = sys.modules["openpi_duquant.commands.convert_checkpoint"]
plain = command.convert
def cut(_): os.truncate(source / "model.safetensors", 5000)
command.convert = lambda *arguments, **options: plain(*arguments, **options | {"progress": cut})
"""
SIGNAL = """
save = Manifest.save
def stop(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGNAL)
    time.sleep(60)
Manifest.save = stop
"""
FILE_LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (CUT, "own"),
        (SIGNAL.replace("SIGNAL", "SIGINT"), "interrupted"),
        (SIGNAL.replace("SIGNAL", "SIGTERM"), ""),
        (FILE_LIMIT, "File too large"),
    ],
    ids=["source cut", "SIGINT", "SIGTERM", "file limit"],
)
def test_a_process_that_is_stopped_ends_with_one_line_and_leaves_nothing(
    own_source: pathlib.Path, tmp_path: pathlib.Path, script: str, said: str
) -> None:
    finished = run_python(script + COMMAND, own_source, tmp_path)
    assert finished.returncode not in (0, -signal.SIGBUS)
    lines = [line for line in finished.stderr.splitlines() if not line.startswith("Converting")]  # progress
    assert [line.partition(":")[0] for line in lines] == ["error"] * len(lines)
    assert len(lines) == 1 or finished.returncode == -signal.SIGTERM
    assert said in finished.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_making_a_checkpoint_leaves_nothing_half_made(
    tmp_path: pathlib.Path, tiny: Architecture, error: type[BaseException]
) -> None:
    def fail(_: int) -> None:
        raise error

    with pytest.raises(error):
        synthetic.make_checkpoint(tmp_path / "new" / "made", tiny, progress=fail)
    assert not list(tmp_path.iterdir())


def test_a_target_within_the_source_is_refused(own_source: pathlib.Path) -> None:
    before = state_of(own_source)
    with pytest.raises(DuQuantError, match="lies within the source"):
        convert(own_source, own_source / "assets" / "target", PRESETS["default"])
    assert state_of(own_source) == before
