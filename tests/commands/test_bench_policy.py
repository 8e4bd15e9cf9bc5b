"""bench-policy: the simulation it starts from, the rows, the arithmetic of its table, resuming and failing."""

from collections import Counter
from collections.abc import Iterator
import dataclasses
import functools
import importlib
import json
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from openpi_duquant import PRESETS
from openpi_duquant import quantize_
from openpi_duquant.accuracy import relative_error
from openpi_duquant.commands import main
from openpi_duquant.commands import policy_report
from openpi_duquant.commands import policy_rows
from openpi_duquant.commands.policy_rows import ROWS
from openpi_duquant.commands.policy_rows import Setting
from openpi_duquant.commands.policy_timing import decode
from openpi_duquant.commands.policy_timing import encode
from openpi_duquant.commands.simulation import SimulatedLinear
from openpi_duquant.commands.simulation import Style
from openpi_duquant.commands.simulation import simulate_
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.linear import QuantLinear

COMMAND = importlib.import_module("openpi_duquant.commands.bench_policy")
RESEARCH = dataclasses.replace(PRESETS["optimized"], scope="", include="")
STYLES = {
    "naive": Style(),
    "batched": Style(batched=True),
    "no-clones": Style(clones=False),
    "batched-no-clones": Style(batched=True, clones=False),
    "fused": Style(batched=True, clones=False, fused=True),
}


def layer_of(config: DuQuantConfig, dtype: torch.dtype = torch.float32, *, backend: str = "fake") -> QuantLinear:
    """A quantized layer of 96 x 64 with a bias, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.ModuleDict({"layer": nn.Linear(64, 96)}).to(dtype).requires_grad_(requires_grad=False)
    quantize_(model, config, backend=backend)
    return model["layer"]


def activation(dtype: torch.dtype = torch.float32, *, width: int = 64) -> Tensor:
    """[2, 5, K] with an outlier channel."""
    x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    x[..., 3] *= 20
    return x.to(dtype)


def by_definition(layer: QuantLinear, x: Tensor, *, rounds: bool = True) -> np.ndarray:
    """What the layer computes of x [..., K]: rows of block-diagonal matrices and int8 codes, in numpy's fp64."""
    state = layer.state_dict()
    packed = state["weight_packed"].numpy()
    nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1).astype(np.float64)
    weight = np.where(nibbles > 7, nibbles - 16, nibbles) * state["weight_scale"].double().numpy()
    y = x.double().numpy().reshape(-1, x.shape[-1])
    if "permutation" in state:
        y = y[:, state["permutation"].numpy()]
    y = y @ block_diagonal(state.get("rotation"), y.shape[1])
    if rounds:
        scale = np.abs(y).max(1, keepdims=True) / 127
        y = np.rint(y / scale) * scale
    y = y @ weight.T @ block_diagonal(state.get("output_rotation"), len(weight))
    y = y + state["bias"].double().numpy() if "bias" in state else y
    return y.reshape(*x.shape[:-1], -1)


def block_diagonal(blocks: Tensor | None, width: int) -> np.ndarray:
    """[K, K] with these blocks on its diagonal; the identity without any."""
    if blocks is None:
        return np.eye(width)
    matrix, size = np.zeros((width, width)), blocks.shape[-1]
    for index, block in enumerate(blocks.double().numpy()):
        matrix[index * size : (index + 1) * size, index * size : (index + 1) * size] = block
    return matrix


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_the_simulation_is_the_mathematics_of_the_quantized_layer(style: Style) -> None:
    layer, x = layer_of(RESEARCH), activation()
    assert layer.spec.permute
    assert layer.spec.rotation_block == layer.spec.output_rotation_block == 16
    simulated = SimulatedLinear(layer, style)
    assert relative_error(simulated(x), torch.from_numpy(by_definition(layer, x))) < 1e-5
    assert relative_error(simulated(x), layer(x)) < 1e-5
    assert torch.equal(x, activation())  # what the host gave is not written to


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_in_bf16_it_errs_by_roundings_of_bf16(style: Style) -> None:
    layer, x = layer_of(RESEARCH, torch.bfloat16), activation(torch.bfloat16)
    y = SimulatedLinear(layer, style)(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, torch.from_numpy(by_definition(layer, x))) < 2**-6


