"""Served policies: openpi's own script, unmodified, and serve-policy; asked by openpi's client."""

from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types
from typing import Any
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from openpi_duquant.commands import main
from openpi_duquant.commands.serve_policy import warm_up
from openpi_duquant.config import DuQuantError
from openpi_duquant.recording import load_recording

pytestmark = [
    pytest.mark.openpi,
    # Of openpi's client, under the newest websockets.
    pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning"),
]
TESTS = pathlib.Path(__file__).parents[1]
NAME = "pi05_libero_duquant"
Example = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def source() -> pathlib.Path:
    """openpi's checkout."""
    return pathlib.Path(os.environ["OPENPI_SRC"]).resolve()  # noqa: TID251


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def healthy(port: int) -> bool:
    """Whether /healthz answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def server(
    data_home: pathlib.Path, log: pathlib.Path, port: int, *command: object, **variables: str
) -> Iterator[subprocess.Popen]:
    """A process that serves, ready when this is entered; it is killed afterwards if it still runs."""
    environment = os.environ | {"OPENPI_DATA_HOME": str(data_home), "OPENPI_DISABLE_TORCH_COMPILE": "1"}  # noqa: TID251
    environment |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    environment |= {f"OPENPI_DUQUANT_{name}": value for name, value in variables.items()}
    arguments = [sys.executable, str(TESTS / "tiny_openpi.py"), *map(str, command)]
    with log.open("w") as file:
        process = subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 90
        while not healthy(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def clients(port: int, count: int = 1) -> Iterator[list[Any]]:
    """openpi's clients, connected."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    connected = [WebsocketClientPolicy("127.0.0.1", port) for _ in range(count)]
    yield connected
    for policy in connected:
        policy._ws.close()


@pytest.fixture
def in_process(stock: Callable[..., Any], hosts: Any) -> Callable[..., np.ndarray]:
    """The actions of a policy in this process, from the seed that servers of these tests start every call from."""

    def act(observation: dict[str, Any], runtime: str = "engine") -> np.ndarray:
        policy = stock(NAME, hosts.converted / "pi05", runtime=runtime)
        torch.manual_seed(0)
        return np.array(policy.infer(observation)["actions"])

    return act


@pytest.mark.parametrize(("runtime", "way"), [("engine", "hook"), ("module", "hook"), ("engine", "run")])
def test_openpis_own_script_serves_a_quantized_policy(
    openpi: pathlib.Path,
    source: pathlib.Path,
    hosts: Any,
    example: Example,
    in_process: Callable[..., np.ndarray],
    tmp_path: pathlib.Path,
    runtime: str,
    way: str,
) -> None:
    port = free_port()
    policy = "policy:checkpoint", f"--policy.config={NAME}", f"--policy.dir={hosts.converted / 'pi05'}"
    command = source / "scripts" / "serve_policy.py", f"--port={port}", *policy
    if way == "run":
        command = "-m", "openpi_duquant.run", *command
    variables = {"RUNTIME": runtime, "AUTO": "1" if way == "hook" else "0"}
    with server(openpi, tmp_path / "log", port, *command, **variables), clients(port) as (policy,):
        served = policy.infer(example("libero"))["actions"]
        facts = policy.get_server_metadata()["duquant"]
    np.testing.assert_array_equal(served, in_process(example("libero"), runtime))
    assert (facts["runtime"], facts["layers"], facts["backends"]) == (runtime, 42, ["reference"])


@pytest.fixture(scope="module")
def ours(
    openpi: pathlib.Path, hosts: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, pathlib.Path]]:
    """serve-policy with the engine: its port and its log."""
    port, log = free_port(), tmp_path_factory.mktemp("serving") / "log"
    command = TESTS.parent / "tools" / "serve_policy.py", hosts.converted / "pi05", f"--port={port}"
    with server(openpi, log, port, *command):
        yield port, log


def test_serve_policy_says_what_it_serves(ours: tuple[int, pathlib.Path]) -> None:
    port, log = ours
    with clients(port) as (policy,):
        metadata = policy.get_server_metadata()
    assert metadata["duquant"]["runtime"] == "engine"
    assert metadata["duquant"]["config"]["weight_bits"] == 4
    assert metadata["duquant"]["versions"]["torch"] == torch.__version__
    text = log.read_text()
    assert text.index("42 layers quantized, W4A8, rotation hadamard, runtime engine, backend reference") < text.index(
        "warm after"
    )
    assert text.index("warm after") < text.index(f"serving on ws://127.0.0.1:{port}")


def test_a_malformed_observation_harms_its_sender_only(
    ours: tuple[int, pathlib.Path], example: Example, in_process: Callable[..., np.ndarray]
) -> None:
    port, _ = ours
    expected = in_process(example("libero"))
    without_image = {key: value for key, value in example("libero").items() if key != "observation/image"}
    with clients(port, 3) as (good, bad, worse):
        np.testing.assert_array_equal(good.infer(example("libero"))["actions"], expected)
        with pytest.raises(RuntimeError, match=r"(?s)Error in inference server:\nTraceback.*observation/image"):
            bad.infer(without_image)
        with pytest.raises(RuntimeError, match=r"(?s)Traceback"):
            worse.infer({**example("libero"), "observation/image": np.zeros((3, 5), np.uint8)})
        np.testing.assert_array_equal(good.infer(example("libero"))["actions"], expected)
    assert healthy(port)


