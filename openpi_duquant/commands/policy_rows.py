"""The rows of `bench-policy`: what each one runs, and how it is made."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch import nn

from openpi_duquant import kernels
from openpi_duquant import synthetic
from openpi_duquant.architecture import PI05
from openpi_duquant.architecture import SMALL
from openpi_duquant.architecture import Architecture
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.checkpoint.files import WEIGHTS_NAME
from openpi_duquant.checkpoint.files import SafetensorsWriter
from openpi_duquant.checkpoint.files import renamed_when_whole
from openpi_duquant.checkpoint.load import fill_openpi_model
from openpi_duquant.commands import openpi_model
from openpi_duquant.commands.simulation import Style
from openpi_duquant.commands.simulation import simulate_
from openpi_duquant.config import PRESETS
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion import Plan
from openpi_duquant.conversion import convert_tensors
from openpi_duquant.conversion import make_plan
from openpi_duquant.conversion import open_source
from openpi_duquant.engine import Observation
from openpi_duquant.engine import Policy
from openpi_duquant.engine import assemble
from openpi_duquant.engine import preprocess
from openpi_duquant.engine.graphs import on
from openpi_duquant.engine.observation import prepare_image
from openpi_duquant.environment import openpi_source
from openpi_duquant.environment import read_environment
from openpi_duquant.linear import prepare_
from openpi_duquant.linear import quantize_

COMPILE_MODE = "reduce-overhead"
DTYPE = torch.bfloat16
_RESEARCH = PRESETS["optimized"]
_NAIVE = Style()
_QUICK = Style(batched=True, clones=False)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows of one run have in common.

    Attributes:
        size: "full" or "small", of the random weights.
        checkpoint: Folder of a checkpoint of openpi, in place of random weights.
        seed: Of weights, observation and noise.
        num_steps: Denoising steps.
        cameras: Live ones, of three.
        prompt_tokens: Length of the prompt.
        device: Where policies run.
        scratch: Folder for the conversion that rows share.
    """

    size: str
    checkpoint: str | None
    seed: int
    num_steps: int
    cameras: int
    prompt_tokens: int
    device: str
    scratch: str

    @functools.cached_property
    def weights(self) -> SafetensorsReader | synthetic.RandomWeights:
        """The tensors of the policy, bf16 where they are random."""
        if self.checkpoint:
            return open_source(pathlib.Path(self.checkpoint))
        architecture = {"full": PI05, "small": SMALL}[self.size]
        return synthetic.RandomWeights(architecture, device=self.device, seed=self.seed)

    @functools.cached_property
    def architecture(self) -> Architecture:
        """Sizes of the policy."""
        return Architecture.infer({name: shape for name, (_, shape) in self.weights.types.items()})

    @property
    def observation(self) -> tuple[Observation, Tensor]:
        """What every row is asked, and the noise; on the host."""
        asked = {"cameras": self.cameras, "prompt_tokens": self.prompt_tokens}
        return synthetic.libero_like_observation(self.architecture, seed=self.seed, **asked)


class Calls(NamedTuple):
    """A policy, ready to be called.

    Attributes:
        whole: From camera images on the host to actions on the host.
        model: From what the model reads to actions, both on the device.
    """

    whole: Callable[[], Tensor]
    model: Callable[[], Tensor]


def engine(policy: Policy, setting: Setting, *, graph: bool = False, compiled: bool = False) -> Calls:
    """This project's forward pass, optimized: eager, under torch.compile, or (on a GPU) as CUDA graphs."""
    if not graph or setting.device == "cpu":
        policy.graphs = None
    if compiled:
        _require_compilation()
        torch.compiler.disable(Policy.denoise, recursive=False)  # one compiled step, called in a loop, as in openpi
        policy.see, policy.act = (torch.compile(part, mode=COMPILE_MODE) for part in (policy.see, policy.act))
    observation, noise = setting.observation
    prefix, state = preprocess(observation), policy.read_state(observation.state, len(noise))
    images, *inputs = on([prefix.images, *policy.inputs(prefix, state, noise)], policy.device)

    def model() -> Tensor:
        features = policy.run(policy.see, [images])
        return policy.run(policy.act, [features, *inputs], policy.tabulated(setting.num_steps))

    return Calls(lambda: policy.sample_actions(observation, noise, num_steps=setting.num_steps), model)


