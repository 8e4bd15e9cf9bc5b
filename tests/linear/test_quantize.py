"""quantize_ on a small transformer layer of no particular model."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear import quantize_

PARTS = {"q": (64, 64), "k": (16, 64), "v": (16, 64), "o": (64, 64), "gate": (96, 64), "up": (96, 64), "down": (64, 96)}
config_of = functools.partial(DuQuantConfig, include=r"_proj$")  # the default asks for a parent
SVD = config_of(rotation="svd", rotation_block=16, row_rotation="restore")
HADAMARD = config_of(permute=False, rotation_block=16, scale_search="max")
DUQUANT = config_of(rotation="duquant", rotation_block=8)
SHARED = ("permutation", "rotation", "pre_rotation")


def block() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({f"{name}_proj": nn.Linear(k, n) for name, (n, k) in PARTS.items()})


def hadamards(size: int, blocks: int) -> torch.Tensor:
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.block_diag(*[torch.tensor(signs, dtype=torch.float64) * size**-0.5] * blocks)


def one(linear: nn.Linear) -> nn.ModuleDict:
    return nn.ModuleDict({"q_proj": linear})


@pytest.mark.parametrize("config", [config_of(), SVD, DUQUANT], ids=["hadamard", "svd", "duquant"])
def test_siblings_share_their_transforms_and_others_do_not(config: DuQuantConfig) -> None:
    model = nn.ModuleList([block(), block()])
    specs = quantize_(model, config)
    assert list(specs) == [f"{index}.{name}_proj" for index in (0, 1) for name in PARTS]
    for tensor in {"hadamard": SHARED[:1], "svd": SHARED[:2], "duquant": SHARED}[config.rotation]:
        held = [getattr(layer, tensor) for part in model for layer in part.values()]
        leaders = [next(index for index, other in enumerate(held) if other is mine) for mine in held]
        assert leaders == [0, 0, 0, 3, 4, 4, 6, 7, 7, 7, 10, 11, 11, 13]
    groups = [specs[f"1.{name}_proj"].group for name in PARTS]
    assert groups == [f"1.{name}_proj" for name in ("q", "q", "q", "o", "gate", "gate", "down")]


@pytest.mark.parametrize("config", [config_of(), SVD, DUQUANT], ids=["hadamard", "svd", "duquant"])
def test_tensors_lie_as_files_and_kernels_have_them(config: DuQuantConfig) -> None:
    model = block()
    quantize_(model, config)
    assert not [name for name, tensor in model.named_buffers() if not tensor.is_contiguous()]


def test_selected_siblings_share_without_the_others() -> None:
    model = block()
    energy = torch.cat([model["k_proj"].weight, model["v_proj"].weight]).square().sum(0)
    quantize_(model, config_of(exclude=r"q_proj|up_proj"))
    assert isinstance(model["q_proj"], nn.Linear)
    assert model["k_proj"].permutation is model["v_proj"].permutation
    assert model["k_proj"].permutation.tolist() == energy.argsort(descending=True).tolist()
    assert (model["k_proj"].spec.group, model["gate_proj"].spec.group) == ("k_proj", "gate_proj")


@pytest.mark.parametrize(
    ("rotation", "row_rotation"),
    [("none", "0"), ("hadamard", "0"), ("hadamard", "restore"), ("svd", "0"), ("svd", "restore"), ("duquant", "0")],
)
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 16), (8, 8), (4, 16)])
def test_outputs_stay_within_the_quantization_noise(
    weight_bits: int, activation_bits: int, rotation: str, row_rotation: str
) -> None:
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    config = config_of(**bits, rotation=rotation, row_rotation=row_rotation, rotation_block=16)
    model, original = block(), block()
    quantize_(model, config)
    # Rounding to n steps in 4 standard deviations errs by 4 / n / sqrt(12) of the value, each side of the product by
    # itself. No row spans more; uniform weights, unrotated, span 1.7.
    bound = 4 / (2 ** (weight_bits - 1) - 1) / 12**0.5 + (activation_bits == 8) * 4 / 127 / 12**0.5
    for name, layer in model.items():
        x = torch.randn(200, layer.in_features)
        with torch.no_grad():
            exact = original[name](x) - original[name].bias
            error = (layer(x) - original[name](x)).norm() / exact.norm()
        assert bound / 4 < error < bound, name


@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_is_rounding_noise_of_the_rotated_weight(bits: int) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(256, 128, bias=False)
    weight, x = linear.weight.detach().double(), torch.randn(300, 256)
    model = one(linear)
    quantize_(model, dataclasses.replace(HADAMARD, weight_bits=bits, activation_bits=16))
    step = (weight @ hadamards(16, 16)).abs().amax(1) / (2 ** (bits - 1) - 1)
    error = model["q_proj"](x).double() - x.double() @ weight.T
    in_steps = error / (x.double().norm(dim=1, keepdim=True) * step)
    assert in_steps.square().mean().sqrt().item() == pytest.approx(12**-0.5, rel=0.05)


@pytest.mark.parametrize("search", ["mse", "max"])
@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_are_kept_exactly(bits: int, group_size: int | None, search: str, *, permute: bool) -> None:
    torch.manual_seed(2)
    largest = 2 ** (bits - 1) - 1
    codes = torch.randint(-largest, largest + 1, (12, 32)).float()
    codes[:, ::8] = largest  # one such channel in every group, permuted or not
    exponents = torch.randint(-2, 3, (12, 1 if permute or not group_size else 4))
    linear = nn.Linear(32, 12)
    with torch.no_grad():
        linear.weight.copy_(codes * 2.0 ** exponents.repeat_interleave(32 // exponents.shape[1], dim=1))
        linear.bias.zero_()
    x = torch.randint(-50, 51, (7, 32)).float()
    expected, model = linear(x), one(linear)
    bare = config_of(activation_bits=16, rotation="none", rotation_block=8, weight_bits=bits, group_size=group_size)
    quantize_(model, dataclasses.replace(bare, permute=permute, scale_search=search))
    assert torch.equal(model["q_proj"](x), expected)
    assert ("permutation" in model["q_proj"].state_dict()) == permute


def test_singular_rotations_leave_orthogonal_rows_and_columns_strongest_first() -> None:
    model = one(block()["down_proj"])
    quantize_(model, dataclasses.replace(SVD, weight_bits=8))
    weight = model["q_proj"].weight_packed * model["q_proj"].weight_scale
    for vectors in (*weight.split(16, dim=0), *weight.T.split(16, dim=0)):
        gram = vectors @ vectors.T
        assert (gram - gram.diag().diag()).abs().max() < 0.02 * gram.diag().max()
        assert (gram.diag().diff() < 0).all()


def test_single_layers_take_their_own_bits() -> None:
    model = block()
    quantize_(model, config_of(layer_bits={"k_proj": 8}))
    stored = {name: layer.weight_packed.dtype for name, layer in model.items()}
    assert stored == dict.fromkeys(model, torch.uint8) | {"k_proj": torch.int8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_keeps_dtype_bias_and_mode(dtype: torch.dtype) -> None:
    linear = nn.Linear(64, 8).to(dtype).eval()
    model = one(linear)
    quantize_(model, config_of())
    layer = model["q_proj"]
    assert torch.equal(layer.bias, linear.bias)
    assert (layer.weight.dtype, layer.bias.dtype, layer.training) == (dtype, dtype, False)
    assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    assert not list(model.parameters())


@pytest.mark.parametrize("inside", [True, False], ids=["one parent", "two parents"])
def test_a_layer_under_two_names_is_replaced_under_both(*, inside: bool) -> None:
    model = nn.ModuleDict({"a": block(), "b": nn.ModuleDict()})
    alias = model["a"] if inside else model["b"]
    alias["tied"] = model["a"]["q_proj"]
    quantize_(model, config_of())
    assert isinstance(alias["tied"], QuantLinear)
    assert alias["tied"] is model["a"]["q_proj"]


def test_siblings_of_different_inputs_do_not_share() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 32), "k_proj": nn.Linear(48, 32), "v_proj": nn.Linear(48, 32)})
    quantize_(model, config_of())
    assert model["k_proj"].permutation is model["v_proj"].permutation
    assert model["q_proj"].spec.group != model["k_proj"].spec.group


@pytest.mark.parametrize(
    ("width", "bits", "expected"), [(96, 4, 32), (64, 4, 64), (24, 4, 8), (6, 4, 2), (27, 8, 0), (1, 8, 0)]
)
def test_a_block_that_does_not_fit_takes_the_common_divisor(width: int, bits: int, expected: int) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(width, 40)
    model, x = one(linear), torch.randn(50, width)
    spec = quantize_(model, config_of(weight_bits=bits, row_rotation="restore"))["q_proj"]
    assert (spec.rotation_block, spec.rotation) == (expected, "hadamard" if expected else "none")
    assert spec.output_rotation_block == 8
    assert (model["q_proj"](x) - linear(x)).norm() < 0.3 * linear(x).norm()


@pytest.mark.parametrize(
    ("width", "config", "message"),
    [
        (27, config_of(), r"q_proj: in_features 27 is odd"),
        (64, config_of(group_size=48), r"q_proj.*64.*48"),
        (64, config_of(row_rotation="propagate"), r"^row_rotation: 'propagate'"),
    ],
)
def test_what_cannot_be_quantized_is_refused(width: int, config: DuQuantConfig, message: str) -> None:
    model = one(nn.Linear(width, 8))
    with pytest.raises(DuQuantError, match=message):
        quantize_(model, config)
    assert isinstance(model["q_proj"], nn.Linear)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_replaced(value: float) -> None:
    model = block()
    with torch.no_grad():
        model["up_proj"].weight[3, 5] = value
    with pytest.raises(DuQuantError, match=r"^up_proj: .*NaN or Inf"):
        quantize_(model, config_of())
    assert all(isinstance(layer, nn.Linear) for layer in model.values())


def test_a_bare_linear_is_refused() -> None:
    with pytest.raises(DuQuantError, match=r"itself an nn\.Linear"):
        quantize_(nn.Linear(64, 32), config_of(include=""))


def test_names_need_no_parent() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 32), "other": nn.Linear(64, 32)})
    assert list(quantize_(model, DuQuantConfig())) == ["q_proj"]


def test_a_linear_whose_weight_its_host_reads_is_refused() -> None:
    model = nn.MultiheadAttention(64, 4)
    with pytest.raises(DuQuantError, match=r"out_proj: is a NonDynamicallyQuantizableLinear"):
        quantize_(model, config_of(include="out_proj"))
    assert isinstance(model.out_proj, nn.Linear)
