"""LIBERO itself, made ready without a display and without questions."""

from collections.abc import Mapping, Sequence
import contextlib
import importlib
import importlib.util
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple

import torch

from openpi_duquant.config import DuQuantError
from openpi_duquant.environment import default_variable
from openpi_duquant.libero.episode import MAX_STEPS
from openpi_duquant.libero.episode import Episode

RENDER_SIZE = 256
"""Edge of the images that LIBERO's training data were rendered with, in pixels."""

STAND_IN_MARKER = "STAND-IN-ASSETS"
"""A file of this name marks assets that are not LIBERO's."""

STAND_INS = "stand-in assets"

_MUJOCO_BEFORE = (3, 6)


class LiberoSimulator:
    """LIBERO's simulator for the tasks of one suite; a `Simulator`.

    Attributes:
        assets: Folder of the assets.
        suite: LIBERO's description of the suite.
        environment: LIBERO's environment of the task at hand.

    Raises:
        DuQuantError: If LIBERO, its assets or a way to render are missing.
    """

    def __init__(self, suite: str, assets: pathlib.Path | None = None) -> None:
        self.assets = prepare(assets).assets
        from libero.libero import benchmark  # noqa: PLC0415

        with contextlib.redirect_stdout(sys.stderr):  # LIBERO's chatter
            self.suite = benchmark.get_benchmark_dict()[suite]()
        self.environment: Any = None
        self._task = -1
        self._initial_states: Any = None

    def close(self) -> None:
        """Frees the scene and its renderer."""
        if self.environment is not None:
            self.environment.close()
        self.environment, self._task = None, -1

    def start(self, episode: Episode) -> tuple[Mapping[str, Any], str]:
        """Puts the scene into the episode's initial state; returns the observation and the instruction."""
        task = self.suite.get_task(episode.task)
        if episode.task != self._task:
            self._load(episode.task)
        self.environment.seed(episode.seed)  # places what the initial state does not: furniture
        self.environment.reset()
        return self.environment.set_init_state(self._initial_states[episode.trial]), str(task.language)

    def step(self, action: Sequence[float]) -> tuple[Mapping[str, Any], bool]:
        """Executes an action [7]; returns the observation, and whether the task is solved."""
        raw, _, done, _ = self.environment.step(list(action))
        return raw, bool(done)

    def _load(self, task: int) -> None:
        from libero.libero import get_libero_path  # noqa: PLC0415
        from libero.libero.envs import OffScreenRenderEnv  # noqa: PLC0415

        self.close()
        files = self.suite.get_task(task)
        bddl = pathlib.Path(get_libero_path("bddl_files")) / files.problem_folder / files.bddl_file
        states = pathlib.Path(get_libero_path("init_states")) / files.problem_folder / files.init_states_file
        self._initial_states = torch.load(states, weights_only=False)  # LIBERO's own files are pickles
        size = {"camera_heights": RENDER_SIZE, "camera_widths": RENDER_SIZE}
        self.environment = OffScreenRenderEnv(bddl_file_name=str(bddl), **size)
        self._task = task


class Prepared(NamedTuple):
    """Folder of the assets, LIBERO's config file, and what MuJoCo renders with."""

    assets: pathlib.Path
    config: pathlib.Path
    rendering: str


def prepare(assets: pathlib.Path | None = None) -> Prepared:
    """Checks what LIBERO needs, and tells it where that is before it is imported.

    LIBERO_CONFIG_PATH and MUJOCO_GL are taken from the environment where they are set.

    Raises:
        DuQuantError: If LIBERO, its assets or a way to render are missing.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None or spec.origin is None:  # without origin: some folder of that name, no package
        raise DuQuantError("LIBERO is not installed: see docs/libero.md")
    package = pathlib.Path(spec.origin).parent / "libero"
    folder = find_assets(package, assets)
    config = pathlib.Path(default_variable("LIBERO_CONFIG_PATH", _own_config(package, folder))) / "config.yaml"
    if not config.is_file():
        raise DuQuantError(f"LIBERO config: there is no {config}; unset LIBERO_CONFIG_PATH, or let it name its folder")
    rendering = default_variable("MUJOCO_GL", "egl" if torch.cuda.is_available() else "osmesa")
    if rendering == "osmesa" and importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton._C.libtriton")  # each has an LLVM: loaded after OSMesa's, Triton's crashes
    _check_rendering(rendering)
    from libero import libero  # noqa: PLC0415

    libero._assets_path_cache = str(folder)  # noqa: SLF001 - else only its own folder, its cache and a download count
    return Prepared(folder, config, rendering)


def find_assets(package: pathlib.Path, assets: pathlib.Path | None) -> pathlib.Path:
    """The folder of LIBERO's assets: the given one, else the package's own, else LIBERO's cache.

    Raises:
        DuQuantError: If there is none.
    """
    candidates = [assets] if assets else [package / "assets", pathlib.Path.home() / ".cache" / "libero" / "assets"]
    for folder in candidates:
        if (folder / "scenes").is_dir():
            return folder.resolve()
    raise DuQuantError(
        f"LIBERO's assets: there are no scenes in {' or '.join(map(str, candidates))}; "
        "give their folder with --assets (LIBERO_ASSETS in a launcher), see docs/libero.md"
    )


def are_stand_ins(assets: pathlib.Path) -> bool:
    """Whether these assets are not LIBERO's."""
    return (assets / STAND_IN_MARKER).exists()


def number_of_tasks(suite: str) -> int:
    """Tasks in a suite of LIBERO.

    Raises:
        DuQuantError: On an unknown suite.
    """
    if suite not in MAX_STEPS:
        raise DuQuantError(f"unknown task suite {suite!r}: choose from {', '.join(MAX_STEPS)}")
    return 90 if suite == "libero_90" else 10


_private_folders: list[tempfile.TemporaryDirectory] = []
"""Kept until the process ends."""


def _own_config(package: pathlib.Path, assets: pathlib.Path) -> str:
    """A folder with the file that LIBERO would otherwise ask questions to write."""
    paths = {
        "benchmark_root": package,
        "bddl_files": package / "bddl_files",
        "init_states": package / "init_files",
        "datasets": package.parent / "datasets",
        "assets": assets,
    }
    folder = tempfile.TemporaryDirectory(prefix="libero-config-")
    _private_folders.append(folder)
    lines = [f'{name}: "{path}"\n' for name, path in paths.items()]
    (pathlib.Path(folder.name) / "config.yaml").write_text("".join(lines))
    return folder.name


def _check_rendering(backend: str) -> None:
    """Raises DuQuantError where MuJoCo is missing, too new for robosuite 1.4, or cannot render."""
    try:
        import mujoco  # noqa: PLC0415

        version = tuple(int(part) for part in mujoco.__version__.split(".")[:2])
        if version < _MUJOCO_BEFORE:
            mujoco.GLContext(16, 16).free()
    except ImportError as error:
        raise DuQuantError(f"MuJoCo: {error}; see docs/libero.md") from None
    except Exception as error:  # noqa: BLE001 - each GL library fails in its own way
        wanted = "install libosmesa6" if backend == "osmesa" else "try MUJOCO_GL=osmesa (package libosmesa6)"
        raise DuQuantError(f"MuJoCo cannot render with MUJOCO_GL={backend} ({error}): {wanted}") from None
    if version >= _MUJOCO_BEFORE:
        raise DuQuantError(f"robosuite 1.4 does not work with mujoco {mujoco.__version__}: pip install 'mujoco<=3.5.0'")
