"""The policies: what moves their actions and what cannot. Equality with openpi's is tested in tests/with_openpi."""

from collections.abc import Callable
import copy
import dataclasses

import interpreted
import pytest
from tiny import TINY
from tiny import random_state
import torch
from torch import Tensor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from openpi_duquant import synthetic
from openpi_duquant.accuracy import relative_error
from openpi_duquant.architecture import EXPERT_LM_HEAD
from openpi_duquant.architecture import LANGUAGE_MODEL
from openpi_duquant.architecture import PI05
from openpi_duquant.architecture import SMALL
from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import parameter_shapes
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine import Observation
from openpi_duquant.engine import Policy
from openpi_duquant.engine import assemble
from openpi_duquant.engine import build_policy
from openpi_duquant.engine import preprocess
from openpi_duquant.engine.graphs import padded
from openpi_duquant.engine.observation import prepare_image
from openpi_duquant.kernels import denoising
from openpi_duquant.kernels.reference import Prologue


@pytest.fixture(scope="module", params=[True, False], ids=["pi05", "pi0"])
def policy(request: pytest.FixtureRequest) -> Policy:
    """A tiny policy of both kinds, fp32."""
    architecture = dataclasses.replace(TINY, pi05=request.param)
    return assemble(architecture, random_state(architecture), {}, backend="auto", dtype=torch.float32)


def observe(seed: int = 0, prompt_tokens: int = 6) -> tuple[Observation, Tensor]:
    """An observation and noise that suit the tiny policy."""
    return synthetic.libero_like_observation(TINY, seed=seed, prompt_tokens=prompt_tokens)


def joined(first: Observation, second: Observation) -> Observation:
    """A batch of two."""
    masks = {name: torch.cat((mask, second.image_masks[name])) for name, mask in first.image_masks.items()}
    return Observation(
        {name: torch.cat((image, second.images[name])) for name, image in first.images.items()},
        masks,
        torch.cat((first.tokenized_prompt, second.tokenized_prompt)),
        torch.cat((first.tokenized_prompt_mask, second.tokenized_prompt_mask)),
        torch.cat((first.state, second.state)),
    )


def test_a_batch_gives_what_its_members_give_alone(policy: Policy) -> None:
    (first, noise), (second, other) = observe(0, prompt_tokens=3), observe(1, prompt_tokens=9)
    both = policy.sample_actions(joined(first, second), torch.cat((noise, other)))
    alone = torch.cat((policy.sample_actions(first, noise), policy.sample_actions(second, other)))
    assert relative_error(both, alone) < 1e-5


def test_masked_pixels_and_prompt_padding_do_not_matter(policy: Policy) -> None:
    observation, noise = observe()
    images = dict(observation.images) | {"right_wrist_0_rgb": 255 - observation.images["right_wrist_0_rgb"]}
    tokens = torch.where(observation.tokenized_prompt_mask, observation.tokenized_prompt, 5)
    changed = dataclasses.replace(observation, images=images, tokenized_prompt=tokens)
    assert torch.equal(policy.sample_actions(changed, noise), policy.sample_actions(observation, noise))


def test_bytes_are_seen_as_the_floats_they_stand_for(policy: Policy) -> None:
    observation, noise = observe()
    floats = {name: prepare_image(name, image) for name, image in observation.images.items()}
    prepared = dataclasses.replace(observation, images=floats)
    assert torch.equal(policy.sample_actions(observation, noise), policy.sample_actions(prepared, noise))


class Operators(TorchDispatchMode):
    """Names of torch's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Notes it and runs it."""
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_host_wakes_no_threads(policy: Policy) -> None:
    """For a call as robots make it, before it is computed: torch's operators would share their work out."""
    observation, noise = observe()
    images = {name: image.contiguous() for name, image in observation.images.items()}
    observation = dataclasses.replace(observation, images=images)
    with Operators() as operators:
        policy.inputs(padded(preprocess(observation, policy.device)), None, noise)
    assert operators.names <= {"empty", "view", "detach", "lift_fresh"}


