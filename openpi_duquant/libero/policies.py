"""Where actions come from: a policy in this process, or a server."""

from collections.abc import Mapping
import dataclasses
import pathlib
import time
from typing import Any
import urllib.error
import urllib.request

from openpi_duquant.checkpoint import MANIFEST_NAME
from openpi_duquant.checkpoint.files import WEIGHTS_NAME
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.environment import Environment
from openpi_duquant.environment import read_environment
from openpi_duquant.libero.episode import Policy

SUFFIX = "_duquant"
CONNECT_TIMEOUT_S = 20.0


def check_checkpoint(folder: pathlib.Path, config: str) -> None:
    """Finds out in no time what would otherwise stop the evaluation after minutes.

    Raises:
        DuQuantError: If there is no PyTorch checkpoint, or a floating-point policy is asked of a quantized one or under
            OPENPI_DUQUANT_* variables.
    """
    if not folder.is_dir():
        raise DuQuantError(f"checkpoint: there is no folder {folder}")
    if not any(folder.glob("*.safetensors")):
        raise DuQuantError(f"checkpoint {folder}: has no {WEIGHTS_NAME}")
    environment = read_environment()
    if config.endswith(SUFFIX):
        return
    if (folder / MANIFEST_NAME).exists():
        raise DuQuantError(f"checkpoint {folder}: is quantized; {config} is a floating-point policy, give the original")
    if environment != Environment(compile=environment.compile):
        raise DuQuantError(f"{config} is a floating-point policy; unset the OPENPI_DUQUANT_* variables")


def check_served(facts: Mapping[str, Any] | None, config: str | None) -> None:
    """Refuses a server that runs something else than was asked for.

    Args:
        facts: What the server says of its quantized policy; None of another.
        config: Whose policy is asked for; None for any.

    Raises:
        DuQuantError: If it is quantized and the config is not, or the reverse, or is not as the OPENPI_DUQUANT_*
            variables have it.
    """
    fields = read_environment().fields
    wanted = config.endswith(SUFFIX) if config else bool(fields) or bool(facts)
    if wanted != bool(facts):
        kinds = {True: "quantized", False: "in floating point"}
        raise DuQuantError(f"the server's policy is {kinds[bool(facts)]}, and not {kinds[wanted]} as was asked for")
    stored = DuQuantConfig.from_json(facts["config"]) if facts and fields else None
    for name, value in fields.items():
        served = getattr(stored, name)
        if served != value:
            raise DuQuantError(f"the server's policy has {name} {served!r}, OPENPI_DUQUANT_* asks for {value!r}")


def load_in_process(checkpoint: pathlib.Path, config: str) -> tuple[Policy, dict[str, Any]]:
    """openpi's policy of a checkpoint, quantized if the config's name ends in _duquant; and what it says of itself.

    Compiled as openpi does it, unless OPENPI_DISABLE_TORCH_COMPILE=1.

    Raises:
        DuQuantError: If openpi is missing, the config unknown, or the checkpoint cannot be loaded.
    """
    from openpi_duquant import plugin  # noqa: PLC0415 - needs openpi

    try:
        train_config = plugin.get_config(config)
    except ValueError as error:
        raise DuQuantError(str(error)) from None
    if config.endswith(SUFFIX):
        policy = plugin.create_trained_policy(train_config, checkpoint)
    else:
        from openpi.policies import policy_config  # noqa: PLC0415

        if not read_environment().compile:
            model = dataclasses.replace(train_config.model, pytorch_compile_mode=None)
            train_config = dataclasses.replace(train_config, model=model)
        policy = policy_config.create_trained_policy(train_config, checkpoint)
    return policy, dict(policy.metadata)


class ServerPolicy:
    """A policy behind openpi's websocket protocol. A connection that breaks is made anew for the next episode.

    Attributes:
        metadata: What the server said of its policy.

    Raises:
        DuQuantError: If the client package is missing, or nothing answers.
    """

    def __init__(self, host: str, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._address = host, port, timeout_s
        self._client: Any = None
        self.metadata: dict[str, Any] | None = None
        self.reset()

    def reset(self) -> None:
        """Connects, unless it is connected."""
        if self._client is not None:
            return
        client = _connect(*self._address)
        metadata = dict(client.get_server_metadata())
        if self.metadata not in (None, metadata):
            raise DuQuantError(f"the server at {self._address[0]}:{self._address[1]} now serves another policy")
        self._client, self.metadata = client, metadata

    def infer(self, obs: dict[str, Any]) -> Mapping[str, Any]:
        """Asks the server."""
        try:
            return self._client.infer(obs)
        except Exception:
            self._client = None
            raise


def _connect(host: str, port: int, timeout_s: float) -> Any:  # noqa: ANN401
    try:
        from openpi_client.websocket_client_policy import WebsocketClientPolicy  # noqa: PLC0415
    except ImportError as error:
        raise DuQuantError(f"openpi-client: {error}; see docs/libero.md") from None
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/healthz", timeout=timeout_s):
                break
        except urllib.error.HTTPError:
            break  # it answers; an older server has no /healthz
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                message = f"no policy server answers at {host}:{port} within {timeout_s:g} s: {error}"
                raise DuQuantError(message) from None
            time.sleep(0.5)
    try:
        return WebsocketClientPolicy(host, port)
    except Exception as error:  # noqa: BLE001 - the websocket library has many kinds
        raise DuQuantError(f"the server at {host}:{port} is no policy server: {error}") from None
