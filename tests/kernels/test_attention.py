"""Attention against a walk through the formula in fp64; without a GPU, in the interpreter."""

import math

import pytest
import torch
from torch import Tensor

from openpi_duquant.kernels import attention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
TOLERANCE = 1e-2 if GPU else 1e-5


def attended_by_hand(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, own: tuple[Tensor, Tensor] | None, *, state_first: bool
) -> Tensor:
    """One query and one head at a time."""
    batch, length, heads, size = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for b in range(batch):
        for s in range(length):
            seen = range(k.shape[1]) if visible is None else visible[b].nonzero().flatten().tolist()
            keys, values = list(k[b, list(seen)].double()), list(v[b, list(seen)].double())
            if own is not None:
                last = 1 if state_first and s == 0 else length
                keys, values = keys + list(own[0][b, :last].double()), values + list(own[1][b, :last].double())
            for h in range(heads):
                scores = torch.stack([q[b, s, h].double() @ key / math.sqrt(size) for key in keys])
                weights = scores.softmax(0)
                out[b, s, h] = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return out.flatten(2)


def random(*shape: int) -> Tensor:
    """Standard normal."""
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


CASES = [
    pytest.param({"own": False, "visible": False, "state_first": False}, id="all"),
    pytest.param({"own": False, "visible": True, "state_first": False}, id="masked"),
    pytest.param({"own": True, "visible": False, "state_first": False}, id="own"),
    pytest.param({"own": True, "visible": True, "state_first": False}, id="own masked"),
    pytest.param({"own": True, "visible": True, "state_first": True}, id="state"),
    pytest.param({"own": True, "visible": False, "state_first": True}, id="state unmasked"),
]


def case(given: dict[str, bool], length: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, object]:
    """Queries with room between them, keys, values, their mask, and own ones: a view of a larger tensor."""
    q = random(2, length, 9, 16)[:, :, :8]
    visible = torch.rand(2, keys, device=DEVICE) < 0.6
    visible[0], visible[1, 0] = True, True
    own = (random(2, length, 9, 16)[:, :, 8], random(2, length, 16)) if given["own"] else None
    return q, random(2, keys, 16), random(2, keys, 16), visible if given["visible"] else None, own


@pytest.mark.parametrize("given", CASES)
def test_attention_is_the_formula(given: dict[str, bool]) -> None:
    torch.manual_seed(1)
    q, k, v, visible, own = case(given, 5, 13)
    expected = attended_by_hand(q, k, v, visible, own, state_first=given["state_first"])
    actual = attention.attend(q, k, v, visible, own, state_first=given["state_first"])
    assert (actual.double() - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.triton
@pytest.mark.parametrize("given", CASES)
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (5, 70), (35, 13)])
def test_the_attention_kernel_is_the_formula(given: dict[str, bool], length: int, keys: int, splits: int) -> None:
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415

    torch.manual_seed(2)
    q, k, v, visible, own = case(given, length, keys)
    out = torch.full((2, length, 8, 16), torch.nan, device=DEVICE, dtype=DTYPE)
    state_first, (own_k, own_v) = given["state_first"], own or (None, None)
    attention_triton.launch_attend(
        out, q, k, v, visible, own_k, own_v, state_first=state_first, exact=not GPU,
        shape=attention_triton.Shape(16, 16, splits, 4),
    )  # fmt: skip
    expected = attended_by_hand(q, k, v, visible, own, state_first=state_first)
    assert (out.flatten(2).double() - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.triton
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("shared_memory", "limit"), [(232_448, 232_448), (101_376, 101_376)])
def test_a_shape_fits_into_shared_memory(shared_memory: int, limit: int, *, exact: bool) -> None:
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415

    bytes_per_value = 4 if exact else 2
    for rows, keys in ((80, 544), (400, 968), (4352, 544), (7744, 968)):
        shape = attention_triton.shape_for(rows, keys, exact=exact, shared_memory=shared_memory)
        tiles = (shape.rows + 2 * shape.keys) * 256 * bytes_per_value  # queries, keys and values; heads of 256
        assert tiles < limit
        assert shape.splits * 64 <= keys + 63
