"""The BitBLAS backend on a GPU: exact sums, the epilogue, and a layer that can be moved, saved and compiled."""

import copy
import dataclasses
import importlib.util
import io
from unittest import mock

import pytest
import torch
from torch import Tensor

from openpi_duquant import kernels
from openpi_duquant import packing
from openpi_duquant import transforms
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import Problem
from openpi_duquant.kernels import reference
from openpi_duquant.kernels.bitblas import build
from openpi_duquant.kernels.bitblas import cache
from openpi_duquant.kernels.bitblas import launch
from openpi_duquant.kernels.bitblas import loading
from openpi_duquant.kernels.bitblas import operators
from openpi_duquant.kernels.bitblas.self_test import integers
from openpi_duquant.kernels.bitblas.self_test import self_test
from openpi_duquant.kernels.epilogue import epilogue
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import QuantLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU = torch.device("cuda", 0)
PI05 = [
    (2048, 2048), (256, 2048), (16384, 2048), (2048, 16384),
    (2048, 1024), (256, 1024), (1024, 2048), (4096, 1024), (1024, 4096),
]  # fmt: skip
MERGED = [(2560, 2048), (32768, 2048), (2560, 1024), (8192, 1024)]
SIGLIP = [(1152, 1152), (4304, 1152), (1152, 4304)]
TOKENS = (1, 3, 10, 50, 127, 536, 968)
REPEATS = 100


def problem(n: int, k: int, weight_bits: int = 4, activation_bits: int = 8) -> Problem:
    return Problem(n, k, weight_bits, activation_bits, 1, "none", 0, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def kernels_can_be_made() -> None:
    """Skips where nobody has made them, and BitBLAS is not there to make them."""
    possible, reasons = loading.can_run(problem(256, 1024), GPU)
    if not possible and importlib.util.find_spec("bitblas") is None:
        pytest.skip("; ".join(reasons))


def random_weight(what: Problem) -> Tensor:
    """The canonical weight: every code alike often; the first row the smallest code, the second the largest."""
    low, high = -(2 ** (what.weight_bits - 1)), 2 ** (what.weight_bits - 1)
    codes = torch.randint(low, high, (what.out_features, what.in_features), dtype=torch.int8, device=GPU)
    codes[0], codes[1] = low, high - 1
    return packing.pack(codes, what.weight_bits)


def random_codes(m: int, k: int) -> Tensor:
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=GPU)
    codes[0] = 127
    codes[-1] = -127
    return codes


