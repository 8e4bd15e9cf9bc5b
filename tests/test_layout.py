"""Modules import downwards only."""

import ast
import pathlib

import pytest

import openpi_duquant

PACKAGE = pathlib.Path(openpi_duquant.__file__).parent

# From the bottom up: a part imports those before it, and itself.
PARTS = (
    "config", "environment", "installation", "report", "profiling", "progress", "architecture", "packing", "transforms",
    "quant", "gptq", "fitting", "published", "kernels", "linear", "accuracy", "folds", "checkpoint", "engine",
    "recording", "calibration", "conversion", "recorder", "synthetic", "fidelity", "plugin", "import_hook", "run",
    "libero", "commands", "__main__",
)  # fmt: skip


def part_of(module: str) -> str:
    """The part of a module openpi_duquant.<part>..."""
    return module.split(".")[1]


def imported_parts(path: pathlib.Path) -> set[str]:
    """Parts that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "openpi_duquant" else [base]
        parts |= {part_of(name) for name in names if name.startswith("openpi_duquant.")}
    return parts


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_imports_only_what_is_below_it(path: pathlib.Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in PARTS, f"{part} has no place in the order of parts"
    above = imported_parts(path) - set(PARTS[: PARTS.index(part) + 1])
    assert not above, f"{part} imports {above}, which stand above it"


def test_every_part_exists() -> None:
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert found == set(PARTS)
