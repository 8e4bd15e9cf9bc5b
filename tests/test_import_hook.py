"""The hook that registers the quantized configs when openpi's are imported, in interpreters of their own."""

from collections.abc import Callable
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

import openpi_duquant

PACKAGE = pathlib.Path(openpi_duquant.__file__).parent
ROOT = PACKAGE.parent
HOOK = "_openpi_duquant_hook"

# Stands for the plugin: its import is what the hook is for.
PLUGIN = """
import sys, types
class Plugin:
    def find_spec(self, name, path=None, target=None):
        if name != "openpi_duquant.plugin":
            return None
        from openpi.training.config import CONFIGS
        print("registered after", CONFIGS)
        import importlib.machinery
        return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec): return None
    def exec_module(self, module): pass
sys.meta_path.insert(0, Plugin())
"""

Run = Callable[..., str]


@pytest.fixture
def site(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with a stand-in for openpi, and the hook as it is installed."""
    folder = tmp_path / "site"
    (folder / "openpi" / "training").mkdir(parents=True)
    for package in ("openpi", "openpi/training"):
        (folder / package / "__init__.py").touch()
    (folder / "openpi" / "training" / "config.py").write_text("CONFIGS = ['pi05_libero']\n")
    (folder / f"{HOOK}.py").write_text((PACKAGE / "import_hook.py").read_text())
    (folder / f"{HOOK}.pth").write_text((PACKAGE / "import_hook.pth").read_text())
    return folder


@pytest.fixture
def run(site: pathlib.Path) -> Run:
    """Runs a program in a bare interpreter where the hook is installed; returns what it prints, in all."""

    def run(program: str, *flags: str, **variables: str) -> str:
        # -S leaves out whatever hook this environment has; addsitedir reads the .pth file as at any other start.
        start = f"import site, sys; sys.path[:0] = [{str(site)!r}, {str(ROOT)!r}]; site.addsitedir({str(site)!r})\n"
        paths = f"sys.path += {[path for path in sys.path if path.endswith('site-packages')]!r}\n"
        command = [sys.executable, "-S", *flags, "-c", start + paths + PLUGIN + program]
        environment = {"PATH": "/usr/bin:/bin", **variables}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=site)
        return done.stdout + done.stderr

    return run


def test_configs_are_registered_when_openpis_are_imported(run: Run) -> None:
    assert run("import openpi.training.config") == "registered after ['pi05_libero']\n"
    assert run("from openpi.training import config; print(config.CONFIGS)") == (
        "registered after ['pi05_libero']\n['pi05_libero']\n"
    )


def test_nothing_happens_before(run: Run) -> None:
    program = """
import json, openpi.training
before = {name.partition(".")[0] for name in sys.modules}
print(before & {"torch", "numpy", "openpi_duquant", "tyro"}, "openpi.training.config" in sys.modules)
import wave
print(wave.__spec__.loader.exec_module.__qualname__)
"""
    assert run(program).splitlines() == ["set() False", "_LoaderBasics.exec_module"]


def test_two_hooks_do_not_ask_each_other_for_ever(run: Run) -> None:
    program = """
import sys, _openpi_duquant_hook
sys.meta_path.insert(0, _openpi_duquant_hook.Finder())
import openpi.training.config
"""
    assert run(program) == "registered after ['pi05_libero']\n"


def test_a_look_that_imports_nothing_does_not_use_the_hook_up(run: Run) -> None:
    program = """
import importlib.util
spec = importlib.util.find_spec("openpi.training.config")
print(spec.name)
import openpi.training.config
"""
    assert run(program).splitlines() == ["openpi.training.config", "registered after ['pi05_libero']"]


def test_an_error_of_openpis_configs_passes_and_a_second_attempt_registers(run: Run, site: pathlib.Path) -> None:
    (site / "openpi" / "training" / "config.py").write_text(
        "import sys\nif not hasattr(sys, 'mended'): raise RuntimeError('no lerobot')\nCONFIGS = []\n"
    )
    program = """
try:
    import openpi.training.config
except RuntimeError as error:
    print(error, "openpi.training.config" in sys.modules)
sys.mended = True
import openpi.training.config
"""
    assert run(program).splitlines() == ["no lerobot False", "registered after []"]


def test_a_missing_config_module_is_missing(run: Run, site: pathlib.Path) -> None:
    (site / "openpi" / "training" / "config.py").unlink()
    assert "ModuleNotFoundError: No module named 'openpi.training.config'" in run("import openpi.training.config")


@pytest.mark.parametrize(("value", "registers"), [("0", False), ("no", False), ("1", True)])
def test_auto_switches_it_off(run: Run, value: str, *, registers: bool) -> None:
    printed = run("import openpi.training.config as c; print(c.CONFIGS)", OPENPI_DUQUANT_AUTO=value)
    assert printed.endswith("['pi05_libero']\n")
    assert ("registered" in printed) == registers


def test_a_malformed_variable_stops_the_import(run: Run) -> None:
    printed = run("import openpi.training.config", OPENPI_DUQUANT_AUTO="perhaps")
    assert "DuQuantError: environment variable OPENPI_DUQUANT_AUTO='perhaps': is not 0 or 1" in printed


def test_it_costs_less_than_5_ms_at_the_start_of_an_interpreter(run: Run) -> None:
    costs = []
    for _ in range(5):
        line = re.search(rf"(\d+) \| +(\d+) \| {HOOK}\n", run("", "-X", "importtime"))
        assert line
        costs.append(int(line[2]))
    assert min(costs) < 5000  # microseconds, with all that it imports


def test_the_wheel_installs_it(tmp_path: pathlib.Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    built = next(wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(built) as archive:
        assert archive.read(f"{HOOK}.py").decode() == (PACKAGE / "import_hook.py").read_text()
        assert archive.read(f"{HOOK}.pth").decode().strip() == f"import {HOOK}"
        assert "openpi_duquant/plugin/__init__.py" in archive.namelist()


def test_the_project_names_the_hook_for_the_wheel() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        shipped = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert {target: (ROOT / source).is_file() for source, target in shipped.items()} == {
        f"{HOOK}.py": True,
        f"{HOOK}.pth": True,
    }
