"""openpi-duquant serve-policy."""

import asyncio
import contextlib
import itertools
import logging
import pathlib
import signal
import socket
import time
from typing import TYPE_CHECKING

import torch
import tyro

from openpi_duquant.commands.console import console
from openpi_duquant.config import DuQuantError
from openpi_duquant.recorder import Recorder

if TYPE_CHECKING:
    from openpi.policies.policy import Policy
    from openpi.serving.websocket_policy_server import WebsocketPolicyServer

logger = logging.getLogger("openpi_duquant")


def serve_policy(
    checkpoint: tyro.conf.Positional[str],
    *,
    config: str = "pi05_libero_duquant",
    host: str = "127.0.0.1",
    port: int = 8000,
    default_prompt: str | None = None,
    runtime: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    record: pathlib.Path | None = None,
    record_limit: int = 64,
) -> None:
    """Serve a quantized policy over openpi's websocket protocol; needs openpi.

    /healthz answers once the policy is loaded and warm. SIGTERM and Ctrl-C end the server after the call in hand.

    Args:
        checkpoint: Converted by convert-checkpoint, or an original one, which is converted first; a folder, or a gs://
            address.
        config: A config of openpi; its policy is quantized, whether or not its name ends in _duquant.
        host: Address to listen on; 0.0.0.0 for all, to anybody who can reach this machine.
        port: Port to listen on.
        default_prompt: Used for observations without a prompt.
        runtime: engine or module; else OPENPI_DUQUANT_RUNTIME, else engine.
        backend: Backend of the quantized layers; else OPENPI_DUQUANT_BACKEND, else auto.
        device: cpu, cuda, cuda:1; cuda where there is one if not given.
        record: Folder to make, when the server ends, with observations that the policy saw; see record-observations.
        record_limit: Observations to keep there, evenly sampled.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    from openpi_duquant import plugin  # noqa: PLC0415

    _require_free(host, port)
    about = {"source": "serve-policy", "config": config, "checkpoint": checkpoint}
    recorder = Recorder(record, limit=record_limit, info=about) if record else None
    try:
        train_config = plugin.get_config(config)
    except ValueError as error:
        raise DuQuantError(str(error)) from None
    from openpi.serving.websocket_policy_server import WebsocketPolicyServer  # noqa: PLC0415

    policy = plugin.create_trained_policy(
        train_config,
        checkpoint,
        runtime=runtime,
        backend=backend,
        default_prompt=default_prompt,
        pytorch_device=device,
    )
    start = time.monotonic()
    warm_up(policy)
    logger.info("warm after %.1f s", time.monotonic() - start)
    server = WebsocketPolicyServer(policy, host, port, metadata=policy.metadata)
    with recorder or contextlib.nullcontext():
        if recorder:
            recorder.watch(policy)
        asyncio.run(_serve_until_stopped(server, f"{host}:{port}"))


def warm_up(policy: "Policy") -> None:
    """Calls the policy's model on empty observations: kernels are built and memory is taken.

    On a GPU the engine captures a graph for each number of cameras and length of prompts: those that are usual.
    """
    from openpi.models.model import IMAGE_KEYS  # noqa: PLC0415
    from openpi.models.model import IMAGE_RESOLUTION  # noqa: PLC0415
    from openpi.models.model import Observation  # noqa: PLC0415

    from openpi_duquant.plugin.engine_model import EngineModel  # noqa: PLC0415
    from openpi_duquant.plugin.inference import as_observation  # noqa: PLC0415

    model, device = policy._model, policy._pytorch_device  # noqa: SLF001
    config, engine = model.config, isinstance(model, EngineModel)
    observe, place = (as_observation, "cpu") if engine else (Observation.from_dict, device)
    tokens = torch.arange(config.max_token_len, device=place)[None]
    black = torch.zeros(1, *IMAGE_RESOLUTION, 3, dtype=torch.uint8, device=place)
    graphs = engine and str(device).startswith("cuda")
    for cameras, prompt in itertools.product((2, 3), (16, 32, 48)) if graphs else [(3, 24)]:
        inputs = {
            "image": dict.fromkeys(IMAGE_KEYS, black),
            "image_mask": {
                key: torch.full((1,), index < cameras, device=place) for index, key in enumerate(IMAGE_KEYS)
            },
            "state": torch.zeros(1, config.action_dim, device=place),
            "tokenized_prompt": torch.zeros_like(tokens, dtype=torch.int32),
            "tokenized_prompt_mask": tokens < prompt,
        }
        model.sample_actions(device, observe(inputs), **policy._sample_kwargs)  # noqa: SLF001


async def _serve_until_stopped(server: "WebsocketPolicyServer", address: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    serving = asyncio.create_task(server.run())
    stopped = asyncio.create_task(stop.wait())
    console.print(f"serving on ws://{address}, ready when http://{address}/healthz answers; Ctrl-C ends it")
    await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    console.print("stopped")


def _require_free(host: str, port: int) -> None:
    """Raises DuQuantError if the address cannot be listened on: found out before minutes of loading."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((address[0], port, *address[2:]))  # getaddrinfo cuts a port above 65535 down
    except (OSError, OverflowError) as error:
        raise DuQuantError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None
