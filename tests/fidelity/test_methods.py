"""The table of methods: which layers, on which inputs, and the figures themselves."""

import pathlib

import pytest
import torch
from torch import Tensor

from openpi_duquant import DuQuantConfig
from openpi_duquant import load_policy
from openpi_duquant import quantize_
from openpi_duquant import synthetic
from openpi_duquant.fidelity import methods
from openpi_duquant.quant import fake_quantize_activation

EXPERT_Q = "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj"


def test_groups_are_spread_over_the_layers_that_are_narrow_enough(source: pathlib.Path) -> None:
    policy = load_policy(source, optimize=False)
    everything = methods.choose_groups(policy, 100, 10_000)
    names = [name for group in everything for name in group.weights]
    assert len(names) == len(set(names)) == 7 + 2 + 14  # of the last language layer, keys and values only
    assert not any("vision" in name for name in names)
    chosen = methods.choose_groups(policy, 4, 10_000)
    assert [list(group.weights) for group in (chosen[0], chosen[-1])] == [
        list(group.weights) for group in (everything[0], everything[-1])
    ]
    assert len(chosen) == 4
    narrow = methods.choose_groups(policy, 100, 128)
    assert {weight.shape[1] for group in narrow for weight in group.weights.values()} == {64, 128}
    assert methods.choose_groups(policy, 100, 8) == []


def rows_kept(source: pathlib.Path, rows: int) -> tuple[list[methods.Group], list[Tensor]]:
    """Groups after two observations, and what the expert's q reads in them."""
    policy = load_policy(source, dtype=torch.float32, optimize=False)
    groups = methods.choose_groups(policy, 100, 10_000)
    seen: list[Tensor] = []
    policy.get_submodule(EXPERT_Q).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with methods.collecting(policy, groups, "held_out", rows, num_steps=2) as begin:
        for seed in (0, 1):
            begin()
            policy.sample_actions(*synthetic.libero_like_observation(policy.architecture, seed=seed), num_steps=2)
    policy.sample_actions(*synthetic.libero_like_observation(policy.architecture, seed=2), num_steps=2)
    assert len(seen) == 6
    return groups, seen[:4]


def test_inputs_are_taken_evenly_from_steps_and_tokens(source: pathlib.Path) -> None:
    groups, seen = rows_kept(source, 8)
    group = next(group for group in groups if EXPERT_Q in group.weights)
    places = torch.linspace(0, 9, 4).round().long()
    assert torch.equal(
        torch.stack(group.held_out), torch.stack([torch.cat((a[places], b[places])) for a, b in (seen[:2], seen[2:])])
    )
    assert group.calibration == []
    assert all(len(part) == 8 for group in groups for part in group.held_out)


@pytest.fixture(scope="module")
def group() -> methods.Group:
    """Two layers of one group, and inputs of four observations."""
    torch.manual_seed(0)
    gains = 1 + 9 * (torch.arange(128) % 50 == 7)
    samples = list(torch.randn(4, 300, 128) @ torch.randn(128, 128) * gains)
    names = [f"a.{name}_proj" for name in ("gate", "up")]
    return methods.Group({name: torch.randn(40, 128) for name in names}, samples[:3], samples[3:])


def test_round_to_nearest_is_as_computed(group: methods.Group) -> None:
    found = methods.errors_by_method(group, "cpu")["rtn"]
    (x,) = group.held_out
    for name, weight in group.weights.items():
        scale = weight.abs().amax(1, keepdim=True) / 7
        actual = fake_quantize_activation(x) @ ((weight / scale).round() * scale).T
        expected = x @ weight.T
        assert found[name] == pytest.approx(((actual - expected).norm() / expected.norm()).item(), rel=1e-5)


def test_ours_is_what_quantize_makes(group: methods.Group) -> None:
    found = methods.errors_by_method(group, "cpu")
    assert list(found) == list(methods.METHODS)
    (x,) = group.held_out

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.ModuleDict({name[2:]: torch.nn.Linear(128, 40, bias=False) for name in group.weights})
            for name, weight in group.weights.items():
                self.a[name[2:]].weight = torch.nn.Parameter(weight)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.a.values()]

    for method, calibration in (
        ("default, not calibrated", None),
        ("default, calibrated", [x[None] for x in group.calibration]),
    ):
        model = Model()
        expected = model(x)
        quantize_(model, DuQuantConfig(), backend="fake", calibration=calibration)
        for name, actual, wanted in zip(group.weights, model(x), expected):
            error = ((actual - wanted).norm() / wanted.norm()).item()
            assert found[method][name] == pytest.approx(error, rel=1e-3)


def test_the_table_compares_a_checkpoint_with_rtn_on_the_layers_that_both_have() -> None:
    language, expert = (
        f"paligemma_with_expert.{name}.layers.0.mlp.up_proj"
        for name in ("paligemma.model.language_model", "gemma_expert.model")
    )
    errors = {"rtn": {language: 0.2, expert: 0.4}, "better": {language: 0.1, expert: 0.1}}
    table = methods.method_table(errors, {"mine": {expert: 0.2, "another": 5.0}, "none": {"another": 1.0}})
    assert [row["method"] for row in table] == ["rtn", "checkpoint mine", "better"]
    rtn, mine, better = table
    assert (rtn["of_rtn"], mine["of_rtn"], better["of_rtn"]) == pytest.approx((1, 0.5, 1 / 3))
    assert (mine["layers"], mine["language"], mine["expert"]) == (1, None, 0.2)
    assert better["sqnr_db"] == pytest.approx(20)
