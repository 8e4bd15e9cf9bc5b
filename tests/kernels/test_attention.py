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


def case(
    given: dict[str, bool], length: int, keys: int, heads: int = 8, size: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, object]:
    """Queries, keys, values, their mask, and own ones; queries and own ones are views of one tensor."""
    qkv = random(2, length, heads + 2, size)
    visible = torch.rand(2, keys, device=DEVICE) < 0.6
    visible[0], visible[1, 0] = True, True
    own = (qkv[:, :, -2], qkv[:, :, -1]) if given["own"] else None
    q, k, v = qkv[:, :, :-2], random(2, keys, size), random(2, keys, size)
    return q, k, v, visible if given["visible"] else None, own


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


def rounded_by_hand(y: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, before they are rounded, and scales of rows of the output type, in fp64."""
    scale = y.double().abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1, scale)
    return y.double() / scale, scale


@pytest.mark.triton
@pytest.mark.parametrize("given", CASES)
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize(("length", "keys", "heads", "size"), [(1, 1, 8, 16), (5, 70, 3, 16), (3, 13, 8, 32)])
def test_the_quantizing_kernel_is_the_formula(
    given: dict[str, bool], length: int, keys: int, heads: int, size: int, splits: int
) -> None:
    torch.manual_seed(3)
    q, k, v, visible, own = case(given, length, keys, heads, size)
    codes, act_scale, row_sum = quantized(q, k, v, visible, own, splits, state_first=given["state_first"])
    y = attended_by_hand(q, k, v, visible, own, state_first=given["state_first"]).flatten(0, 1)
    exact, scale = rounded_by_hand(y.to(DTYPE))
    assert ((act_scale.double() - scale).abs() < TOLERANCE * scale).all()
    assert (codes.double() - exact).abs().max() < 0.5 + 254 * TOLERANCE
    assert torch.equal(codes.abs().amax(1), torch.full_like(codes[:, 0], 127))
    assert torch.equal(row_sum, codes.sum(1, keepdim=True, dtype=torch.int32))


def quantized(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, own: object, splits: int, *, state_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernels, into poisoned outputs."""
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415

    outputs = tuple(part.fill_(-77) for part in attention._attend_quantized_fake(q))
    attention_triton.launch_attend_quantized(
        outputs, q, k, v, visible, *(own or (None, None)), state_first=state_first, exact=not GPU,
        shape=attention_triton.Shape(16, 16, splits, 4),
    )  # fmt: skip
    return outputs


@pytest.mark.triton
@pytest.mark.parametrize("splits", [1, 2])
def test_the_quantizing_kernel_rounds_what_attention_gives(splits: int) -> None:
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415

    torch.manual_seed(4)
    dtype = DTYPE if GPU else torch.float16
    q, k, v, visible, own = case({"own": True, "visible": True, "state_first": False}, 3, 37)
    q, k, v, own = q.to(dtype), k.to(dtype), v.to(dtype), tuple(part.to(dtype) for part in own)
    out, shape = q.new_empty(q.shape), attention_triton.Shape(16, 16, splits, 4)
    attention_triton.launch_attend(out, q, k, v, visible, *own, state_first=False, exact=not GPU, shape=shape)
    exact, scale = rounded_by_hand(out.flatten(0, 1).flatten(1))
    codes, act_scale, row_sum = quantized(q, k, v, visible, own, splits, state_first=False)
    torch.testing.assert_close(act_scale.double(), scale, rtol=1e-6, atol=0)
    error = (codes.double() - exact).abs()
    assert error.max() <= 1.5
    assert (error > 0.5 + 1e-4).count_nonzero() <= max(1, 1e-3 * error.numel())  # ties, of which bf16 has many, are not
    assert torch.equal(row_sum, codes.sum(1, keepdim=True, dtype=torch.int32))


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's
@pytest.mark.parametrize("splits", [1, 2])
def test_not_a_number_is_seen_in_its_token_alone_and_zeros_are_zeros(splits: int) -> None:
    q, k, v = random(2, 3, 8, 16), random(2, 37, 16), random(2, 37, 16)
    q[0, 1, 2, 3], v[1] = torch.nan, 0
    codes, act_scale, row_sum = quantized(q, k, v, None, None, splits, state_first=False)
    assert act_scale[:3].isnan().flatten().tolist() == [False, True, False]
    assert (act_scale[3:] == 1).all()
    assert not codes[3:].any()
    assert not row_sum[3:].any()


@pytest.mark.triton
def test_parts_of_the_keys_with_very_unequal_scores_are_put_together() -> None:
    torch.manual_seed(5)
    q, k, v = random(1, 3, 8, 16), random(1, 64, 16), random(1, 64, 16)
    k[:, :16] *= 1000
    y = attended_by_hand(q, k, v, None, None, state_first=False).flatten(0, 1)
    codes, act_scale, _ = quantized(q, k, v, None, None, 4, state_first=False)
    assert (codes * act_scale.double() - y).abs().max() < 2 * act_scale.max()


def test_without_a_gpu_quantized_attention_is_its_definition() -> None:
    q, k, v, visible, own = case({"own": True, "visible": True, "state_first": True}, 3, 13)
    expected = attention.attend(q, k, v, visible, own, state_first=True).flatten(0, 1)
    codes, act_scale, row_sum = attention.attend_quantized(q, k, v, visible, own, state_first=True)
    exact, scale = rounded_by_hand(expected)
    assert (codes.double() - exact).abs().max() < 0.5 + 254 * TOLERANCE
    assert ((act_scale.double() - scale).abs() < TOLERANCE * scale).all()
    assert torch.equal(row_sum, codes.sum(1, keepdim=True, dtype=torch.int32))


@pytest.mark.triton
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("shared_memory", "limit"), [(232_448, 232_448), (101_376, 101_376)])
def test_a_shape_fits_into_shared_memory(shared_memory: int, limit: int, *, exact: bool) -> None:
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415

    bytes_per_value = 4 if exact else 2
    for rows, keys in ((80, 544), (400, 968), (1024, 128), (4352, 544), (7744, 968)):
        for processors in (78, 132):
            given = {"exact": exact, "shared_memory": shared_memory, "processors": processors}
            shape = attention_triton.shape_for(rows, keys, **given)
            tiles = (shape.rows + 2 * shape.keys) * 256 * bytes_per_value  # queries, keys and values; heads of 256
            assert tiles < limit
            assert (shape.splits - 1) * 64 <= keys + 63  # and a part for own keys


@pytest.mark.triton
@pytest.mark.parametrize(
    ("tokens", "batch", "shared_memory", "splits"),
    [(544, 1, 232_448, 3), (968, 1, 232_448, 2), (288, 1, 232_448, 4), (544, 8, 232_448, 1), (288, 1, 101_376, 3)],
)
def test_keys_are_shared_out_as_long_as_all_programs_run_at_a_time(
    tokens: int, batch: int, shared_memory: int, splits: int
) -> None:
    from openpi_duquant.kernels import attention_triton  # noqa: PLC0415

    room = {"shared_memory": shared_memory, "processors": 132}
    shape = attention_triton.shape_for(8 * tokens, tokens, exact=False, batch=batch, **room)
    assert shape.splits == splits
    if splits > 1:
        programs = -(-8 * tokens // shape.rows) * batch * splits
        of_a_program = (shape.rows + 4 * shape.keys) * 256 * 2  # keys and values twice: two steps are under way
        assert programs <= 132 * (shared_memory // of_a_program)
