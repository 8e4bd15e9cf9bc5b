"""The choice of layers by scope, include, exclude, or an explicit list."""

from collections.abc import Iterable
import difflib
import re

from openpi_duquant.config import ACTION_HEAD
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError


def select_linears(names: Iterable[str], config: DuQuantConfig) -> list[str]:
    """The linear layers that `config` quantizes, in the order given.

    Args:
        names: Names of all linear layers.
        config: scope, include, exclude, layers, include_action_head and layer_bits are read.

    Raises:
        DuQuantError: If none is selected, or `layers` or `layer_bits` name one that is not there; shows near misses. If
            `layer_bits` names one that is not selected.
    """
    names = list(names)
    for listed in (*config.layers, *config.layer_bits):
        if listed not in names:
            raise DuQuantError(f"no linear layer is called {listed!r}{_near(listed, names)}")
    selected = [name for name in names if _is_selected(name, config)]
    if not selected:
        near = _near(config.scope or config.include, names)
        raise DuQuantError(
            f"no linear layer selected: scope={config.scope!r} holds "
            f"{sum(name.startswith(config.scope) for name in names)} of {len(names)} layers, include="
            f"{config.include!r} and exclude={config.exclude!r} leave none{near}"
        )
    for listed in config.layer_bits:
        if listed not in selected:
            raise DuQuantError(f"layer_bits names {listed!r}, which scope, include and exclude leave out")
    return selected


def _is_selected(name: str, config: DuQuantConfig) -> bool:
    if config.layers:
        return name in config.layers
    if config.include_action_head and re.search(ACTION_HEAD, name):
        return True
    return (
        name.startswith(config.scope)
        and re.search(config.include, name) is not None
        and re.search(config.exclude, name) is None
    )


def _near(wanted: str, names: list[str]) -> str:
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or names[:3]
    return f"; near misses: {', '.join(near)}" if near else "; the model has no linear layer"
