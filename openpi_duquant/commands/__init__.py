"""The commands, as `openpi-duquant <command>` and as `tools/<command>.py`."""

from collections.abc import Callable
import functools
import importlib.metadata
import signal
import sys

import tyro

from openpi_duquant.commands.accuracy_report import accuracy_report
from openpi_duquant.commands.bench_convert import bench_convert
from openpi_duquant.commands.bench_linear import bench_linear
from openpi_duquant.commands.bench_policy import bench_policy
from openpi_duquant.commands.build_kernels import build_kernels
from openpi_duquant.commands.console import console
from openpi_duquant.commands.convert_checkpoint import convert_checkpoint
from openpi_duquant.commands.convert_checkpoint import defaults
from openpi_duquant.commands.demo import demo
from openpi_duquant.commands.doctor import doctor
from openpi_duquant.commands.evaluate_libero import evaluate_libero
from openpi_duquant.commands.inspect_checkpoint import inspect_checkpoint
from openpi_duquant.commands.make_checkpoint import make_checkpoint
from openpi_duquant.commands.record_observations import record_observations
from openpi_duquant.commands.serve_policy import serve_policy
from openpi_duquant.commands.tune_tiles import tune_tiles
from openpi_duquant.config import DuQuantError

COMMANDS: dict[str, Callable[..., None]] = {
    "convert-checkpoint": convert_checkpoint,
    "inspect-checkpoint": inspect_checkpoint,
    "make-checkpoint": make_checkpoint,
    "serve-policy": serve_policy,
    "evaluate-libero": evaluate_libero,
    "record-observations": record_observations,
    "accuracy-report": accuracy_report,
    "demo": demo,
    "doctor": doctor,
    "build-kernels": build_kernels,
    "bench-convert": bench_convert,
    "bench-linear": bench_linear,
    "tune-tiles": tune_tiles,
    "bench-policy": bench_policy,
}


def _terminate(*_: object) -> None:
    """Ends the command as an error does, so that it cleans up."""
    sys.exit("error: terminated")


def main(command: str | None = None) -> None:
    """Runs a command, by name or the one that the command line names; mistakes end in one line and exit status 1."""
    signal.signal(signal.SIGTERM, _terminate)
    arguments = sys.argv[1:]
    try:
        if command is None and arguments == ["--version"]:
            console.print(f"openpi-duquant {importlib.metadata.version('openpi-duquant')}")
            return
        if command is None and arguments and arguments[0] in COMMANDS:
            command, *arguments = arguments
        if command is None:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="openpi-duquant", args=arguments)
        else:
            function = COMMANDS[command]
            if function is convert_checkpoint:
                function = functools.partial(function, **defaults(arguments))
            tyro.cli(function, prog=f"openpi-duquant {command}", args=arguments)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has gone: nothing to say, and nobody to say it to
        sys.exit(1)
    except (DuQuantError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