@pytest.mark.parametrize("what", ["image", "prompt", "noise", "state"])
def test_what_is_seen_matters(policy: Policy, what: str) -> None:
    observation, noise = observe()
    other, other_noise = observe(seed=1)
    changed = {
        "image": lambda: dataclasses.replace(observation, images=other.images),
        "prompt": lambda: dataclasses.replace(observation, tokenized_prompt=other.tokenized_prompt),
        "state": lambda: dataclasses.replace(observation, state=other.state),
        "noise": lambda: observation,
    }[what]()
    before = policy.sample_actions(observation, noise)
    after = policy.sample_actions(changed, other_noise if what == "noise" else noise)
    unread = what == "state" and policy.architecture.pi05
    assert torch.equal(before, after) == unread


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_a_constant_velocity_is_integrated_from_one_to_zero(policy: Policy, num_steps: int) -> None:
    observation, noise = observe()
    head = policy.action_out_proj
    weight, bias = head.weight.clone(), head.bias.clone()
    try:
        head.weight.zero_()
        head.bias.copy_(torch.linspace(-1, 1, 32))
        actions = policy.sample_actions(observation, noise, num_steps=num_steps)
    finally:
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    torch.testing.assert_close(actions, noise - torch.linspace(-1, 1, 32))


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
def test_an_optimized_step_begins_and_ends_in_a_kernel_each(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the definitions call the operators themselves; here they run in the interpreter."""
    (first, noise), (second, other) = observe(0), observe(1)
    given = joined(first, second), torch.cat((noise, other))
    expected = policy.sample_actions(*given, num_steps=3)
    optimized, called = copy.deepcopy(policy), []
    optimized.optimize_()

    def embed_actions(*operands: object) -> Tensor:
        called.append("embed")
        return interpreted._embed_actions(*operands)

    def euler_step(x: Tensor, norm: Prologue, *operands: object) -> Tensor:
        called.append("step")
        return interpreted._euler_step(x, norm.scale, norm.shift, *operands)

    for run in (embed_actions, euler_step):
        monkeypatch.setattr(denoising, run.__name__, run)
    actual = optimized.sample_actions(*given, num_steps=3)
    assert called == (["embed", "step"] if policy.architecture.pi05 else ["step"]) * 3
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("name", ["action_in_proj", "action_out_proj"])
def test_heads_that_are_more_than_a_matrix_are_called(policy: Policy, name: str) -> None:
    """Quantized ones, say."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    observation, noise = observe()
    optimized = copy.deepcopy(policy)
    optimized.optimize_()
    before = optimized.sample_actions(observation, noise)
    optimized.get_submodule(name).__class__ = Doubled
    assert relative_error(optimized.sample_actions(observation, noise), before) > 1e-2


def test_the_engine_leaves_out_only_what_nothing_reads() -> None:
    with torch.device("meta"):
        held = set(build_policy(PI05).state_dict())
    last = LANGUAGE_MODEL + "layers.17."
    unread = {last + f"self_attn.{name}.weight" for name in ("q_proj", "o_proj")}
    unread |= {last + f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    unread |= {last + "post_attention_layernorm.weight", LANGUAGE_MODEL + "norm.weight"}
    assert set(parameter_shapes(PI05)) - held == unread
    assert EXPERT_LM_HEAD not in held


def test_pi0_needs_a_state() -> None:
    architecture = dataclasses.replace(TINY, pi05=False)
    policy = assemble(architecture, random_state(architecture), {}, backend="auto", dtype=torch.float32)
    observation, noise = observe()
    for state, shape in ((None, "None"), (torch.zeros(1, 8), r"\(1, 8\)")):
        with pytest.raises(DuQuantError, match=rf"state: pi0 reads \[1, 32\], got {shape}"):
            policy.sample_actions(dataclasses.replace(observation, state=state), noise)
    state = torch.ones(1, 32)
    read = policy.read_state(state, 1)
    state.zero_()
    assert read.sum() == 32


@pytest.mark.parametrize("pi05", [True, False])
def test_an_architecture_is_inferred_from_shapes(*, pi05: bool) -> None:
    for architecture in (PI05, SMALL, TINY):
        expected = dataclasses.replace(architecture, pi05=pi05)
        assert Architecture.infer(synthetic.checkpoint_shapes(expected)) == expected


@pytest.mark.parametrize(
    ("shape", "num_steps"), [((2, 10, 32), 10), ((1, 10, 7), 10), ((10, 32), 10), ((1, 10, 32), 0), ((1, 10, 32), -3)]
)
def test_noise_that_does_not_fit_is_refused(policy: Policy, shape: tuple[int, ...], num_steps: int) -> None:
    observation, _ = observe()
    with pytest.raises(DuQuantError, match=r"noise .* must be \(1, "):
        policy.sample_actions(observation, torch.zeros(shape), num_steps=num_steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_masks_of_another_dtype_mean_the_same(policy: Policy, dtype: torch.dtype) -> None:
    (first, noise), (second, _) = observe(0, prompt_tokens=3), observe(1, prompt_tokens=9)
    both, noise = joined(first, second), noise.repeat(2, 1, 1)
    image_masks = {name: mask.to(dtype) for name, mask in both.image_masks.items()}
    prompt_mask = both.tokenized_prompt_mask.to(dtype)
    changed = dataclasses.replace(both, image_masks=image_masks, tokenized_prompt_mask=prompt_mask)
    assert torch.equal(policy.sample_actions(changed, noise), policy.sample_actions(both, noise))


def test_new_weights_act_at_once() -> None:
    first, second = random_state(TINY), {name: 1.5 * tensor for name, tensor in random_state(TINY).items()}
    policy, expected = (
        assemble(TINY, state, {}, backend="auto", dtype=torch.float32) for state in (dict(first), dict(second))
    )
    observation, noise = observe()
    policy.sample_actions(observation, noise)
    policy.load_state_dict(expected.state_dict())
    assert torch.equal(policy.sample_actions(observation, noise), expected.sample_actions(observation, noise))


@pytest.mark.parametrize("change", [{"depth": 4}, {"num_heads": 4}, {"head_dim": 32}])
def test_both_gemmas_must_match(change: dict[str, int]) -> None:
    architecture = dataclasses.replace(TINY, expert=dataclasses.replace(TINY.expert, **change))
    with pytest.raises(DuQuantError, match="must be equal"):
        Architecture.infer(synthetic.checkpoint_shapes(architecture))


def test_a_missing_tensor_is_named() -> None:
    state = random_state(TINY)
    del state["action_in_proj.bias"]
    with pytest.raises(DuQuantError, match=r"action_in_proj\.bias is missing"):
        assemble(TINY, state, {}, backend="auto", dtype=torch.float32)


@pytest.mark.parametrize("length", [60, 3000])  # the second: beyond the table
def test_an_optimized_policy_turns_by_the_same_angles(policy: Policy, length: int) -> None:
    optimized = copy.deepcopy(policy)
    optimized.optimize_()
    places = torch.arange(length).repeat(2, 1)
    places[1, 5:] -= 3
    for given in (policy, optimized):
        prefix, suffix = given.rotations(places, length - 10)
        assert [x.shape for x in suffix] == [(2, 10, policy.architecture.expert.head_dim)] * 2
        turned = [torch.cat(parts, dim=1) for parts in zip(prefix, suffix, strict=True)]
        half = policy.architecture.expert.head_dim // 2
        angles = places[..., None].double() * 10_000.0 ** (-torch.arange(half).double() / half).repeat(2)
        for actual, expected in zip(turned, (angles.cos(), angles.sin()), strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-3)


def test_an_optimized_policy_keeps_what_depends_on_the_time_alone(policy: Policy) -> None:
    assert policy.tabulated(4) is not policy.tabulated(4)
    optimized = copy.deepcopy(policy)
    optimized.optimize_()
    optimized.graphs = None
    assert optimized.tabulated(4) is optimized.tabulated(4)
    assert torch.equal(optimized.tabulated(4), policy.tabulated(4))
    assert len(optimized.tabulated(5)) == 5