def _require_compilation() -> None:
    if not read_environment().compile:
        raise DuQuantError("OPENPI_DISABLE_TORCH_COMPILE is set")


def _policy(setting: Setting, *, optimize: bool = True) -> Policy:
    """The policy in bf16."""
    given = {"backend": "auto", "dtype": DTYPE, "device": setting.device}
    return assemble(setting.architecture, setting.weights, {}, **given, optimize=optimize)


def bf16(setting: Setting, *, graph: bool = False, compiled: bool = False) -> Calls:
    """The engine without quantization."""
    return engine(_policy(setting), setting, graph=graph, compiled=compiled)


def simulated(setting: Setting, config: DuQuantConfig, style: Style, *, compiled: bool = False) -> Calls:
    """The research code's fake quantization in the eager engine."""
    if style.compiled:
        _require_compilation()
    policy = _policy(setting, optimize=False)
    quantize_(policy, config, backend="reference")
    simulate_(policy, style)
    policy.optimize_()
    return engine(policy, setting, compiled=compiled)


def real(setting: Setting, backend: str, *, config: DuQuantConfig | None = None) -> Calls:
    """The engine on integers; of the `default` preset, as converted, or of a config, without folds."""
    layers = _plan(setting, config, backend).layers
    if config is None:
        with _converted(setting) as state:
            given = {"backend": backend, "dtype": DTYPE, "device": setting.device}
            policy = assemble(setting.architecture, state, layers, **given, optimize=True)
        return engine(policy, setting, graph=True)
    policy = _policy(setting, optimize=False)
    quantize_(policy, config, backend=backend)
    policy.optimize_()
    prepare_(policy)
    return engine(policy, setting, graph=True)


def _plan(setting: Setting, config: DuQuantConfig | None, backend: str) -> Plan:
    """The plan of a conversion, if the backend can run its layers."""
    plan = make_plan(setting.weights.types, config or PRESETS["default"])
    problems = [spec.problem(DTYPE) for spec in plan.layers.values()]
    kernels.require(backend, problems, torch.device(setting.device))
    return plan


def _converted(setting: Setting) -> SafetensorsReader:
    """The conversion of the `default` preset, made by the first row that needs it."""
    folder = pathlib.Path(setting.scratch)
    if not folder.exists():
        plan = make_plan(setting.weights.types, PRESETS["default"])
        with renamed_when_whole(folder) as partial, SafetensorsWriter(partial / WEIGHTS_NAME, plan.types) as writer:
            for name, tensor in convert_tensors(lambda name: setting.weights[name].to(setting.device), plan):
                writer.write(name, tensor)
    return SafetensorsReader(folder)


def openpi(setting: Setting, *, quantized: bool = False, compiled: bool = False) -> Calls:
    """openpi's own forward pass, in bf16 or with this project's layers in place of its own."""
    source = openpi_source()
    if source is None:
        raise DuQuantError("needs OPENPI_SRC, a checkout of openpi")
    if compiled:
        _require_compilation()
    observation, noise = setting.observation
    mode = COMPILE_MODE if compiled else None
    model = openpi_model.build(source, setting.architecture, horizon=noise.shape[1], compile_mode=mode)
    fill = functools.partial(fill_openpi_model, model, backend="auto", dtype=DTYPE, device=setting.device)
    if quantized:
        layers = _plan(setting, None, "auto").layers
        with _converted(setting) as state:
            fill(state, layers)
    else:
        fill(setting.weights, {})
    model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")  # as openpi does after loading
    return _openpi_calls(model, observation, noise, setting)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """An observation as openpi's model takes it."""

    images: dict[str, Tensor]
    image_masks: dict[str, Tensor]
    state: Tensor
    tokenized_prompt: Tensor
    tokenized_prompt_mask: Tensor
    token_ar_mask: None = None
    token_loss_mask: None = None


