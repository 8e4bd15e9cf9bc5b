"""openpi's Policy.infer on the engine: the same answers as by openpi's own, without its way through the GPU."""

import copy
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from openpi_duquant.accuracy import relative_error

pytestmark = pytest.mark.openpi

NOISE = np.random.default_rng(1).standard_normal((10, 32)).astype(np.float32)
CONFIGS = pytest.mark.parametrize("config", ["pi05_libero_duquant", "pi0_aloha_sim_duquant", "pi05_droid_duquant"])


def made(stock: Any, hosts: Any, config: str, **options: Any) -> tuple[Any, np.ndarray]:
    """A policy, and noise for it."""
    policy = stock(config, hosts.converted / config.partition("_")[0], **options)
    return policy, np.resize(NOISE, (policy._model.config.action_horizon, 32))


@CONFIGS
def test_answers_are_those_of_openpis_own_infer(stock: Any, hosts: Any, example: Any, config: str) -> None:
    from openpi.policies.policy import Policy

    policy, noise = made(stock, hosts, config)
    seen = example(config.split("_")[1])
    given = copy.deepcopy(seen)
    ours = policy.infer(seen, noise=noise)
    theirs = Policy.infer.__wrapped__(policy, copy.deepcopy(seen), noise=noise)
    assert ours.keys() == theirs.keys()
    error = relative_error(*(torch.from_numpy(np.array(answer["actions"])) for answer in (ours, theirs)))
    assert error < 0.02  # images are embedded as bytes, or as floats, and rounded to bf16
    np.testing.assert_equal(seen, given)
    batched = policy.infer(seen, noise=noise[None])
    np.testing.assert_array_equal(batched["actions"], ours["actions"])


def test_images_reach_the_engine_as_bytes_on_the_host(stock: Any, hosts: Any, example: Any) -> None:
    policy, noise = made(stock, hosts, "pi05_libero_duquant")
    policy._sample_kwargs = {"num_steps": 2}
    with mock.patch.object(policy._model.policy, "sample_actions", return_value=torch.zeros(1, 10, 32)) as sampled:
        answer = policy.infer(example("libero"), noise=noise)
    (seen, start), options = sampled.call_args
    images = list(seen.images.values())
    assert all(image.dtype == torch.uint8 and image.shape == (1, 224, 224, 3) for image in images)
    np.testing.assert_array_equal(images[0][0].numpy(), example("libero")["observation/image"])
    np.testing.assert_array_equal(start[0].numpy(), noise)
    assert options == {"num_steps": 2}
    assert answer["policy_timing"]["infer_ms"] > 0


def test_other_policies_keep_openpis(stock: Any, hosts: Any, example: Any) -> None:
    from openpi.models.model import Observation

    with mock.patch.object(Observation, "from_dict", side_effect=Observation.from_dict) as made_by_openpi:
        for runtime, calls in (("engine", 0), ("module", 1)):
            policy, noise = made(stock, hosts, "pi05_libero_duquant", runtime=runtime)
            policy.infer(example("libero"), noise=noise)
            assert made_by_openpi.call_count == calls
