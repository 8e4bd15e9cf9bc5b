"""The kernel for Hopper against the definition of the layers; what chooses it, without a GPU."""

from collections.abc import Callable, Iterator
import dataclasses
import logging
import pathlib
import types

from denoising_step import step
import emulated_hopper
import interpreted
import nvcc
import pytest
import torch

from openpi_duquant import PRESETS
from openpi_duquant import convert
from openpi_duquant import profiling
from openpi_duquant import synthetic
from openpi_duquant.accuracy import relative_error
from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import TransformerSize
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine import Policy
from openpi_duquant.engine import load_policy
from openpi_duquant.kernels import driver
from openpi_duquant.kernels import persistent_cuda
from openpi_duquant.kernels import persistent_triton
from openpi_duquant.kernels.persistent import Matrix
from openpi_duquant.kernels.persistent import Stack

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@pytest.fixture(scope="module")
def converted(tiny: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """A policy with two layers of the real expert's size."""
    folder = tmp_path_factory.mktemp("persistent_cuda")
    language, expert = TransformerSize(256, 2, 320, 8, 256), TransformerSize(1024, 2, 4096, 8, 256)

    def make(*, pi05: bool = True, **changes: object) -> pathlib.Path:
        here = folder / f"{pi05}-{changes}".replace("'", "").replace(" ", "")
        if not here.exists():
            architecture = dataclasses.replace(tiny, language=language, expert=expert, pi05=pi05)
            synthetic.make_checkpoint(here / "original", architecture, seed=5)
            convert(here / "original", here / "converted", dataclasses.replace(PRESETS["default"], **changes))
        return here / "converted"

    return make


@pytest.fixture(scope="module")
def loaded(converted: Callable[..., pathlib.Path]) -> Callable[..., Policy]:
    """A policy on the GPU, once for each way to make it."""
    found: dict[str, Policy] = {}

    def load(backend: str, dtype: torch.dtype, **how: object) -> Policy:
        key = f"{backend} {dtype} {how}"
        if key not in found:
            found[key] = load_policy(converted(**how), backend=backend, dtype=dtype, device="cuda")
        return found[key]

    return load


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs Hopper's clusters")
@pytest.mark.parametrize(
    ("shape", "prefix", "state_first", "masked"),
    [
        ((1, 1), 1, False, False),
        ((1, 10), 544, False, True),
        ((1, 16), 128, False, False),
        ((1, 17), 968, False, True),
        ((1, 51), 968, True, True),
        ((4, 10), 300, False, True),
        ((3, 21), 77, True, True),
    ],
)
@pytest.mark.parametrize(
    "how",
    [
        {"pi05": True},
        {"pi05": False, "rotation_block": 128},
        {"pi05": True, "rotation": "none", "permute": False},
    ],
    ids=str,
)
def test_a_step_is_its_definition(
    loaded: Callable[..., Policy],
    monkeypatch: pytest.MonkeyPatch,
    how: dict[str, object],
    shape: tuple[int, int],
    prefix: int,
    *,
    state_first: bool,
    masked: bool,
) -> None:
    given = {"shape": shape, "prefix": prefix, "state_first": state_first, "masked": masked}
    policy = loaded("triton", torch.bfloat16, **how)
    expected = step(loaded("reference", torch.float32, **how), **given)
    with profiling.Profile().active():  # layers one by one
        usual = relative_error(step(policy, **given).float(), expected)
    monkeypatch.setattr(persistent_triton, "launch", lambda *_, **__: pytest.fail("the other kernel was launched"))
    monkeypatch.setattr(policy.expert, "_compared", True)
    actual = step(policy, **given)
    assert relative_error(actual.float(), expected) < 2 * usual < 0.1  # whatever is summed in another order differs
    for _ in range(20):
        assert torch.equal(step(policy, **given), actual)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs Hopper's clusters")
def test_more_keys_than_its_blocks_have_room_for_are_for_the_other_kernel(
    converted: Callable[..., pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persistent_cuda, "launch", lambda *_, **__: pytest.fail("it was launched"))
    policy = load_policy(converted(pi05=True), backend="triton", dtype=torch.bfloat16, device="cuda")
    assert step(policy, (1, 10), 1015, state_first=False, masked=False).isfinite().all()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """A GPU with room for 15 clusters; what was compiled."""
    compiled: list[object] = []
    room = types.SimpleNamespace(shared_memory_per_block_optin=227 * 1024)
    function = types.SimpleNamespace(most_clusters=lambda blocks, threads: 120 // blocks)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: room)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(driver, "compile_source", lambda *given: compiled.append(given[-1]["CLUSTERS"]) or b"code")
    monkeypatch.setattr(driver, "load", lambda *_: function)
    persistent_cuda._kernel.cache_clear()
    yield compiled
    persistent_cuda._kernel.cache_clear()


def kernel() -> object:
    return persistent_cuda._kernel(torch.device("cuda", 0), (64, 64, 64), (True, True, False), (1, 10), adaptive=True)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[None]:
    """A few clusters on a CPU."""
    emulated_hopper.install(monkeypatch, tmp_path)
    monkeypatch.setattr(persistent_cuda, "_SHARED_MEMORY", emulated_hopper.MOST_SHARED_MEMORY)
    monkeypatch.setattr(persistent_cuda, "_MOST_CLUSTERS", emulated_hopper.CLUSTERS)
    persistent_cuda._kernel.cache_clear()
    with interpreted.triton_backend():
        yield
    persistent_cuda._kernel.cache_clear()


@pytest.mark.triton
@emulated_hopper.only_here
@pytest.mark.parametrize(
    ("shape", "prefix", "state_first", "few", "how"),
    [
        ((1, 10), 544, False, False, {"pi05": True}),
        ((3, 7), 77, True, False, {"pi05": False, "rotation_block": 128}),
        ((1, 1), 1, False, True, {"pi05": True, "rotation": "none", "permute": False}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("emulated")
def test_a_step_is_its_definition_on_a_cpu(
    converted: Callable[..., pathlib.Path],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    prefix: int,
    how: dict[str, object],
    *,
    state_first: bool,
    few: bool,
) -> None:
    monkeypatch.setattr(persistent_cuda, "_FEW_CLUSTERS", emulated_hopper.CLUSTERS if few else 0)
    given = {"shape": shape, "prefix": prefix, "state_first": state_first, "masked": prefix > 1}
    expected, rounded, policy = (
        load_policy(converted(**how), backend=backend, dtype=dtype)
        for backend, dtype in (
            ("reference", torch.float32),
            ("reference", torch.bfloat16),
            ("triton", torch.bfloat16),
        )
    )
    launched = []
    launch = persistent_cuda.launch
    monkeypatch.setattr(persistent_cuda, "launch", lambda *args, **how: launched.append(1) or launch(*args, **how))
    monkeypatch.setattr(policy.expert, "_compared", True)
    actual = step(policy, **given)
    assert launched
    expected = step(expected, **given)
    assert relative_error(actual.float(), expected) < 2 * relative_error(step(rounded, **given).float(), expected) < 0.1


def test_it_is_compiled_for_as_many_clusters_as_run_at_a_time(hopper: list[object]) -> None:
    assert kernel()[1] == 15
    assert hopper == [16, 15]


def test_it_is_compiled_for_the_tokens_that_there_are(hopper: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(driver, "compile_source", lambda *_: given.update(_[-1]) or b"code")
    matrix = Matrix(torch.empty(0), torch.empty(0), None, 0)
    x = torch.empty(4, 10, 1024, device="meta")
    assert persistent_cuda._kernel_for(x, Stack(matrix, matrix, matrix, matrix, None))
    assert (given["BATCH"], given["LENGTH"]) == (4, 10)
    del hopper


def test_where_it_does_not_compile_it_is_left_out_and_says_why(
    hopper: list[object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> bytes:
        raise DuQuantError("persistent.cu does not compile for sm_90: no")

    monkeypatch.setattr(driver, "compile_source", broken)
    with caplog.at_level(logging.WARNING):
        assert kernel() is None
    assert "persistent.cu does not compile for sm_90: no" in caplog.text
    assert not hopper


def test_gpus_of_too_few_clusters_are_left_out_and_say_why(
    hopper: list[object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver, "load", lambda *_: types.SimpleNamespace(most_clusters=lambda *_: 9))
    with caplog.at_level(logging.WARNING):
        assert kernel() is None
    assert "this GPU has room for 9 clusters of 8 blocks, it takes 10" in caplog.text
    assert hopper == [16]


def test_gpus_without_the_room_are_not_asked(hopper: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    room = types.SimpleNamespace(shared_memory_per_block_optin=163 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: room)
    assert kernel() is None
    assert not hopper


@nvcc.needed
@pytest.mark.parametrize("clusters", [10, 12, 13, 14, 15, 16])
@pytest.mark.parametrize(
    ("permuted", "adaptive", "shape"),
    [
        ((True, True, False), True, (1, 10)),
        ((False, False, True), False, (1, 16)),
        ((True, True, False), True, (1, 51)),
        ((True, True, False), True, (4, 10)),
    ],
)
def test_it_compiles_without_spilling_registers(
    hopper: list[object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    permuted: tuple[bool, ...],
    clusters: int,
    shape: tuple[int, int],
    *,
    adaptive: bool,
) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(driver, "compile_source", lambda *_: given.update(_[-1]) or b"code")
    monkeypatch.setattr(driver, "load", lambda *_: types.SimpleNamespace(most_clusters=lambda *_: clusters))
    persistent_cuda._kernel(torch.device("cuda", 0), (64, 64, 64), permuted, shape, adaptive=adaptive)
    source = persistent_cuda._SOURCE.read_text()
    assert " 0 bytes spill stores" in nvcc.report(source, "sm_90", given, tmp_path)
    del hopper