def test_a_hadamard_is_simulated_too() -> None:
    config = dataclasses.replace(RESEARCH, rotation="hadamard", rotation_block=32)
    layer, x = layer_of(config), activation()
    assert relative_error(SimulatedLinear(layer, Style())(x), layer(x)) < 1e-5


class Operations(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("style", "matmuls", "batched", "clones"),
    [
        (Style(), 64 // 16 + 96 // 16 + 1, 0, 2),
        (Style(clones=False), 64 // 16 + 96 // 16 + 1, 0, 0),
        (Style(batched=True, clones=False), 1, 2, 0),
    ],
)
def test_naive_multiplies_block_by_block_on_copies(style: Style, matmuls: int, batched: int, clones: int) -> None:
    simulated = SimulatedLinear(layer_of(RESEARCH), style)
    with Operations() as operations:
        simulated(activation()[0])
    counts = operations.counts
    assert counts["mm"] + counts["addmm"] == matmuls
    assert counts["bmm"] == batched
    assert batched or counts["clone"] == clones  # reshaping blocks makes a copy of its own


@pytest.fixture
def setting(source: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Setting]:
    """The tiny checkpoint, two steps, on the CPU."""
    made = Setting("given", str(source), 0, 2, 2, 24, "cpu", str(tmp_path / "converted"))
    with made.weights:
        yield made


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, dict[str, bool]]]:
    """The policies of rows that are made, with how they are to run."""
    made: list[tuple[nn.Module, dict[str, bool]]] = []

    def engine(policy: nn.Module, _: Setting, **how: bool) -> None:
        made.append((policy, how))

    monkeypatch.setattr(policy_rows, "engine", engine)
    return made


BLOCKS = {"simple": 0, "block-32": 32}
SIMULATIONS = [name for name, row in ROWS.items() if getattr(row.make, "func", None) is policy_rows.simulated]