def loaded(what: Problem) -> Tensor:
    """A repacked weight, its kernels loaded; and the canonical one."""
    assert kernels.resolve("bitblas", what, GPU) == "bitblas"
    canonical = random_weight(what)
    return operators.repack(what, canonical), canonical


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [*PI05, *MERGED, *SIGLIP], ids=str)
def test_sums_are_exact_eager_and_in_a_graph(shape: tuple[int, int], bits: int, m: int) -> None:
    what = problem(*shape, bits)
    weight, canonical = loaded(what)
    codes = random_codes(m, shape[1])
    expected = reference.integer_matmul(codes, packing.unpack(canonical))
    for _ in range(REPEATS):
        assert torch.equal(integers(codes, weight, what), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = integers(codes, weight, what)
    for _ in range(REPEATS):
        captured.fill_(-1)
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("shape", [(1024, 4096), (2048, 2048), (1152, 4304)], ids=str)
def test_weights_only_are_exact_on_integers_and_cannot_overflow(shape: tuple[int, int], m: int) -> None:
    what = problem(*shape, 4, 16)
    weight, canonical = loaded(what)
    codes = random_codes(m, shape[1])
    assert torch.equal(integers(codes, weight, what), reference.integer_matmul(codes, packing.unpack(canonical)))
    x = torch.randn(m, shape[1], device=GPU) * 1e6  # beyond float16
    scale = torch.rand(shape[0], 1, device=GPU) / 100
    y = launch.matmul(x, None, weight, scale, None, None, torch.bfloat16)
    exact = x.double() @ (packing.unpack(canonical).double() * scale).T
    usual = reference.matmul(x.bfloat16(), None, canonical, scale, None, None, torch.bfloat16)
    assert (y.double() - exact).norm() <= 2 * (usual.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "block"),
    [("none", 0), ("hadamard", 4), ("hadamard", 64), ("hadamard", 128)] + [("matrix", b) for b in (8, 16, 32, 64, 128)],
)
@pytest.mark.parametrize("shape", [(1, 256), (3, 1024), (50, 384), (968, 2048)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_epilogue_errs_at_most_twice_as_much_as_the_reference(
    shape: tuple[int, int], kind: str, block: int, dtype: torch.dtype, *, bias: bool
) -> None:
    torch.manual_seed(0)
    m, n = shape
    sums = torch.randint(-20000, 20000, (m, n), dtype=torch.int32, device=GPU)
    row_sum = torch.randint(-1000, 1000, (m, 1), dtype=torch.int32, device=GPU)
    act_scale, weight_scale = torch.rand(m, 1, device=GPU) + 0.01, torch.rand(n, 1, device=GPU) / 1000
    rotation = block if kind == "hadamard" else None
    if kind == "matrix":
        rotation = torch.linalg.qr(torch.randn(n // block, block, block, device=GPU))[0].bfloat16()  # not contiguous
    shift = torch.randn(n, device=GPU).to(dtype) if bias else None
    y = epilogue(sums, act_scale, weight_scale, shift, rotation, dtype, row_sum)
    whole = sums - 8 * row_sum
    usual = reference.restore_output(whole * weight_scale.T * act_scale, shift, rotation, dtype)
    exact = transforms.rotate(whole.double() * weight_scale.double().T * act_scale.double(), rotation)
    exact = exact if shift is None else exact + shift.double()
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= 2 * (usual.double() - exact).norm()


def test_the_operators_pass_torchs_own_checks() -> None:
    what = problem(1024, 2048)
    weight, _ = loaded(what)
    codes = random_codes(10, 2048)
    torch.library.opcheck(torch.ops.openpi_duquant.bitblas.default, (codes, weight))
    sums = launch.accumulate(codes, weight)
    operands = (
        torch.rand(10, 1, device=GPU),
        torch.rand(1024, 1, device=GPU),
        codes.sum(1, keepdim=True, dtype=torch.int32),
    )
    for bias, matrices, hadamard in (
        (None, None, 0),
        (torch.rand(1024, device=GPU), torch.rand(64, 16, 16, device=GPU).bfloat16(), 0),
        (None, None, 64),
    ):
        arguments = (sums, *operands, bias, matrices, hadamard, torch.bfloat16)
        torch.library.opcheck(torch.ops.openpi_duquant.epilogue.default, arguments)


def test_streams_that_run_together_do_not_share_anything() -> None:
    what = problem(4096, 1024)
    weight, canonical = loaded(what)
    streams = [torch.cuda.Stream() for _ in range(4)]
    codes = [random_codes(50, 1024) for _ in streams]
    expected = [reference.integer_matmul(part, packing.unpack(canonical)) for part in codes]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[] for _ in streams]
    for _ in range(50):
        for stream, part, kept in zip(streams, codes, results):
            with torch.cuda.stream(stream):
                kept.append(integers(part, weight, what))
    torch.cuda.synchronize()
    for kept, right in zip(results, expected):
        assert all(torch.equal(sums, right) for sums in kept)


SPEC = LayerSpec(
    in_features=1024, out_features=2048, bias=True, weight_bits=4, activation_bits=8, group_size=None,
    pre_rotation=False, permute=True, rotation="hadamard", rotation_block=64, output_rotation="none",
    output_rotation_block=0, group="a",
)  # fmt: skip
SPECS = {
    "default": SPEC,
    "W8": dataclasses.replace(SPEC, weight_bits=8),
    "A16": dataclasses.replace(SPEC, activation_bits=16),
    "padded": dataclasses.replace(SPEC, in_features=4304, out_features=1152, rotation_block=16),
    "restored": dataclasses.replace(
        SPEC, rotation="matrix", rotation_block=16, output_rotation="matrix", output_rotation_block=16, bias=False
    ),
}


def filled(spec: LayerSpec, backend: str) -> QuantLinear:
    """On the CPU."""
    torch.manual_seed(0)
    layer = QuantLinear(spec, backend=backend, dtype=torch.bfloat16)
    for name, buffer in layer.named_buffers():
        if name == "permutation":
            buffer.copy_(torch.randperm(spec.in_features))
        elif name == "weight_packed":
            buffer.copy_(torch.randint(256, buffer.shape, dtype=torch.uint8).view(buffer.dtype))
        else:
            buffer.copy_((torch.rand(buffer.shape) - (0 if name == "weight_scale" else 0.5)) / 100)
    return layer


@pytest.mark.parametrize("m", [1, 50, 127, 968])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_layer_agrees_with_the_reference(spec: LayerSpec, m: int) -> None:
    x = torch.randn(m, spec.in_features, device=GPU, dtype=torch.bfloat16)
    layer, usual = filled(spec, "bitblas").to(GPU), filled(spec, "reference").to(GPU)
    assert layer.running == "bitblas"
    actual, expected = layer(x).double(), usual(x).double()
    assert (actual - expected).norm() <= 4e-3 * expected.norm()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_layer_is_saved_canonically_wherever_it_is(spec: LayerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "AUTO", ("bitblas", "reference"))
    layer = filled(spec, "auto")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, spec.in_features, dtype=torch.bfloat16)
    expected = layer(x)
    layer.to(GPU)
    assert layer.running == "bitblas"
    y = layer(x.to(GPU))
    assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in layer.state_dict().items())
    twin = filled(spec, "auto").to(GPU)
    twin.weight_scale.zero_()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x.to(GPU)), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x.to(GPU)), y)
    layer.cpu()
    assert torch.equal(layer.weight_packed, before["weight_packed"])
    assert torch.equal(layer(x), expected)