def test_clients_at_once_get_their_own_answers(
    ours: tuple[int, pathlib.Path], example: Example, in_process: Callable[..., np.ndarray]
) -> None:
    port, _ = ours
    seen = [example("libero", seed) for seed in (3, 4)]
    with clients(port, len(seen)) as connected, concurrent.futures.ThreadPoolExecutor() as pool:

        def ask(policy: Any, observation: dict[str, Any]) -> list[np.ndarray]:
            return [policy.infer(observation)["actions"] for _ in range(3)]

        answers = list(pool.map(ask, connected, seen))
    expected = [in_process(observation) for observation in seen]
    assert not np.array_equal(*expected)
    for own, mine in zip(answers, expected):
        for answer in own:
            np.testing.assert_array_equal(answer, mine)


def test_sigterm_ends_serve_policy_and_frees_the_port(
    openpi: pathlib.Path, hosts: Any, example: Example, in_process: Callable[..., np.ndarray], tmp_path: pathlib.Path
) -> None:
    port = free_port()
    command = TESTS.parent / "tools/serve_policy.py", hosts.converted / "pi05", "--runtime=module", f"--port={port}"
    with server(openpi, tmp_path / "log", port, *command) as process, clients(port) as (policy,):
        served = policy.infer(example("libero"))["actions"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))
    np.testing.assert_array_equal(served, in_process(example("libero"), "module"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_writes_what_it_saw_when_it_ends(
    openpi: pathlib.Path, hosts: Any, example: Any, tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    port = free_port()
    options = f"--port={port}", f"--record={tmp_path / 'r'}", "--record-limit=2"
    command = TESTS.parent / "tools" / "serve_policy.py", hosts.converted / "pi05", *options
    with server(openpi, tmp_path / "log", port, *command) as process:
        with clients(port) as (policy,):
            for seed in range(3):
                policy.infer(example("libero", seed))
        process.send_signal(number)
        assert process.wait(30) == 0, (tmp_path / "log").read_text()
    recording = load_recording(tmp_path / "r")
    assert (recording.info["seen"], recording.info["count"]) == (3, 2)
    assert recording.info["config"] == "pi05_libero_duquant"


@pytest.fixture
def serve(plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs serve-policy in this process, which must end in one line and status 1; returns that line."""
    del plugin

    async def answer(*_: object) -> None:
        raise AssertionError("it serves")

    monkeypatch.setitem(warm_up.__globals__, "_serve_until_stopped", answer)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["serve-policy", *map(str, arguments)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as caught:
            main("serve-policy")
        assert isinstance(caught.value.code, str)
        assert len(caught.value.code.splitlines()) == 1
        return caught.value.code

    return run


def test_what_cannot_be_served_is_said_at_once(serve: Callable[..., str], hosts: Any, tmp_path: pathlib.Path) -> None:
    folder, port = hosts.converted / "pi05", free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{number}" in serve(folder, f"--port={number}")
    assert "cannot listen on" in serve(folder, "--port=70000")
    assert "'pi05_libro' not found" in serve(folder, "--config=pi05_libro", f"--port={port}")
    assert str(tmp_path / "none") in serve(tmp_path / "none", f"--port={port}")
    assert "has no model.safetensors" in serve(tmp_path, f"--port={port}")
    assert "unknown backend 'cutlass'" in serve(folder, "--backend=cutlass", f"--port={port}")
    assert "unknown runtime 'jax'" in serve(folder, "--runtime=jax", f"--port={port}")
    assert "Pi0FASTConfig" in serve(folder, "--config=pi0_fast_libero", f"--port={port}")


def test_nothing_is_answered_before_the_policy_is_warm(
    serve: Callable[..., str], hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    refused = []

    def look(policy: Any) -> None:
        assert policy.metadata["duquant"]["layers"] == 42
        with socket.socket() as trial:
            refused.append(trial.connect_ex(("127.0.0.1", port)) != 0)
        raise DuQuantError("seen")

    monkeypatch.setitem(warm_up.__globals__, "warm_up", look)
    assert serve(hosts.converted / "pi05", f"--port={port}") == "error: seen"
    assert refused == [True]


@pytest.mark.parametrize("name", [NAME, "pi0_aloha_sim_duquant"])
@pytest.mark.parametrize("runtime", ["engine", "module"])
def test_warming_up_is_one_call_of_the_model(stock: Callable[..., Any], hosts: Any, name: str, runtime: str) -> None:
    policy = stock(name, hosts.converted / name[:4].removesuffix("_"), runtime=runtime)
    policy._sample_kwargs = {"num_steps": 1}
    real, calls = policy._model.sample_actions, []

    def sample(*arguments: Any, **keywords: Any) -> torch.Tensor:
        calls.append(real(*arguments, **keywords))
        return calls[-1]

    policy._model.sample_actions = sample
    warm_up(policy)
    assert [made.shape[1:] for made in calls] == [(policy._model.config.action_horizon, 32)]
    assert calls[0].isfinite().all()


def test_an_address_of_openpis_storage_arrives_as_given(
    serve: Callable[..., str], plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def create(_: Any, checkpoint: str, **__: Any) -> None:
        given.append(checkpoint)
        raise DuQuantError("seen")

    monkeypatch.setattr(plugin, "create_trained_policy", create)
    serve("gs://openpi-assets/checkpoints/pi05_libero", f"--port={free_port()}")
    assert given == ["gs://openpi-assets/checkpoints/pi05_libero"]
