"""Real openpi for the tests in this folder: OPENPI_SRC names a checkout, without it they are skipped."""

from collections.abc import Callable, Iterator
import dataclasses
import os
import pathlib
import types
from typing import Any

import numpy as np
from openpi_host import TinyPi0
from openpi_host import import_openpi
from openpi_host import make_tokenizer
from openpi_host import save_norm_stats
from openpi_host import save_openpi_checkpoint
from openpi_host import shrunken_openpi
from openpi_host import tiny_openpi_model
import pytest

from openpi_duquant.config import DuQuantConfig
from openpi_duquant.conversion import convert
from openpi_duquant.environment import ENVIRONMENT_PREFIX

ASSETS = {
    "droid": {"state": 8, "actions": 8},
    "lerobot/aloha_sim_transfer_cube_human": {"state": 14, "actions": 14},
}


@pytest.fixture(scope="session", autouse=True)
def openpi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """Makes openpi importable, without compilation or variables of ours; its OPENPI_DATA_HOME has a small tokenizer."""
    source = os.environ.get("OPENPI_SRC")  # noqa: TID251
    if not source:
        pytest.skip("OPENPI_SRC does not name a checkout of openpi")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):  # noqa: TID251
            if name.startswith(ENVIRONMENT_PREFIX):
                patch.delenv(name)
        data_home = tmp_path_factory.mktemp("openpi_data")
        make_tokenizer(data_home, vocab_size=400)
        patch.setenv("OPENPI_DATA_HOME", str(data_home))
        patch.setenv("OPENPI_DISABLE_TORCH_COMPILE", "1")
        import_openpi(pathlib.Path(source))
        yield data_home


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Folders with `pi05` and `pi0`, in bf16; converted, with the `default` preset."""

    original: pathlib.Path
    converted: pathlib.Path


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Checkpoints as openpi writes them, with norm stats for three robots; nothing may be written to them."""
    folder = tmp_path_factory.mktemp("hosts")
    made = Checkpoints(folder / "original", folder / "converted")
    for name in ("pi05", "pi0"):
        model = tiny_openpi_model(TinyPi0(pi05=name == "pi05"), seed=0, dtype="bfloat16")
        save_openpi_checkpoint(model, made.original / name)
        for asset_id, sizes in ASSETS.items():
            save_norm_stats(made.original / name, asset_id, **sizes)
        convert(made.original / name, made.converted / name, DuQuantConfig())
    return made


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The plugin, in an openpi that is shrunken and forgets what a test registers."""
    from openpi.training import config

    from openpi_duquant import plugin
    from openpi_duquant.plugin import quantization

    quantization._environment.cache_clear()
    configs = {name: own for name, own in config._CONFIGS_DICT.items() if not name.endswith(plugin.SUFFIX)}
    monkeypatch.setattr(config, "_CONFIGS_DICT", configs)
    plugin.configs.register_all()
    with shrunken_openpi(TinyPi0()):
        yield plugin
    quantization._environment.cache_clear()


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets OPENPI_DUQUANT_* variables, as if before the plugin was first imported; `register` then sees them."""

    def setting(**values: str | pathlib.Path) -> None:
        from openpi_duquant.plugin import quantization

        for name, value in values.items():
            monkeypatch.setenv(ENVIRONMENT_PREFIX + name, str(value))
        quantization._environment.cache_clear()

    return setting


@pytest.fixture(scope="session")
def example() -> Callable[..., dict[str, Any]]:
    """An example observation of openpi: "libero", "droid" or "aloha"; the same from the same seed."""

    def make(robot: str, seed: int = 0) -> dict[str, Any]:
        from openpi.policies import aloha_policy
        from openpi.policies import droid_policy
        from openpi.policies import libero_policy

        makers = {
            "libero": libero_policy.make_libero_example,
            "droid": droid_policy.make_droid_example,
            "aloha": aloha_policy.make_aloha_example,
        }
        state = np.random.get_state()
        np.random.seed(seed)
        observation = makers[robot]()
        np.random.set_state(state)
        return observation

    return make


@pytest.fixture
def stock(plugin: types.ModuleType) -> Callable[..., Any]:
    """openpi's own create_trained_policy, of a config's name and a checkpoint; keywords are those of `register`."""

    def create(name: str, folder: pathlib.Path, **asked: Any) -> Any:
        from openpi.policies import policy_config

        if asked:
            plugin.register(name.removesuffix("_duquant"), **asked)
        return policy_config.create_trained_policy(plugin.get_config(name), folder)

    return create
