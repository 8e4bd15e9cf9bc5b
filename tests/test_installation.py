"""Without openpi, or with PyPI's empty package of that name, the plugin says what is missing and what to do."""

from collections.abc import Callable
import pathlib
import subprocess
import sys

import pytest

import openpi_duquant
from openpi_duquant.config import DuQuantError
from openpi_duquant.installation import MissingOpenpiError
from openpi_duquant.installation import find_openpi
from openpi_duquant.installation import require_openpi

ROOT = pathlib.Path(openpi_duquant.__file__).parents[1]

HOSTS: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "folder": ("openpi/readme.txt",),
    "placeholder": ("openpi/__init__.py",),
    "placeholder file": ("openpi.py",),
    "openpi": ("openpi/__init__.py", "openpi/models_pytorch/pi0_pytorch.py"),
}
"""Files of what may stand in openpi's place; as in openpi, models_pytorch has no __init__.py."""

STATES = {
    "nothing": "not installed",
    "folder": "not installed",
    "placeholder": "placeholder",
    "placeholder file": "placeholder",
    "openpi": "installed",
}


@pytest.fixture
def host(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts one of HOSTS before everything else that can be imported, and the real one out of sight."""

    def install(name: str) -> None:
        for file in HOSTS[name]:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        for module in list(sys.modules):
            if module.partition(".")[0] == "openpi" or module.startswith("openpi_duquant.plugin"):
                monkeypatch.delitem(sys.modules, module)
        bare = [str(tmp_path), *(path for path in sys.path if not (pathlib.Path(path) / "openpi").exists())]
        monkeypatch.setattr(sys, "path", bare)

    return install


@pytest.mark.parametrize("name", HOSTS)
def test_openpi_is_told_from_what_is_not(host: Callable[[str], None], name: str) -> None:
    host(name)
    finding = find_openpi()
    assert STATES[name] in finding.state
    assert bool(finding.fix) == (name != "openpi")
    assert ("pip uninstall openpi" in finding.fix) == name.startswith("placeholder")


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "openpi"])
def test_the_plugin_says_how_to_install_openpi(host: Callable[[str], None], name: str) -> None:
    host(name)
    for attempt in (
        require_openpi,
        lambda: __import__("openpi_duquant.plugin"),
        lambda: openpi_duquant.create_trained_policy,
        lambda: openpi_duquant.register,
    ):
        with pytest.raises(
            MissingOpenpiError, match=r"git clone https://github\.com/Physical-Intelligence/openpi"
        ) as e:
            attempt()
        assert STATES[name] in str(e.value)
        assert isinstance(e.value, DuQuantError)
        assert isinstance(e.value, ImportError)
        assert len(str(e.value).splitlines()) == 1


def test_with_openpi_nothing_is_required(host: Callable[[str], None]) -> None:
    host("openpi")
    require_openpi()


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'regsiter'"):
        _ = openpi_duquant.regsiter


@pytest.mark.parametrize(
    "command", [["tools/serve_policy.py", "somewhere"], ["-m", "openpi_duquant.run", "tools/doctor.py"]]
)
def test_commands_that_need_openpi_end_in_one_line(command: list[str], tmp_path: pathlib.Path) -> None:
    (tmp_path / "openpi").mkdir()
    (tmp_path / "openpi" / "__init__.py").touch()
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the plugin needs openpi: PyPI's placeholder")
