"""The vision tower against its formulas, in torch's own layers, and its launches counted."""

import math

import pytest
import torch
from torch import Tensor
from torch import nn
import torch.nn.functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from openpi_duquant.architecture import TransformerSize
from openpi_duquant.engine import siglip

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZE = TransformerSize(width=144, depth=3, mlp_dim=88, num_heads=2, head_dim=72)


def tower(*, optimized: bool, dtype: torch.dtype = torch.float32) -> siglip.VisionModel:
    """With random weights, norms and biases among them; patches and positions stay in fp32."""
    torch.manual_seed(0)
    model = siglip.VisionModel(SIZE).requires_grad_(requires_grad=False)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.1, mean="norm" in name and "weight" in name)
    for part in (model.encoder, model.post_layernorm):
        part.to(dtype)
    for module in model.modules() if optimized else ():
        if module is not model and hasattr(module, "optimize_"):
            module.optimize_()
    return model.to(DEVICE)


def by_hand(model: siglip.VisionModel, images: Tensor) -> Tensor:
    """In fp64; `model` is not optimized."""
    weights = {name: parameter.double() for name, parameter in model.named_parameters()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    embedding = "embeddings.patch_embedding"
    patches = F.conv2d(images.double(), weights[f"{embedding}.weight"], weights[f"{embedding}.bias"], stride=14)
    x = patches.flatten(2).mT + weights["embeddings.position_embedding.weight"]
    for index in range(SIZE.depth):
        layer = f"encoder.layers.{index}"
        y = norm(x, f"{layer}.layer_norm1")
        q, k, v = (linear(y, f"{layer}.self_attn.{name}_proj").split(72, dim=-1) for name in "qkv")
        heads = [(a @ b.mT / math.sqrt(72)).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
        x = x + linear(torch.cat(heads, dim=-1), f"{layer}.self_attn.out_proj")
        y = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        gelu = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(gelu, f"{layer}.mlp.fc2")
    return norm(x, "post_layernorm")


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 224, 224, device=DEVICE) * 2 - 1


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_features_are_the_formulas(count: int, *, optimized: bool) -> None:
    given = images(count)
    expected = by_hand(tower(optimized=False), given)
    actual = tower(optimized=optimized)(given, torch.float32)
    assert (actual.double() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("optimized", [False, True])
def test_bytes_are_values_between_ends(*, optimized: bool) -> None:
    given = torch.randint(256, (2, 224, 224, 3), dtype=torch.uint8, device=DEVICE)
    expected = by_hand(tower(optimized=False), given.movedim(3, 1).double() / 255 * 2 - 1)
    actual = tower(optimized=optimized)(given, torch.float32)
    assert (actual.double() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("optimized", [False, True])
def test_in_16_bits_they_are_close(*, optimized: bool) -> None:
    given = images(2)
    plain = tower(optimized=False, dtype=torch.bfloat16)
    actual = tower(optimized=optimized, dtype=torch.bfloat16)(given, torch.bfloat16)
    assert actual.dtype == torch.bfloat16
    expected = by_hand(plain, given)
    assert (actual.double() - expected).norm() < 0.03 * expected.norm()


def test_patches_are_the_convolutions_whatever_the_host_allows() -> None:
    torch.manual_seed(1)
    layer = siglip.PatchEmbedding(3, 144, 14, stride=14).requires_grad_(requires_grad=False).to(DEVICE)
    given = images(2)
    expected = nn.functional.conv2d(given.double(), layer.weight.double(), layer.bias.double(), stride=14)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = layer(given)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.flatten(2).mT, rtol=1e-5, atol=1e-5)


class Counted(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        self.names.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimized", [False, True])
def test_a_layer_copies_nothing(*, optimized: bool) -> None:
    dtype = torch.bfloat16 if GPU else torch.float32
    layer = tower(optimized=optimized, dtype=dtype).encoder["layers"][0]
    x = torch.randn(2, 256, 144, device=DEVICE).to(dtype)
    with Counted() as counted:
        layer(x, siglip.Delta(x, None))
    assert "addmm" in counted.names
    assert not {"clone", "copy_", "_to_copy", "cat"} & set(counted.names)
    assert not (GPU and {"add", "native_layer_norm"} & set(counted.names))
    assert ("gelu" in counted.names) != (GPU and optimized)