def test_a_named_layer_stops_on_the_cpu_and_can_still_be_moved_and_saved() -> None:
    layer = filled(SPEC, "bitblas")
    weight = layer.weight_packed.clone()
    with pytest.raises(DuQuantError, match="CUDA device, not cpu"):
        layer(torch.randn(1, 1024))
    moved = layer.to(GPU).cpu()
    assert torch.equal(moved.state_dict()["weight_packed"], weight)


def test_one_weight_is_kept() -> None:
    loaded(SPEC.problem(torch.bfloat16))
    before = torch.cuda.memory_allocated()
    layer = filled(SPEC, "bitblas").to(GPU)
    tensors = sum(tensor.nbytes for tensor in layer.buffers())
    assert layer.weight_packed.nbytes == 2048 * 512
    assert torch.cuda.memory_allocated() - before <= tensors + 4096


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_compiled_without_a_graph_break() -> None:
    layers = [filled(SPECS[name], "bitblas").to(GPU) for name in ("default", "W8", "restored")]

    def host(x: Tensor) -> list[Tensor]:
        return [layer(x * 2) + 1 for layer in layers]

    x = torch.randn(2, 5, 1024, device=GPU, dtype=torch.bfloat16)
    for compiled, eager in zip(torch.compile(host, fullgraph=True)(x), host(x), strict=True):
        assert (compiled.double() - eager.double()).norm() <= 1e-2 * eager.double().norm()


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_the_profiler_shows_the_kernels_of_bitblas() -> None:
    layer, x = filled(SPEC, "bitblas").to(GPU), torch.randn(10, 1024, device=GPU, dtype=torch.bfloat16)
    layer(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer(x)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert operators.operators(SPEC.problem(torch.bfloat16))[0].name in names
    assert "_epilogue" in names


@pytest.fixture
def exchanged(monkeypatch: pytest.MonkeyPatch) -> Problem:
    """A problem whose kernel for many tokens writes rows of another width."""
    what, other = problem(2048, 1024), problem(256, 1024)
    where = loading.architecture(GPU), loading.driver.version()
    right = loading._load

    def load(operator: operators.Operator, entry: cache.Entry, device: int) -> object:
        if operator == operators.operators(what)[2]:
            operator = operators.operators(other)[2]
            entry = cache.find(operator.name, *where)
        return right(operator, entry, device)

    monkeypatch.setattr(loading, "_load", load)
    monkeypatch.setattr(loading, "KERNELS", fresh := {})
    monkeypatch.setattr(launch, "KERNELS", fresh)
    monkeypatch.setattr(loading, "_faults", {})
    monkeypatch.setattr(kernels, "AUTO", ("bitblas", "reference"))
    return what


def test_a_wrong_kernel_is_found_and_disqualified(exchanged: Problem) -> None:
    with pytest.raises(DuQuantError, match=r"bitblas_w4a8_n2048_.* sums wrongly for 641 tokens on .*please report"):
        kernels.resolve("bitblas", exchanged, GPU)
    assert kernels.resolve("auto", exchanged, GPU) == "reference"
    with mock.patch.object(loading, "self_test", side_effect=AssertionError("tested again")):
        assert kernels.resolve("auto", exchanged, GPU) == "reference"


def test_a_right_kernel_passes_its_test() -> None:
    loaded(problem(256, 2048))
    assert self_test(problem(256, 2048), GPU) is None


def test_kernels_in_the_cache_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "obstacles", lambda: ["nothing is installed"])
    monkeypatch.setattr(loading, "KERNELS", fresh := {})
    monkeypatch.setattr(launch, "KERNELS", fresh)
    assert kernels.resolve("bitblas", problem(2048, 1024), GPU) == "bitblas"
    runs, reasons = loading.can_run(problem(2064, 1024), GPU)
    assert not runs
    assert reasons == ["nothing is installed; openpi-duquant build-kernels on a machine that has it"]