@pytest.mark.parametrize("name", SIMULATIONS)
def test_a_step_computes_what_its_name_says(
    name: str, setting: Setting, policies: list[tuple[nn.Module, dict[str, bool]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    originals: dict[int, QuantLinear] = {}
    make = SimulatedLinear.__init__

    def remember(self: SimulatedLinear, layer: QuantLinear, style: Style) -> None:
        make(self, layer, dataclasses.replace(style, compiled=False))
        originals[id(self)] = layer

    monkeypatch.setattr(SimulatedLinear, "__init__", remember)
    ROWS[name].make(setting)
    policy, how = policies[0]
    layers = {key: layer for key, layer in policy.named_modules() if isinstance(layer, SimulatedLinear)}
    assert len(layers) == 2 * 7
    assert all("gemma_expert" in key for key in layers)
    assert how == {"compiled": name == "compiled"}
    for layer in layers.values():
        spec = originals[id(layer)].spec
        assert spec.permute == (name != "simple")
        assert spec.rotation_block == BLOCKS.get(name, 16)
        assert spec.output_rotation_block == (0 if name == "no-restore" else BLOCKS.get(name, 16))
        x = activation(torch.bfloat16, width=layer.in_features)
        expected = by_definition(originals[id(layer)], x, rounds=name != "abits-16")
        assert relative_error(layer(x), torch.from_numpy(expected)) < 2**-6


def test_the_styles_of_the_steps() -> None:
    styles = {name: ROWS[name].make.keywords["style"] for name in SIMULATIONS}
    assert {name: styles[name] for name in STYLES} == STYLES
    assert styles["layers-compiled"] == Style(compiled=True)
    assert styles["compiled"] == STYLES["batched-no-clones"]
    others = set(styles) - set(STYLES) - {"layers-compiled", "compiled"}
    assert others == {"simple", "block-32", "no-restore", "abits-16"}
    assert all(styles[name] == Style() for name in others)


def test_without_rounding_the_outcome_differs() -> None:
    layer, x = layer_of(RESEARCH), activation()
    rounded, kept = (by_definition(layer, x, rounds=rounds) for rounds in (True, False))
    assert relative_error(torch.from_numpy(rounded), torch.from_numpy(kept)) > 1e-3


def test_every_layer_is_replaced() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Sequential(nn.Linear(32, 16))})
    quantize_(model, RESEARCH, backend="reference")
    assert simulate_(model, Style()) == 2
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert model["b"][0](activation(width=32)).shape == (2, 5, 16)


@pytest.mark.parametrize("name", ["layers-compiled", "compiled", "bf16-compiled"])
def test_compilation_can_be_switched_off(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENPI_DISABLE_TORCH_COMPILE", "1")
    with pytest.raises(DuQuantError, match="OPENPI_DISABLE_TORCH_COMPILE"):
        ROWS[name].make(setting)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch.compile's own
def test_layers_of_one_shape_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    x = activation()
    for width, graphs in ((96, 1), (96, 1), (32, 2), (96, 2), (32, 2)):
        model = nn.ModuleDict({"layer": nn.Linear(64, width)}).requires_grad_(requires_grad=False)
        quantize_(model, RESEARCH, backend="reference")
        expected = model["layer"](x)
        simulate_(model, Style(compiled=True))
        assert relative_error(model["layer"](x), expected) < 1e-5
        assert counters["stats"]["unique_graphs"] == graphs


def row(milliseconds: float, actions: Tensor, **more: object) -> dict[str, Any]:
    """A measured row of four calls; model only takes half as long."""
    times = {"policy_calls": 4, "call_ms": milliseconds, "calls_per_s": 1000 / milliseconds}
    wall = times | {"p50_ms": milliseconds, "p95_ms": 1.5 * milliseconds, "p99_ms": 2 * milliseconds}
    memory = {"weight_bytes": 2_000_000_000, "peak_bytes": 2_500_000_000, "device_bytes": 3_000_000_000}
    model = {name: value / 2 for name, value in wall.items()}
    measured = {"wall": wall, "model": model, "first_call_s": 1.25, "actions": encode(actions), "commit": "abc"}
    return measured | memory | more


@pytest.fixture
def results() -> dict[str, Any]:
    """Five rows that were measured and one that failed."""
    actions = torch.tensor([3.0, 4.0])
    times = {"naive": 8000.0, "w4a8-bitblas": 40.0, "w4a8-triton": 20.0, "bf16-eager": 200.0, "bf16-engine": 50.0}
    rows = {name: row(ms, actions) for name, ms in times.items()}
    rows["naive"]["actions"] = encode(torch.tensor([3.0, 4.5]))
    rows["module"] = {"failed": "needs OPENPI_SRC", "commit": None}
    stamp = {"date": "now", "commit": "abc", "gpu": "pretended", "machine": "x", "versions": {"torch": "2"}}
    setting = {"size": "full", "checkpoint": None, "seed": 0, "num_steps": 10, "device": "cuda", "scratch": None}
    setting |= {"cameras": 3, "prompt_tokens": 200}
    return {"stamp": stamp, "setting": setting, "rows": rows}


def test_the_table(results: dict[str, Any]) -> None:
    header, lines = policy_report.table(results)
    by_name = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert list(by_name) == ["naive", "w4a8-bitblas", "w4a8-triton", "bf16-eager", "bf16-engine"]
    naive, fast = by_name["naive"], by_name["w4a8-triton"]
    assert [naive[name] for name in ("p50 ms", "p95 ms", "p99 ms")] == ["8000", "12000", "16000"]
    assert (naive["model only, p50 ms"], naive["calls"]) == ("4000", "4")
    assert (naive["calls/s"], naive["episode s (18 calls)"]) == ("0.125", "144")
    assert (naive["x naive"], naive["x bf16-eager"]) == ("1.00", "0.0250")
    assert (fast["x naive"], fast["x bf16-eager"]) == ("400", "10.0")
    assert [fast[name] for name in ("weights GB", "peak GB", "GPU in use GB")] == ["2.00", "2.50", "3.00"]
    assert fast["first call s"] == "1.25"
    assert (naive["action difference"], fast["action difference"]) == ("1.00e-01", "0.00e+00")


def test_speed_ups_refer_to_openpis_compiled_bf16_where_it_was_measured(results: dict[str, Any]) -> None:
    results["rows"]["openpi-compiled"] = row(34.0, torch.zeros(2))
    header, lines = policy_report.table(results)
    by_name = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert by_name["w4a8-triton"]["x openpi-compiled"] == "1.70"


def test_on_a_cpu_memory_is_left_out(results: dict[str, Any]) -> None:
    results["rows"]["naive"] |= dict.fromkeys(("weight_bytes", "peak_bytes", "device_bytes"))
    header, lines = policy_report.table(results)
    assert dict(zip(header, lines[0], strict=True))["peak GB"] == ""


def test_the_share_of_graph_and_precision(results: dict[str, Any]) -> None:
    assert policy_report.shares(policy_report.milliseconds(results)) == {
        "from_ms": 200.0, "to_ms": 20.0, "graph": 150 / 180, "precision": 30 / 180,
    }  # fmt: skip
    page = policy_report.markdown(results)
    assert "(200.0 ms) to W4A8 as CUDA graphs (20.0 ms): 83% of the time saved is the graph's" in page
    assert "17% is precision's" in page


@pytest.mark.parametrize("missing", [("bf16-eager",), ("bf16-engine",), ("w4a8-triton", "w4a8-bitblas")])
def test_no_share_is_made_up(missing: tuple[str, ...], results: dict[str, Any]) -> None:
    for name in missing:
        results["rows"][name] = {"failed": "out of memory"}
    assert policy_report.shares(policy_report.milliseconds(results)) is None
    assert "% of the time saved" not in policy_report.markdown(results)


def test_a_slower_w4a8_costs_precisions_share(results: dict[str, Any]) -> None:
    times = {"bf16-eager": 200.0, "bf16-engine": 50.0, "w4a8-triton": 80.0}
    split = policy_report.shares(times)
    assert (split["graph"], split["precision"]) == (150 / 120, -30 / 120)


def test_the_page_says_what_was_not_run_and_why(results: dict[str, Any]) -> None:
    page = policy_report.markdown(results)
    assert "| module  | needs OPENPI_SRC |" in page
    assert "commit abc; GPU pretended" in page


def test_the_original_analysis_stands_beside(results: dict[str, Any]) -> None:
    page = policy_report.markdown(results)
    line = next(line for line in page.splitlines() if line.startswith("| current: full DuQuant"))
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["13,086 (observed)", "1x", "naive", "8000", "1.00"]
    line = next(line for line in page.splitlines() if line.startswith("| real INT4") and "triton" in line)
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["1,000-1,500", "8-13x", "w4a8-triton", "20.0", "400"]


def command(*options: object) -> None:
    """Runs bench-policy as the command line does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["openpi-duquant", "bench-policy", *map(str, options)])
        main()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of rows that were run; the third is interrupted, `module` fails."""
    names: list[str] = []

    def run(name: str, *_: object) -> dict[str, Any]:
        names.append(name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return {"failed": "no openpi"} if name == "module" else row(float(len(names)), torch.ones(2))

    monkeypatch.setattr(COMMAND, "_run", run)
    return names


def test_an_interrupted_run_goes_on(ran: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--output", tmp_path, "--device", "cpu", "--rows", "naive", "module", "bf16-eager"
    with pytest.raises(SystemExit, match="interrupted"):
        command(*options)
    assert list(json.loads((tmp_path / "policy.json").read_text())["rows"]) == ["naive", "module"]
    assert "not measured again" not in capsys.readouterr().out
    command("--output", tmp_path, "--device", "cpu", "--rows", "naive", "bf16-eager")
    assert "has naive, module: not measured again" in " ".join(capsys.readouterr().out.split())
    assert ran == ["naive", "module", "bf16-eager", "bf16-eager"]
    assert (tmp_path / "policy.png").stat().st_size > 1000
    assert "no openpi" in (tmp_path / "policy.md").read_text()


def test_a_row_that_failed_is_tried_again_when_it_is_named(ran: list[str], tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: no row could be measured: module: "):
        command("--output", tmp_path, "--device", "cpu", "--rows", "module")
    ran.append("-")
    ran.append("-")
    command("--output", tmp_path, "--device", "cpu")
    assert ran.count("module") == 1
    assert len(ran) == 2 + len(ROWS)
    command("--output", tmp_path, "--device", "cpu", "--rows", "module", "naive")
    assert ran[3:].count("module") == 1
    assert ran.count("naive") == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--num-steps", 5), "num_steps 10, here is 5"),
        (("--cameras", 3), "cameras 2, here is 3"),
        (("--prompt-tokens", 200), "prompt_tokens 24, here is 200"),
        (("--calls", 7), "calls 100, here is 7"),
        (("--seconds-per-row", 60), "seconds_per_row 20.0, here is 60.0"),
    ],
)
def test_other_settings_are_not_mixed(
    option: tuple[str, int], said: str, ran: list[str], tmp_path: pathlib.Path
) -> None:
    command("--output", tmp_path, "--device", "cpu", "--rows", "naive")
    with pytest.raises(SystemExit, match=f"was measured with {said}"):
        command("--output", tmp_path, "--device", "cpu", "--rows", "simple", *option)
    assert ran == ["naive"]


@pytest.mark.parametrize("tokens", [0, 201])
def test_prompts_are_as_long_as_they_can_be(tokens: int, tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match=f"prompt_tokens: {tokens} is not between 1 and 200"):
        command("--output", tmp_path, "--prompt-tokens", tokens)


def test_the_page_says_what_a_call_was_asked(results: dict[str, Any]) -> None:
    assert "3 live cameras of three, 200 prompt tokens, 10 steps" in policy_report.markdown(results)


@pytest.mark.parametrize(("cameras", "tokens"), [(1, 24), (3, 200)])
def test_every_row_is_asked_that(setting: Setting, cameras: int, tokens: int) -> None:
    asked = dataclasses.replace(setting, cameras=cameras, prompt_tokens=tokens)
    with asked.weights:
        observation, _ = asked.observation
    assert sum(int(mask) for mask in observation.image_masks.values()) == cameras
    assert observation.tokenized_prompt_mask.sum() == tokens


def test_the_page_says_which_rows_are_of_another_commit(results: dict[str, Any]) -> None:
    assert "at another" not in policy_report.markdown(results)
    results["rows"]["naive"]["commit"] = "old"
    assert "another: naive of old; w4a8-bitblas, w4a8-triton, " in policy_report.markdown(results)


def test_an_unknown_row_lists_those_there_are(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match="there is no 'fast'; choose from naive, simple"):
        command("--output", tmp_path, "--rows", "fast")


@pytest.fixture(scope="module")
def measured(source: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a run on the tiny checkpoint, each row in its process; one row cannot run here."""
    folder = tmp_path_factory.mktemp("bench")
    options = "--checkpoint", source, "--device", "cpu", "--num-steps", 1, "--calls", 3, "--seconds-per-row", 1
    command("--output", folder, *options, "--rows", "w4a8-reference", "w4a8-triton", "bf16-eager")
    return folder


def test_rows_are_measured_in_processes_and_one_that_fails_does_not_stop_them(measured: pathlib.Path) -> None:
    rows = json.loads((measured / "policy.json").read_text())["rows"]
    assert list(rows) == ["w4a8-reference", "w4a8-triton", "bf16-eager"]
    assert rows["w4a8-triton"]["failed"].startswith("backend triton cannot run: ")
    assert "Traceback" not in (measured / "logs" / "w4a8-triton.log").read_text()
    for name in ("w4a8-reference", "bf16-eager"):
        assert rows[name]["wall"]["policy_calls"] == rows[name]["model"]["policy_calls"] == 3
        assert rows[name]["peak_bytes"] is None


def test_actions_are_those_of_the_policies(measured: pathlib.Path, setting: Setting) -> None:
    rows = json.loads((measured / "policy.json").read_text())["rows"]
    setting = dataclasses.replace(setting, num_steps=1)
    with setting.weights:
        calls = ROWS["bf16-eager"].make(setting)
    with torch.no_grad():
        assert torch.equal(calls.whole(), calls.model())
        assert torch.equal(decode(rows["bf16-eager"]["actions"]), calls.whole().flatten())
    difference = relative_error(*(decode(rows[name]["actions"]) for name in ("w4a8-reference", "bf16-eager")))
    assert 1e-4 < difference < 0.5


def run_naive(tmp_path: pathlib.Path, setting: Setting, *, timeout: float) -> dict[str, Any]:
    """What is recorded of the row `naive`."""
    return COMMAND._run("naive", setting, {"calls": 3, "seconds_per_row": 1.0}, timeout, tmp_path / "logs")


def test_a_row_that_takes_too_long_is_given_up(tmp_path: pathlib.Path, setting: Setting) -> None:
    assert run_naive(tmp_path, setting, timeout=0.01)["failed"] == "not done after 0.01 s"


def test_a_row_that_dies_is_recorded(tmp_path: pathlib.Path, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run_naive(tmp_path, setting, timeout=60)["failed"] == "exit status 1"


def test_the_first_screen_of_the_readme_comes_from_results() -> None:
    root = pathlib.Path(__file__).parents[2]
    results = json.loads((root / "docs" / "results" / "policy.json").read_text())
    text = policy_report.summary(results)
    assert text in (root / "README.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == [
        ROWS[name].what for name in policy_report.SUMMARY_ROWS
    ]