def _openpi_calls(model: nn.Module, observation: Observation, noise: Tensor, setting: Setting) -> Calls:
    device = setting.device

    def seen() -> _Seen:
        rest = observation.state, observation.tokenized_prompt, observation.tokenized_prompt_mask
        return _Seen(
            {camera: prepare_image(camera, image.to(device)) for camera, image in observation.images.items()},
            {camera: mask.to(device) for camera, mask in observation.image_masks.items()},
            *(x.to(device) for x in rest),
        )

    def run(given: _Seen, noise: Tensor) -> Tensor:
        return model.sample_actions(device, given, noise=noise, num_steps=setting.num_steps)

    ready, noise_there = seen(), noise.to(device)
    return Calls(lambda: run(seen(), noise.to(device)).cpu(), lambda: run(ready, noise_there))


class Row(NamedTuple):
    """A row: what it is, in words, and how it is made."""

    what: str
    make: Callable[[Setting], Calls]


def _step(what: str, config: DuQuantConfig = _RESEARCH, style: Style = _NAIVE, *, compiled: bool = False) -> Row:
    return Row(what, functools.partial(simulated, config=config, style=style, compiled=compiled))


ROWS: dict[str, Row] = {
    "naive": _step("the simulation: blocks of 16 in a Python loop, clones, eager"),
    "simple": _step("naive without permutation and rotation", PRESETS["simple"]),
    "block-32": _step("naive with blocks of 32", dataclasses.replace(_RESEARCH, rotation_block=32)),
    "no-restore": _step("naive without output restore", dataclasses.replace(_RESEARCH, row_rotation="0")),
    "abits-16": _step("naive without rounding activations", dataclasses.replace(_RESEARCH, activation_bits=16)),
    "batched": _step("naive, all blocks in one batched matmul", style=Style(batched=True)),
    "no-clones": _step("naive without clones", style=Style(clones=False)),
    "layers-compiled": _step("naive, each layer under torch.compile", style=Style(compiled=True)),
    "batched-no-clones": _step("batched and without clones", style=_QUICK),
    "fused": _step(
        "batched-no-clones; permute + rotate + round in our one kernel, matmul still fake",
        style=dataclasses.replace(_QUICK, fused=True),
    ),
    "compiled": _step("batched-no-clones, the policy under torch.compile", style=_QUICK, compiled=True),
    "module": Row("real W4A8 in openpi's forward, eager", functools.partial(openpi, quantized=True)),
    "w4a8-expert-triton": Row(
        "real W4A8 of what naive simulates, engine", functools.partial(real, backend="triton", config=_RESEARCH)
    ),
    "w4a8-reference": Row("real W4A8, engine, backend reference", functools.partial(real, backend="reference")),
    "w4a8-bitblas": Row("real W4A8, engine, backend bitblas", functools.partial(real, backend="bitblas")),
    "w4a8-triton": Row("real W4A8, engine, backend triton", functools.partial(real, backend="triton")),
    "bf16-eager": Row("bf16, engine without its graph", bf16),
    "bf16-compiled": Row("bf16, engine's forward under torch.compile", functools.partial(bf16, compiled=True)),
    "bf16-engine": Row("bf16, engine", functools.partial(bf16, graph=True)),
    "openpi-eager": Row("openpi's own bf16, eager", openpi),
    "openpi-compiled": Row("openpi's own bf16 under torch.compile", functools.partial(openpi, compiled=True)),
}
"""In the order of the table."""
