"""record-observations, and the --record of other commands where it needs no openpi."""

import pathlib
import sys

import pytest
import torch

from openpi_duquant import load_policy
from openpi_duquant.commands import main
from openpi_duquant.config import DuQuantError
from openpi_duquant.libero.evaluation import Arguments
from openpi_duquant.libero.evaluation import check
from openpi_duquant.recording import load_recording


def record(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["openpi-duquant", "record-observations", *map(str, arguments)])
    main()


def test_synthetic_observations_fit_their_checkpoint(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pi0", "bfloat16"):
        given = "--checkpoint", checkpoints / name, "--limit", 3, "--action-horizon", 5
        record(monkeypatch, "synthetic", tmp_path / name, *given)
        recording = load_recording(tmp_path / name)
        assert (recording.info["source"], recording.info["checkpoint"]) == ("synthetic", name)
        policy = load_policy(checkpoints / name)
        actions = [policy.sample_actions(x.observation, x.noise, num_steps=1) for x in recording.examples]
        assert [tuple(x.shape) for x in actions] == [(1, 5, 32)] * 3
        assert not torch.equal(actions[0], actions[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("synthetic", "out", "--checkpoint", "missing"), "missing"),
        (("synthetic", ".", "--checkpoint", "missing"), r"\.: exists already"),
        (("synthetic", "out", "--checkpoint", "missing", "--limit", "0"), "--limit 0"),
        (("libero", "out", "--checkpoint", "missing"), "there is no folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        record(monkeypatch, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("elsewhere", [{"host": ("localhost",)}, {"checkpoint": pathlib.Path("c"), "num_workers": 2}])
def test_a_policy_elsewhere_is_not_recorded_here(elsewhere: dict[str, object], tmp_path: pathlib.Path) -> None:
    with pytest.raises(DuQuantError, match="in this process, with one worker"):
        check(Arguments(record=tmp_path / "r", **elsewhere))
