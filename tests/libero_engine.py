"""A small engine policy behind openpi's policy interface, and a server of it; neither needs openpi.

As a script it serves: libero_engine.py <checkpoint> <port>.
"""

import hashlib
import http
import pathlib
import sys
from typing import Any

import numpy as np
import torch

from openpi_duquant import Manifest
from openpi_duquant import Observation
from openpi_duquant import load_policy
from openpi_duquant.checkpoint import MANIFEST_NAME

HORIZON = 10


class EnginePolicy:
    """openpi's transforms in their simplest form: words for tokens, actions as the model has them."""

    def __init__(self, checkpoint: pathlib.Path) -> None:
        self._policy = load_policy(checkpoint, backend="fake", dtype=torch.float32)
        self.metadata: dict[str, Any] = {}
        if (checkpoint / MANIFEST_NAME).exists():
            manifest = Manifest.load(checkpoint)
            self.metadata["duquant"] = {"layers": manifest.counts["layers"], "config": manifest.config.to_json()}
        self.calls = 0

    def reset(self) -> None:
        """Nothing is remembered."""

    def infer(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        """Actions [HORIZON, 7] in [-1, 1]."""
        self.calls += 1
        words = [int(hashlib.md5(word.encode()).hexdigest(), 16) % 64 for word in obs["prompt"].split()]
        images = {"base_0_rgb": "observation/image", "left_wrist_0_rgb": "observation/wrist_image"}
        observation = Observation(
            images={camera: torch.tensor(obs[name])[None] for camera, name in images.items()},
            image_masks={"right_wrist_0_rgb": torch.zeros(1, dtype=torch.bool)},
            tokenized_prompt=torch.tensor([words]),
            tokenized_prompt_mask=torch.ones(1, len(words), dtype=torch.bool),
        )
        noise = torch.randn(1, HORIZON, 32)
        return {"actions": self._policy.sample_actions(observation, noise, num_steps=2)[0, :, :7].tanh().numpy()}


def serve(checkpoint: pathlib.Path, port: int) -> None:
    """openpi's protocol: metadata first, then a chunk for every observation; /healthz answers OK."""
    from openpi_client import msgpack_numpy  # noqa: PLC0415
    from websockets.sync.server import serve as listen  # noqa: PLC0415

    policy = EnginePolicy(checkpoint)

    def talk(connection: Any) -> None:  # noqa: ANN401
        connection.send(msgpack_numpy.packb(policy.metadata))
        for message in connection:
            obs = {name: np.array(value) for name, value in msgpack_numpy.unpackb(message).items()}
            connection.send(msgpack_numpy.packb(policy.infer({**obs, "prompt": str(obs["prompt"])})))

    def health(connection: Any, request: Any) -> Any:  # noqa: ANN401
        return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None

    with listen(talk, "127.0.0.1", port, process_request=health, compression=None, max_size=None) as server:
        server.serve_forever()


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
