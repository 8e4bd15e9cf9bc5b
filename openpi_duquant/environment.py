"""The environment: variables of ours and of others. Only this module reads it, at a command's entry or the plugin's."""

from collections.abc import Callable, Mapping
import dataclasses
import difflib
import os
import pathlib
from typing import Any

from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError

ENVIRONMENT_PREFIX = "OPENPI_DUQUANT_"


def _flag(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in values:
        raise ValueError("is not 0 or 1")
    return values[text.lower()]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _bits_by_name(text: str) -> dict[str, int]:
    pairs = [entry.rsplit(":", 1) for entry in _names(text)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("is not of the form name:bits,name:bits")
    return {name.strip(): int(bits) for name, bits in pairs}


VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "SCOPE": ("scope", str),
    "INCLUDE": ("include", str),
    "EXCLUDE": ("exclude", str),
    "LAYERS": ("layers", _names),
    "INCLUDE_ACTION_HEAD": ("include_action_head", _flag),
    "WBITS_DEFAULT": ("weight_bits", int),
    "WBITS": ("layer_bits", _bits_by_name),
    "ABITS": ("activation_bits", int),
    "PERMUTE": ("permute", _flag),
    "LS": ("smoothing", float),
    "ROTATION": ("rotation", str),
    "BLOCK": ("rotation_block", int),
    "ROW_ROT": ("row_rotation", str),
    "BLOCK_OUT": ("output_rotation_block", int),
    "ACT_PCT": ("activation_percentile", float),
    "CALIB_STEPS": ("calibration_steps", int),
}
"""OPENPI_DUQUANT_<key>: the field of `DuQuantConfig` that it fills, and its parser."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """What the OPENPI_DUQUANT_* variables say, beside OPENPI_DISABLE_TORCH_COMPILE.

    Attributes:
        fields: Fields of `DuQuantConfig`, those that are set.
        packdir: Where converted checkpoints live.
        calibration: Recorded observations that a conversion rounds the weights for.
        dry_run: List layers and totals, convert nothing.
        runtime: What runs a converted checkpoint in openpi, see `RUNTIMES`.
        backend: Backend of the quantized layers, see `kernels.resolve`.
        auto: Whether openpi's configs get their quantized twins by themselves.
        debug: Log every layer that is quantized.
        profile: Folder that a profile is written to; none for no profile.
        profile_sync: Synchronise the GPU around everything that is timed.
        compile: Whether torch.compile may be used.
    """

    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    packdir: pathlib.Path | None = None
    calibration: pathlib.Path | None = None
    dry_run: bool = False
    runtime: str = "engine"
    backend: str = "auto"
    auto: bool = True
    debug: bool = False
    profile: pathlib.Path | None = None
    profile_sync: bool = False
    compile: bool = True


RUNTIMES = ("engine", "module")
"""This project's own forward pass, or openpi's with its linear layers replaced."""

BACKENDS = ("auto", "triton", "bitblas", "reference", "fake")


def _choice(allowed: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"is not one of {', '.join(allowed)}")
        return text

    return parse


def _profile_folder(text: str) -> pathlib.Path | None:
    try:
        return pathlib.Path("duquant_profile") if _flag(text) else None
    except ValueError:
        return pathlib.Path(text)


SWITCHES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "PACKDIR": ("packdir", pathlib.Path),
    "CALIBRATION": ("calibration", pathlib.Path),
    "DRYRUN": ("dry_run", _flag),
    "RUNTIME": ("runtime", _choice(RUNTIMES)),
    "BACKEND": ("backend", _choice(BACKENDS)),
    "AUTO": ("auto", _flag),
    "DEBUG": ("debug", _flag),
    "PROFILE": ("profile", _profile_folder),
    "PROFILE_SYNC": ("profile_sync", _flag),
}
"""OPENPI_DUQUANT_<key>: the field of `Environment` that it fills, and its parser."""


def read_environment(environment: Mapping[str, str] | None = None) -> Environment:
    """What the variables say; called once, at a command's entry or when the plugin is imported.

    Args:
        environment: The variables; the process's own when none are given.

    Raises:
        DuQuantError: On an unknown variable or a malformed value; names it.
    """
    variables = os.environ if environment is None else environment
    fields: dict[str, Any] = {}
    switches: dict[str, Any] = {"compile": variables.get("OPENPI_DISABLE_TORCH_COMPILE", "0") in ("", "0")}
    for name, text in sorted(variables.items()):
        key = name.removeprefix(ENVIRONMENT_PREFIX)
        if key == name:
            continue
        if key not in VARIABLES | SWITCHES:
            near = difflib.get_close_matches(key, VARIABLES | SWITCHES, n=1)
            hint = f"; did you mean {ENVIRONMENT_PREFIX}{near[0]}?" if near else ""
            raise DuQuantError(f"unknown environment variable {name}{hint}")
        field, parse = (VARIABLES | SWITCHES)[key]
        try:
            if key in SWITCHES:
                switches[field] = parse(text)
                continue
            fields[field] = parse(text)
            DuQuantConfig(**{field: fields[field]})
        except (ValueError, DuQuantError) as error:
            raise DuQuantError(f"environment variable {name}={text!r}: {error}") from None
    return Environment(fields, **switches)


def cache_folder() -> pathlib.Path:
    """Where files that can be made again are kept: `openpi-duquant` under $XDG_CACHE_HOME, or under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache") / "openpi-duquant"  # noqa: PTH117


def openpi_source() -> pathlib.Path | None:
    """The checkout of openpi that OPENPI_SRC names, if it does."""
    return pathlib.Path(os.environ["OPENPI_SRC"]) if os.environ.get("OPENPI_SRC") else None


def default_variable(name: str, value: str) -> str:
    """Sets another library's variable where nobody has, for this process; returns what it is then."""
    return os.environ.setdefault(name, value)
