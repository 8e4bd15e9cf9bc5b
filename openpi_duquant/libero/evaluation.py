"""A run: which episodes, with which policy, and what is kept of them."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import importlib.util
import pathlib
from typing import Any

import tyro

from openpi_duquant.config import DuQuantError
from openpi_duquant.libero.episode import Episode
from openpi_duquant.libero.episode import Settings
from openpi_duquant.libero.policies import ServerPolicy
from openpi_duquant.libero.policies import check_checkpoint
from openpi_duquant.libero.policies import check_served
from openpi_duquant.libero.policies import load_in_process
from openpi_duquant.libero.results import JOURNAL_NAME
from openpi_duquant.libero.results import Journal
from openpi_duquant.libero.results import write_results
from openpi_duquant.libero.runner import Record
from openpi_duquant.libero.runner import Runner
from openpi_duquant.libero.runner import ThisProcess
from openpi_duquant.libero.simulator import STAND_INS
from openpi_duquant.libero.simulator import LiberoSimulator
from openpi_duquant.libero.simulator import are_stand_ins
from openpi_duquant.libero.simulator import number_of_tasks
from openpi_duquant.libero.simulator import prepare
from openpi_duquant.libero.workers import RayWorkers
from openpi_duquant.recorder import Recorder
from openpi_duquant.report import stamp

DEFAULT_CONFIG = "pi05_libero_duquant"

_FREE = {
    "host", "port", "results_dir", "resume", "keep_going", "videos", "assets", "num_workers", "ray_address", "record",
    "record_limit",
}  # fmt: skip
"""Arguments that a resumed run need not share."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to evaluate; names and defaults are those of openpi's client where it has them.

    Attributes:
        checkpoint: Run the policy of this checkpoint in this process.
        policy_config: openpi's name of its config: pi05_libero_duquant if not given, pi05_libero for floating point.
            Of a server it is only checked whether it is quantized.
        host: Ask the policy server on this host instead; several for --num-workers.
        port: Its port; several for several servers on one host.
        task_suite_name: libero_spatial, libero_object, libero_goal, libero_10 or libero_90.
        tasks: Numbers of tasks; all if not given.
        num_trials_per_task: Episodes of every task, at most the 50 initial states there are.
        seed: Of everything random.
        settings: How episodes are run.
        results_dir: Folder for results, videos and the journal.
        resume: Continue the run in that folder: no finished episode is run again, those that ended in an error are.
        keep_going: Go on after an exception. The status is non-zero in the end all the same.
        videos: Write a video of every episode.
        assets: Folder of LIBERO's assets, where LIBERO does not find them by itself.
        num_workers: Episodes that run at a time, in processes of Ray; each has its simulator, and without --host its
            policy too.
        ray_address: A cluster of Ray that runs already; its machines see the same folders.
        record: Folder to make with observations that the policy of --checkpoint saw, see record-observations.
        record_limit: Observations to keep there, evenly sampled.
    """

    checkpoint: pathlib.Path | None = None
    policy_config: str | None = None
    host: tuple[str, ...] = ()
    port: tuple[int, ...] = (8000,)
    task_suite_name: str = "libero_spatial"
    tasks: tuple[int, ...] = ()
    num_trials_per_task: int = 50
    seed: int = 7
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings()  # noqa: RUF009 - frozen
    results_dir: pathlib.Path = pathlib.Path("results/libero")
    resume: bool = False
    keep_going: bool = False
    videos: bool = True
    assets: pathlib.Path | None = None
    num_workers: int = 1
    ray_address: str | None = None
    record: pathlib.Path | None = None
    record_limit: int = 64

    def __post_init__(self) -> None:
        for name in ("checkpoint", "results_dir", "assets", "record"):  # workers have a working directory of their own
            path = getattr(self, name)
            object.__setattr__(self, name, path and path.absolute())

    def episodes(self) -> list[Episode]:
        """All episodes, trial by trial within a task.

        Raises:
            DuQuantError: On an unknown suite, task or trial.
        """
        count = number_of_tasks(self.task_suite_name)
        for task in self.tasks:
            if not 0 <= task < count:
                raise DuQuantError(f"tasks: {self.task_suite_name} has no task {task}, but 0 to {count - 1}")
        if not 1 <= self.num_trials_per_task <= 50:
            raise DuQuantError(f"num_trials_per_task: {self.num_trials_per_task} is not 1 to 50, one per initial state")
        if self.seed < 0:
            raise DuQuantError(f"seed: {self.seed} is negative")
        tasks = sorted(set(self.tasks)) or range(count)
        trials = range(self.num_trials_per_task)
        return [Episode(self.task_suite_name, task, trial, self.seed) for task in tasks for trial in trials]

    def to_json(self) -> dict[str, Any]:
        """All of them as JSON values, those of the settings among them."""
        values = dataclasses.asdict(self)
        values |= values.pop("settings")
        return {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in values.items()}

    def identity(self) -> dict[str, Any]:
        """Those that a resumed run must share."""
        return {name: value for name, value in self.to_json().items() if name not in _FREE}

    def recorder(self, *, stand_ins: bool) -> contextlib.AbstractContextManager[Recorder | None]:
        """What records the policy, if it is to be recorded."""
        if self.record is None:
            return contextlib.nullcontext()
        about = {"source": self.task_suite_name, "config": self.policy_config or DEFAULT_CONFIG}
        about |= {"checkpoint": str(self.checkpoint), "assets": STAND_INS if stand_ins else "LIBERO"}
        return Recorder(self.record, limit=self.record_limit, seed=self.seed, info=about)


def check(arguments: Arguments) -> tuple[list[str], bool]:
    """Finds out everything that can be known before anything slow starts.

    Returns:
        What there is, a line each; and whether the assets are stand-ins.

    Raises:
        DuQuantError: Says what is missing.
    """
    if bool(arguments.host) == bool(arguments.checkpoint):
        raise DuQuantError("give --checkpoint for a policy in this process, or --host for a running server")
    if arguments.record and (arguments.host or arguments.num_workers > 1):
        raise DuQuantError(
            "--record records a policy in this process, with one worker; serve-policy records a server's"
        )
    if arguments.num_workers < 1:
        raise DuQuantError(f"num_workers: {arguments.num_workers} is less than 1")
    arguments.episodes()
    policy = f"server: {', '.join(f'{host}:{port}' for host, port in servers(arguments))}"
    if arguments.checkpoint:
        config = arguments.policy_config or DEFAULT_CONFIG
        check_checkpoint(arguments.checkpoint, config)
        policy = f"checkpoint: {arguments.checkpoint}, as {config}"
    if not arguments.resume and (arguments.results_dir / JOURNAL_NAME).exists():
        raise DuQuantError(f"{arguments.results_dir}: holds a run; --resume continues it, --results-dir names another")
    if arguments.videos and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise DuQuantError("videos need imageio and imageio-ffmpeg: install them, or say --no-videos")
    found = prepare(arguments.assets)
    stand_ins = are_stand_ins(found.assets)
    assets = f"assets: {found.assets}{f' ({STAND_INS}: this is no LIBERO result)' if stand_ins else ''}"
    machine = f"MuJoCo: {found.rendering}", f"GPU: {stamp()['gpu'] or 'none'}"
    return [policy, assets, f"LIBERO config: {found.config}", *machine], stand_ins


def servers(arguments: Arguments) -> list[tuple[str, int]]:
    """Addresses of the servers: every port of every host."""
    return [(host, port) for host in arguments.host for port in arguments.port]


def build_runner(arguments: Arguments, worker: int, recorder: Recorder | None = None) -> Runner:
    """The simulator and the policy of a worker; with several servers, workers take turns. A recorder records it.

    Raises:
        DuQuantError: If one of them cannot be had.
    """
    simulator = LiberoSimulator(arguments.task_suite_name, arguments.assets)
    if arguments.checkpoint:
        policy, metadata = load_in_process(arguments.checkpoint, arguments.policy_config or DEFAULT_CONFIG)
        if recorder:
            recorder.watch(policy)
    else:
        addresses = servers(arguments)
        policy = ServerPolicy(*addresses[worker % len(addresses)])
        metadata = policy.metadata
        check_served(metadata.get("duquant"), arguments.policy_config)
    videos = None
    if arguments.videos:
        folder = arguments.results_dir / "videos"
        folder.mkdir(parents=True, exist_ok=True)
        videos = folder, f"{STAND_INS.replace(' ', '-')}_" if are_stand_ins(simulator.assets) else ""
    return Runner(simulator, policy, arguments.settings, metadata.get("duquant"), videos)


class Evaluation:
    """A run, new or resumed; a context manager that leaves the results behind however it ends.

    Attributes:
        episodes: All of the run.
        journal: Holds the records of those that are finished.
        results: What results.json says, once it is left.

    Raises:
        DuQuantError: If the policy cannot be had, or the folder holds another run.
    """

    def __init__(self, arguments: Arguments, *, stand_ins: bool, build: Callable[[int], Runner] | None = None) -> None:
        self._arguments = arguments
        self.episodes = arguments.episodes()
        self.results: dict[str, Any] = {}
        build = build or functools.partial(build_runner, arguments)
        count = min(arguments.num_workers, len(self.episodes))
        parallel = arguments.num_workers > 1
        self._pool = RayWorkers(build, count, arguments.ray_address) if parallel else ThisProcess(build)
        self._run = {
            "assets": STAND_INS if stand_ins else "LIBERO",
            "arguments": arguments.to_json(),
            "policy": self._pool.facts,
            "stamp": stamp(),
        }
        try:
            self.journal = Journal(arguments.results_dir, {**self._run, "arguments": arguments.identity()})
        except BaseException:
            self._pool.close()
            raise

    def __enter__(self) -> "Evaluation":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()
        self.journal.close()
        records = list(self.journal.records.values())
        self.results = write_results(self._arguments.results_dir, self._run, records, len(self.episodes))

    def waiting(self) -> list[Episode]:
        """Episodes that are not finished, or ended in an error."""
        kept = self.journal.records
        finished = {key for key, record in kept.items() if record.status != "error"}
        return [episode for episode in self.episodes if (episode.task, episode.trial) not in finished]

    def run(self) -> Iterator[Record]:
        """Runs what is left to run; a record is on the disk when it is handed out.

        Raises:
            DuQuantError: After an episode that ended in an error, unless the arguments say to keep going.
        """
        for record in self._pool.run(self.waiting()):
            self.journal.append(record)
            yield record
            if record.status == "error" and not self._arguments.keep_going:
                where = f"task {record.task}, episode {record.trial}"
                raise DuQuantError(f"{where}: {record.error}; --resume continues, --keep-going goes on after errors")
