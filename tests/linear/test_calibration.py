"""quantize_ with calibration: GPTQ, group after group, on what the quantized predecessors feed each."""

from collections.abc import Callable
import copy
import dataclasses
import functools
import logging
from typing import Any

import pytest
import structured
import torch
from torch import Tensor
from torch import nn

from openpi_duquant import gptq
from openpi_duquant import packing
from openpi_duquant import quant
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear import quantize_
from openpi_duquant.linear.calibration import executed_groups
from openpi_duquant.linear.rounding import DAMPENINGS
from openpi_duquant.linear.rounding import InputMoment
from openpi_duquant.linear.rounding import fit_feedback
from openpi_duquant.transforms import Transform

config_of = functools.partial(DuQuantConfig, include=r"_proj$")
BARE = config_of(permute=False, rotation="none", gptq_dampening=0.01)


class Chain(nn.Module):
    """Layers in the reverse of their order in the module, with a nonlinearity between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last_proj, self.middle_proj, self.first_proj = nn.Linear(48, 8), nn.Linear(64, 48), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 32]."""
        return self.last_proj(torch.relu(self.middle_proj(torch.relu(self.first_proj(x)))))


class Crossed(nn.Module):
    """q reads one input, k and v another, as in cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.idle_proj = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, *, context: Tensor) -> Tensor:
        """x [B, 32], context [B, 32]."""
        return self.q_proj(x) + self.k_proj(input=context) * self.v_proj(context)


def inputs(count: int = 40, width: int = 32) -> list[Tensor]:
    torch.manual_seed(1)
    mixing = torch.randn(width, width) * torch.arange(1, width + 1) ** -0.7
    return [torch.randn(16, width) @ mixing for _ in range(count)]


def codes_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer, QuantLinear)
    return packing.unpack(layer.weight_packed)


def test_every_layer_is_calibrated_on_what_its_quantized_predecessors_feed_it() -> None:
    model, batches = Chain(), inputs()
    original = copy.deepcopy(model)
    quantize_(model, BARE, calibration=batches)
    x = torch.cat(batches)
    with torch.no_grad():
        for name in ("first_proj", "middle_proj", "last_proj"):
            weight = original.get_submodule(name).weight
            feedback = gptq.error_feedback(gptq.dampened(x.double().T @ x.double() / len(x), 0.01))
            expected, _ = gptq.fitted_gptq(weight, quant.weight_scale(weight, 4), 4, feedback)
            codes = codes_of(model.get_submodule(name))
            assert (codes == expected).float().mean() > 0.99, name  # moments are summed in another order
            assert not torch.equal(codes, quant.quantize_weight(weight, quant.weight_scale(weight, 4), 4))
            x = torch.relu(model.get_submodule(name)(x))


def test_layers_of_one_group_are_rounded_together_as_each_would_be_alone() -> None:
    model, x = Crossed(), torch.cat(inputs())
    original = copy.deepcopy(model)
    config = dataclasses.replace(BARE, include=r"[qkv]_proj$", layer_bits={"k_proj": 8})
    specs = quantize_(model, config, calibration=lambda model: model(x, context=x))
    assert {spec.group for spec in specs.values()} == {"q_proj"}
    feedback = gptq.error_feedback(gptq.dampened(x.double().T @ x.double() / len(x), 0.01))
    for name, bits in {"q_proj": 4, "k_proj": 8, "v_proj": 4}.items():
        weight, layer = original.get_submodule(name).weight.detach(), model.get_submodule(name)
        expected, scale = gptq.fitted_gptq(weight, quant.weight_scale(weight, bits), bits, feedback)
        assert (codes_of(layer) == expected).float().mean() > 0.97, name  # moments are summed in another order
        assert (layer.weight_scale == scale).float().mean() > 0.9, name


def _by_list(batches: list[Tensor]) -> object:
    return batches


def _by_generator(batches: list[Tensor]) -> object:
    return (batch for batch in batches)


def _by_tuples(batches: list[Tensor]) -> object:
    return [(batch,) for batch in batches]


def _by_keywords(batches: list[Tensor]) -> object:
    return [{"x": batch} for batch in batches]


def _by_function(batches: list[Tensor]) -> object:
    return lambda model: [model(batch) for batch in batches]


@pytest.mark.parametrize("form", [_by_generator, _by_tuples, _by_keywords, _by_function])
def test_calibration_is_inputs_or_what_runs_the_model(form: Callable[[list[Tensor]], object]) -> None:
    first, second = Chain(), Chain()
    quantize_(first, config_of(), calibration=_by_list(inputs()))
    quantize_(second, config_of(), calibration=form(inputs()))
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_tensor_or_a_mapping_alone_is_one_call() -> None:
    states = []
    x = torch.cat(inputs())
    for calibration in ([x], x, {"x": x}):
        model = Chain()
        quantize_(model, config_of(), calibration=calibration)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in state)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "fields",
    [{}, {"rotation": "svd", "row_rotation": "restore"}, {"group_size": 32}, {"weight_bits": 8}],
    ids=["default", "row rotation", "groups", "8 bits"],
)
def test_outputs_of_held_out_inputs_come_closer(fields: dict[str, Any], seed: int) -> None:
    config = config_of(activation_bits=16, **fields)
    original = structured.structured_model(seed, layers=1)
    *batches, held_out = structured.structured_inputs(seed, 33, decay=1.0)
    errors = []
    for calibration in (None, batches):
        model = copy.deepcopy(original)
        quantize_(model, config, calibration=calibration)
        with torch.no_grad():
            errors.append((model(held_out) - original(held_out)).norm())
    assert errors[1] < 0.7 * errors[0]


def test_nearest_does_not_look_at_calibration() -> None:
    model, expected = Chain(), Chain()
    nearest = config_of(weight_rounding="nearest")
    quantize_(model, nearest, calibration=[torch.full((1, 32), torch.nan)])
    quantize_(expected, nearest)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_layers_that_read_different_inputs_are_parted(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(2)
    model = Crossed()
    with caplog.at_level(logging.WARNING):
        specs = quantize_(model, config_of(), calibration=[{"x": torch.randn(9, 32), "context": torch.randn(9, 32)}])
    groups = {name: spec.group for name, spec in specs.items()}
    assert groups == {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "k_proj", "idle_proj": "idle_proj"}
    assert list(groups) == ["q_proj", "k_proj", "v_proj", "idle_proj"]
    assert model.k_proj.permutation is model.v_proj.permutation
    assert [record.message for record in caplog.records] == [
        "idle_proj: not run by the calibration inputs; rounded to nearest"
    ]


def test_groups_come_in_the_order_in_which_they_run() -> None:
    model, x = structured.structured_model(0), structured.structured_inputs(0, 1, decay=1.0)[0]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    order = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
    expected = [[f"{index}.{part}_proj" for part in group] for index in (0, 1) for group in order]
    family = {f"{part}_proj": group[0] for group in order for part in group}
    groups = {name: name[:2] + family[name[2:]] for name in reversed(names)}
    found = executed_groups(model, dict(model.named_modules()), groups, lambda model: (model(x), model(x)))
    assert found == expected


def test_nothing_changes_when_calibration_fails() -> None:
    model, calls = Chain(), []

    def run(model: Chain) -> None:
        calls.append(model.first_proj)
        if len(calls) == 3:
            raise ValueError("no more data")
        model(inputs()[0])

    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="no more data"):
        quantize_(model.train(), config_of(), calibration=run)
    assert [type(layer) for layer in calls] == [nn.Linear, nn.Linear, QuantLinear]
    after = dict(model.named_modules())
    assert all(after[name] is module and module.training for name, module in before.items())
    assert not any(module._forward_pre_hooks for module in after.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_are_refused_and_nothing_replaced(value: float) -> None:
    model, batches = Chain(), inputs()
    batches[7][3, 5] = value
    with pytest.raises(DuQuantError, match=r"^first_proj: .*NaN or Inf"):
        quantize_(model, config_of(), calibration=batches)
    assert isinstance(model.first_proj, nn.Linear)


def test_a_model_in_training_mode_is_calibrated_without_dropout_and_stays_in_it() -> None:
    states = []
    for training in (False, True):
        model = nn.Sequential(nn.Dropout(0.5), Chain()).train(training)
        quantize_(model, config_of(), calibration=inputs())
        assert all(module.training == training for module in model.modules())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "needs calibration data"),
        ([], "holds no inputs"),
        ([{"x": torch.ones(2, 32), "context": torch.ones(2, 32)}], r"^idle_proj: not run"),
    ],
)
def test_gptq_without_data_is_refused(calibration: object, message: str) -> None:
    model = Crossed()
    with pytest.raises(DuQuantError, match=message):
        quantize_(model, config_of(weight_rounding="gptq"), calibration=calibration)
    assert isinstance(model.q_proj, nn.Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (3, 7, 12), (1, 7, 12), (2, 3, 5, 12)])
def test_moments_are_those_of_all_inputs_and_of_every_second_sample(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    calls = [torch.randn(shape).to(dtype) for _ in range(3)]
    moment = InputMoment(12)
    with torch.autocast("cpu", torch.bfloat16):
        for x in calls:
            moment.add(x)
    samples = torch.stack(calls) if len(shape) == 1 else torch.cat(calls)
    parts = samples.double(), samples[::2].double(), samples[1::2].double()
    expected = [part.reshape(-1, 12).T @ part.reshape(-1, 12) / (part.numel() // 12) for part in parts]
    for actual, wanted in zip((moment.whole, *moment.halves), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)
    assert moment.rows == samples.numel() // 12


def test_of_one_sample_there_are_no_halves() -> None:
    moment = InputMoment(4)
    moment.add(torch.ones(1, 3, 4))
    assert moment.halves == []


@pytest.mark.parametrize(("rows", "decay", "expected"), [(64, 0.0, 1.0), (4000, 4.0, 0.01)], ids=["noise", "structure"])
def test_the_dampening_is_the_one_that_serves_the_other_half_best(rows: int, decay: float, expected: float) -> None:
    torch.manual_seed(4)
    moment = InputMoment(128)
    moment.add(torch.randn(rows, 128) * torch.arange(1, 129) ** (-decay / 2) @ torch.linalg.qr(torch.randn(128, 128)).Q)
    chosen, *fixed = (
        fit_feedback(moment, Transform(rotation=64), torch.randn(40, 128), 4, share) for share in (None, *DAMPENINGS)
    )
    matching = [share for share, feedback in zip(DAMPENINGS, fixed) if torch.equal(feedback.factors, chosen.factors)]
    assert matching == [expected]
