"""python -m openpi_duquant.run: the script sees what `python script` would show it."""

from collections.abc import Callable
import pathlib
import subprocess
import sys
import types

import pytest

from openpi_duquant import run

Program = Callable[..., pathlib.Path]


@pytest.fixture
def script(tmp_path: pathlib.Path) -> Program:
    """Writes a script into a folder of its own."""

    def write(text: str) -> pathlib.Path:
        (tmp_path / "scripts").mkdir()
        path = tmp_path / "scripts" / "serve.py"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the plugin, which needs openpi."""
    monkeypatch.setitem(sys.modules, "openpi_duquant.plugin", types.ModuleType("openpi_duquant.plugin"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("plugin")
def test_the_script_gets_its_arguments_its_folder_and_its_name(
    script: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script("import sys, beside; print(sys.argv, sys.path[0], __name__, __file__, beside.VALUE)")
    (path.parent / "beside.py").write_text("VALUE = 7")
    monkeypatch.setattr(sys, "argv", ["run", str(path), "policy:checkpoint", "--port=1"])
    run.main()
    seen = [str(path), "policy:checkpoint", "--port=1"]
    assert capsys.readouterr().out == f"{seen} {path.parent} __main__ {path} 7\n"
    assert "openpi_duquant.plugin" in sys.modules


def test_the_plugin_is_imported_before_the_script(
    script: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = []

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "openpi_duquant.plugin":
                imported.append(name)
                raise ImportError("as if it registered")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "openpi_duquant.plugin", raising=False)
    monkeypatch.setattr(sys, "argv", ["run", str(script("print('ran')"))])
    with pytest.raises(ImportError, match="as if"):
        run.main()
    assert imported
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("plugin")
def test_a_mistake_in_the_script_is_one_line(script: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script("from openpi_duquant import DuQuantError\nraise DuQuantError('no such\\n  layer')")
    monkeypatch.setattr(sys, "argv", ["run", str(path)])
    with pytest.raises(SystemExit) as caught:
        run.main()
    assert caught.value.code == "error: no such layer"


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(("statement", "kind"), [("1 / 0", ZeroDivisionError), ("raise OSError", OSError)])
def test_other_errors_keep_their_traceback(
    script: Program, monkeypatch: pytest.MonkeyPatch, statement: str, kind: type[Exception]
) -> None:
    path = script(f"def inner():\n    {statement}\ninner()")
    monkeypatch.setattr(sys, "argv", ["run", str(path)])
    with pytest.raises(kind) as caught:
        run.main()
    assert [entry.name for entry in caught.traceback][-1] == "inner"


@pytest.mark.usefixtures("plugin")
def test_the_script_chooses_its_exit_status(script: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run", str(script("raise SystemExit(5)"))])
    with pytest.raises(SystemExit) as caught:
        run.main()
    assert caught.value.code == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: python -m openpi_duquant.run"),
        (["--help"], "usage: python -m openpi_duquant.run"),
        (["scripts/serve.py"], "error: scripts/serve.py: is not there; usage: "),
    ],
)
def test_a_missing_script_ends_with_the_usage(arguments: list[str], said: str, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "openpi_duquant.run", *arguments]
    environment = {"PYTHONPATH": str(pathlib.Path(run.__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said)
    assert "Traceback" not in done.stderr
