"""Episodes in parallel processes, through Ray."""

import collections
from collections.abc import Callable, Iterable, Iterator
import dataclasses
import math
from typing import Any

from openpi_duquant.config import DuQuantError
from openpi_duquant.libero.episode import Episode
from openpi_duquant.libero.runner import Record
from openpi_duquant.libero.runner import Runner


class Worker:
    """What a process of Ray holds: a runner of its own, made when it is first needed."""

    def __init__(self, build: Callable[[int], Runner], index: int) -> None:
        self._build, self._index = build, index
        self._runner: Runner | None = None

    def runner(self) -> Runner:
        """The runner."""
        self._runner = self._runner or self._build(self._index)
        return self._runner

    def facts(self) -> dict[str, Any] | None:
        """What the policy says of itself."""
        return self.runner().facts

    def run(self, episode: Episode) -> Record:
        """Runs an episode."""
        return self.runner()(episode)


def _share(amount: float, count: int) -> float:
    """What one of `count` gets: as many as need be share one processor or GPU, in Ray's ten-thousandths."""
    return math.floor(1e4 / math.ceil(count / amount)) / 1e4 if amount else 0.0


class RayWorkers:
    """A number of workers with equal shares of the processors and GPUs.

    Attributes:
        facts: What a quantized policy says of itself, the same in every worker; none of another.

    Raises:
        DuQuantError: If Ray is not installed, a worker cannot be made, or they hold different policies.
    """

    def __init__(self, build: Callable[[int], Runner], count: int, address: str | None = None) -> None:
        try:
            import ray  # noqa: PLC0415
        except ImportError:
            raise DuQuantError("--num-workers above 1 needs Ray: pip install 'openpi-duquant[ray]'") from None
        self._ray, self._build = ray, build
        try:
            local = {"include_dashboard": False} if address is None else {}
            ray.init(address=address or "local", log_to_driver=False, **local)
        except (ConnectionError, ValueError) as error:
            raise DuQuantError(f"Ray at {address}: {error}") from None
        try:
            cpus, gpus = (_share(ray.cluster_resources().get(kind, 0), count) for kind in ("CPU", "GPU"))
            self._worker = ray.remote(num_cpus=cpus, num_gpus=gpus)(Worker)
            self._workers = [self._worker.remote(build, index) for index in range(count)]
            asked = [worker.facts.remote() for worker in self._workers]  # all at once: they load side by side
            self.facts, *others = map(self._get, asked)
            if any(facts != self.facts for facts in others):
                raise DuQuantError("the workers' policies differ: every server must serve the same checkpoint")
        except ray.exceptions.RayActorError as error:
            self.close()
            raise DuQuantError(f"a worker of Ray could not be started: {error}") from None
        except BaseException:
            self.close()
            raise

    def run(self, episodes: Iterable[Episode]) -> Iterator[Record]:
        """Records in the order in which they are finished; an episode whose worker dies is run again, once."""
        waiting = collections.deque((episode, False) for episode in episodes)
        idle, running = list(range(len(self._workers))), {}
        while waiting or running:
            while waiting and idle:
                index, (episode, rerun) = idle.pop(), waiting.popleft()
                running[self._workers[index].run.remote(episode)] = index, episode, rerun
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            index, episode, rerun = running.pop(done)
            idle.append(index)
            try:
                yield dataclasses.replace(self._get(done), rerun=rerun)
            except self._ray.exceptions.RayActorError as error:
                self._workers[index] = self._worker.remote(self._build, index)
                if rerun:
                    text = f"the worker died twice: {' '.join(str(error).split())}"
                    yield Record(episode.task, episode.trial, episode.seed, "error", error=text, rerun=True)
                else:
                    waiting.appendleft((episode, True))

    def close(self) -> None:
        """Ends the workers."""
        self._ray.shutdown()

    def _get(self, reference: Any) -> Any:  # noqa: ANN401
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
