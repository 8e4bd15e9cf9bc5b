"""python -m openpi_duquant.run <script> <arguments>: runs a script of openpi with the quantized configs registered.

    python -m openpi_duquant.run scripts/serve_policy.py policy:checkpoint \
        --policy.config=pi05_libero_duquant --policy.dir=<converted checkpoint>
"""

import pathlib
import runpy
import sys

from openpi_duquant.config import DuQuantError

USAGE = "usage: python -m openpi_duquant.run <script of openpi> <its arguments>"


def main() -> None:
    """Runs the script that the command line names; a mistake ends in one line and exit status 1."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(f"{USAGE}\n\n{__doc__}" if len(sys.argv) > 1 else USAGE)
    script = pathlib.Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f"error: {script}: is not there; {USAGE}")
    try:
        import openpi_duquant.plugin  # noqa: F401, PLC0415

        del sys.argv[0]
        sys.path[0] = str(script.resolve().parent)
        runpy.run_path(str(script), run_name="__main__")
    except DuQuantError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
