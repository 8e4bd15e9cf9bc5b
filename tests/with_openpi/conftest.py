"""Real openpi for the tests in this folder: OPENPI_SRC names a checkout, without it they are skipped."""

import os
import pathlib

from openpi_host import import_openpi
import pytest


@pytest.fixture(scope="session", autouse=True)
def openpi() -> None:
    """Makes openpi importable."""
    source = os.environ.get("OPENPI_SRC")  # noqa: TID251
    if not source:
        pytest.skip("OPENPI_SRC does not name a checkout of openpi")
    import_openpi(pathlib.Path(source))
