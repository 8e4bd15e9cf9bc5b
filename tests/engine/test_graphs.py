"""Calls as CUDA graphs: the same actions as without, whatever changes from call to call."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import copy
import dataclasses
import pathlib
import pickle
import threading

import pytest
import torch
from torch import Tensor

from openpi_duquant import Observation
from openpi_duquant import Policy
from openpi_duquant import load_policy
from openpi_duquant import synthetic
from openpi_duquant.accuracy import relative_error
from openpi_duquant.architecture import Architecture
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.config import PRESETS
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion import convert
from openpi_duquant.conversion import make_plan
from openpi_duquant.engine import graphs
from openpi_duquant.engine import layers_run
from openpi_duquant.engine.observation import CAMERAS
from openpi_duquant.engine.observation import Prefix

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])


@pytest.fixture(params=["pi05", "pi0"])
def folder(request: pytest.FixtureRequest, tiny: Architecture, tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A converted checkpoint, W4A8."""
    architecture = dataclasses.replace(tiny, pi05=request.param == "pi05")
    synthetic.make_checkpoint(tmp_path / "original", architecture, seed=5)
    convert(tmp_path / "original", tmp_path / "converted", PRESETS["default"])
    return tmp_path / "converted"


def call(architecture: Architecture, seed: int, batch: int, prompt: int, cameras: int) -> tuple[Observation, Tensor]:
    """A batch of observations with prompts of up to that many tokens and that many live cameras."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, prompt + 1, (batch, 1), generator=generator)
    lengths[0] = prompt
    observation = Observation(
        images={name: torch.randint(256, (batch, 224, 224, 3), generator=generator).byte() for name in CAMERAS},
        image_masks={name: torch.full((batch,), index < cameras) for index, name in enumerate(CAMERAS)},
        tokenized_prompt=torch.randint(architecture.vocab_size, (batch, 200), generator=generator),
        tokenized_prompt_mask=torch.arange(200)[None] < lengths,
        state=torch.rand(batch, architecture.action_dim, generator=generator),
    )
    return observation, torch.randn(batch, 10, architecture.action_dim, generator=generator)


CALLS = [(1, 7, 2), (1, 20, 2), (2, 20, 3), (1, 7, 2), (1, 9, 1), (3, 40, 2), (1, 20, 2), (2, 20, 3)]
"""Batch, prompt tokens, live cameras: five shapes, some of them met again."""


def answers(policy: Policy) -> list[Tensor]:
    """Actions of all calls, each with data of its own."""
    return [
        policy.sample_actions(*call(policy.architecture, seed, *shape), num_steps=2) for seed, shape in enumerate(CALLS)
    ]


def test_without_a_gpu_an_optimized_policy_gives_the_same_actions(folder: pathlib.Path) -> None:
    policies = [load_policy(folder, backend="reference", dtype=torch.float32, optimize=on) for on in (False, True)]
    assert sum(1 for _ in policies[1].modules()) < sum(1 for _ in policies[0].modules())
    for plain, optimized in zip(*map(answers, policies), strict=True):
        assert relative_error(optimized, plain) < 2e-2  # int8 rounds what fp32 sums otherwise


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))], ids=["copy", "pickle"]
)
def test_a_copy_gives_the_same_actions(folder: pathlib.Path, again: Callable[[Policy], Policy]) -> None:
    policy = load_policy(folder, dtype=torch.float32)
    twin = again(policy)
    assert twin.graphs is not policy.graphs
    given = call(policy.architecture, 0, 1, 5, 2)
    assert torch.equal(twin.sample_actions(*given), policy.sample_actions(*given))


@pytest.mark.parametrize("cast", [Policy.half, Policy.double, lambda policy: policy.to(torch.bfloat16)])
def test_types_are_chosen_at_load(folder: pathlib.Path, cast: Callable[[Policy], Policy]) -> None:
    policy = load_policy(folder, dtype=torch.float32)
    with pytest.raises(DuQuantError, match="load it with dtype="):
        cast(policy)
    assert policy.to("cpu") is policy


def test_a_dead_camera_is_seen(folder: pathlib.Path) -> None:
    policy = load_policy(folder, dtype=torch.float32)
    observation, noise = call(policy.architecture, 0, 1, 5, 2)
    images = {name: torch.full((1, 3, 224, 224), torch.nan) for name in CAMERAS}
    assert policy.sample_actions(dataclasses.replace(observation, images=images), noise).isnan().any()


def test_layers_that_read_one_input_run_as_one(tiny: Architecture, source: pathlib.Path) -> None:
    with SafetensorsReader(source) as reader:
        layers = make_plan(reader.types, PRESETS["default"]).layers
    language, expert, size = tiny.language, tiny.expert, tiny.language.head_dim
    q = tiny.language.num_heads * size
    by_block = [(w.width, n) for w in (language, expert) for n in (q + 2 * size, 2 * w.mlp_dim)]
    whole = Counter((spec.in_features, spec.out_features) for spec in layers_run(tiny, layers))
    assert all(whole[shape] >= language.depth - 1 for shape in by_block)
    assert whole[language.width, 2 * size] == 1  # of the last block only keys and values are read
    assert whole.total() == 4 * (language.depth - 1) + 1 + 4 * expert.depth


@pytest.mark.parametrize(("length", "padded"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_prompts_are_padded_to_a_bucket(length: int, padded: int) -> None:
    tokens = torch.arange(1, 2 * length + 1).reshape(2, length)
    prefix = Prefix(torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool), tokens, tokens % 3 == 0)
    actual = graphs.padded(prefix)
    assert actual.tokens.shape == actual.token_mask.shape == (2, padded)
    assert torch.equal(actual.tokens[:, :length], tokens)
    assert torch.equal(actual.token_mask[:, :length], prefix.token_mask)
    assert not actual.token_mask[:, length:].any()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_graph_gives_the_same_bits_as_its_kernels(folder: pathlib.Path, device: str, dtype: torch.dtype) -> None:
    policy = load_policy(folder, dtype=dtype, device=device)
    first, again = answers(policy), answers(policy)
    assert len(policy.graphs) == 5 + 4  # shapes of prompts and of images
    policy.graphs.__class__ = WithoutGraphs
    for graph, repeated, eager in zip(first, again, answers(policy), strict=True):
        assert torch.equal(graph, repeated)
        assert torch.equal(graph, eager)


class WithoutGraphs(graphs.Graphs):
    """Computes without one, on what was padded for one."""

    def __call__(
        self,
        compute: Callable[..., Tensor],
        inputs: Sequence[Tensor | None],
        constants: Sequence[Tensor] = (),
        *,
        device: torch.device,
    ) -> Tensor:
        """Computes."""
        return compute(*graphs.on(inputs, device), *constants)


@on_gpu
def test_padding_changes_no_action(folder: pathlib.Path, device: str) -> None:
    policy = load_policy(folder, dtype=torch.float32, device=device)
    padded = answers(policy)
    policy.graphs = None
    for actual, expected in zip(padded, answers(policy), strict=True):
        assert relative_error(actual, expected) < 1e-2


@on_gpu
def test_graphs_are_kept_up_to_a_limit(folder: pathlib.Path, device: str) -> None:
    policy = load_policy(folder, device=device)
    expected = answers(policy)
    policy.graphs = graphs.Graphs(limit=2)
    for _ in range(2):
        for actual, wanted in zip(answers(policy), expected, strict=True):
            assert torch.equal(actual, wanted)
            assert len(policy.graphs) <= 2


@on_gpu
def test_memory_stays_what_it_is(folder: pathlib.Path, device: str) -> None:
    policy = load_policy(folder, device=device)
    answers(policy)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        answers(policy)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert policy.embedding.weight.device.type == "cpu"


@on_gpu
def test_calls_that_nobody_waits_for_get_their_own_answers(folder: pathlib.Path, device: str) -> None:
    policy = load_policy(folder, device=device)
    expected = answers(policy)
    given = [call(policy.architecture, seed, *shape) for seed, shape in enumerate(CALLS)] * 4
    noise = [each.to(device) for _, each in given]
    got = [policy.sample_actions(seen, start, num_steps=2) for (seen, _), start in zip(given, noise)]
    for actual, wanted in zip(got, expected * 4, strict=True):
        assert torch.equal(actual.cpu(), wanted)


@on_gpu
def test_threads_get_their_own_answers(folder: pathlib.Path, device: str) -> None:
    policy = load_policy(folder, device=device)
    expected = answers(policy)
    wrong: list[int] = []

    def ask(index: int) -> None:
        for _ in range(10):
            got = policy.sample_actions(*call(policy.architecture, index, *CALLS[index]), num_steps=2)
            if not torch.equal(got, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
