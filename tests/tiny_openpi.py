"""python tiny_openpi.py <script> <arguments>, or -m <module> ...: runs it with the openpi of OPENPI_SRC, shrunken.

The hook of this package is installed, as the wheel does it. Every call of a policy starts from the same seed: openpi's
protocol carries no noise.
"""

import os
import pathlib
import runpy
import sys
from typing import Any

from openpi_host import TinyPi0
from openpi_host import import_openpi
from openpi_host import shrunken_openpi
import torch

from openpi_duquant import import_hook  # noqa: F401


def main() -> None:
    """Runs what the command line names."""
    torch.set_num_threads(1)
    import_openpi(pathlib.Path(os.environ["OPENPI_SRC"]))  # noqa: TID251
    seed_every_call()
    del sys.argv[0]
    as_module = sys.argv[0] == "-m"
    if as_module:
        del sys.argv[0]
    else:
        sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
    with shrunken_openpi(TinyPi0()):
        (runpy.run_module if as_module else runpy.run_path)(sys.argv[0], run_name="__main__")


def seed_every_call() -> None:
    """Makes the noise of a call the same as that of any other."""
    normal = torch.normal

    def seeded(*args: Any, **kwargs: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return normal(*args, **kwargs)

    torch.normal = seeded


if __name__ == "__main__":
    main()
