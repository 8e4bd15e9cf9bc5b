"""Where quantized layers spend their time: spans, summed up by label and by group of layers.

The table is the research code's `[DUQUANT][PROFILE] fake quantization summary`. Without an active profile `span` is a
look at one variable; its result does nothing.
"""

import atexit
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import datetime as dt
import functools
import json
import os
import pathlib
import re
import sys
import time
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from openpi_duquant.report import stamp

Label = Literal["weight_prequant", "input_transform", "activation_forward", "matmul", "output_restore"]

TRACED_SPANS = 100_000
"""The trace holds the first spans; the sums hold all."""

_PENDING_SPANS = 4096
"""Spans timed by CUDA events that may wait for the GPU before the profile does."""

_active: "Profile | None" = None


def span(label: Label, tensor: Tensor, layer: str | None = None) -> contextlib.AbstractContextManager:
    """Times what happens inside it, if a profile is active.

    Args:
        label: What is done.
        tensor: What it is done to: its elements and bytes are counted.
        layer: The layer that it is done for; else the one whose `in_layer` or `Profile.layer` lasts.
    """
    return contextlib.nullcontext() if _active is None else _active.span(label, tensor, layer)


def is_active() -> bool:
    """Whether spans are counted: then what they measure must not be run as one."""
    return _active is not None


@contextlib.contextmanager
def not_profiled() -> Iterator[None]:
    """Counts no spans while it lasts: kernels are tested or measured, and no layer computes anything."""
    global _active  # noqa: PLW0603
    before, _active = _active, None
    try:
        yield
    finally:
        _active = before


def in_layer(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose spans are counted for the layer of that name."""

    @functools.wraps(function)
    def named(*args: object, **kwargs: object) -> object:
        with contextlib.nullcontext() if _active is None else _active.layer(name):
            return function(*args, **kwargs)

    return named


@dataclasses.dataclass
class Sum:
    """Spans of one label, in one group of layers or in all.

    Attributes:
        calls: Spans.
        seconds: They took.
        elements: They were given.
        bytes: They were given.
    """

    calls: int = 0
    seconds: float = 0.0
    elements: int = 0
    bytes: int = 0

    def add(self, other: "Sum") -> None:
        """Adds another sum to this one."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class _Span:
    label: str
    layer: str
    begin: float
    elements: int
    bytes: int


class Profile:
    """Sums of spans, and a trace of the first of them.

    Args:
        sync: Time with the GPU synchronised before and after each span; otherwise with CUDA events.
    """

    def __init__(self, *, sync: bool = False) -> None:
        self.sync = sync
        self.sums: dict[tuple[str, str], Sum] = {}
        self._trace: list[dict[str, Any]] = []
        self._pending: list[tuple[_Span, torch.cuda.Event, torch.cuda.Event]] = []
        self._layer = "-"
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def active(self) -> Iterator["Profile"]:
        """Counts spans while it lasts; the profile that was active before is active again after it."""
        global _active  # noqa: PLW0603
        before, _active = _active, self
        try:
            yield self
        finally:
            _active = before

    @contextlib.contextmanager
    def layer(self, name: str) -> Iterator[None]:
        """Counts spans for this layer while it lasts."""
        before, self._layer = self._layer, name
        try:
            yield
        finally:
            self._layer = before

    @contextlib.contextmanager
    def span(self, label: str, tensor: Tensor, layer: str | None = None) -> Iterator[None]:
        """See `span`."""
        events = None
        if tensor.is_cuda:
            if self.sync:
                torch.cuda.synchronize(tensor.device)
            else:
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                events[0].record()
        begin = time.perf_counter()
        entry = _Span(label, layer or self._layer, begin, tensor.numel(), tensor.nbytes)
        yield
        if events is not None:
            events[1].record()
            self._pending.append((entry, *events))
            if len(self._pending) >= _PENDING_SPANS:
                self._settle()
            return
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        self._count(entry, time.perf_counter() - begin)

    def _settle(self) -> None:
        """Reads the events of spans that the GPU has finished, waiting for it."""
        for entry, begin, end in self._pending:
            end.synchronize()
            self._count(entry, begin.elapsed_time(end) / 1e3)
        self._pending.clear()

    def _count(self, entry: _Span, seconds: float) -> None:
        key = entry.label, group_of(entry.layer)
        self.sums.setdefault(key, Sum()).add(Sum(1, seconds, entry.elements, entry.bytes))
        if len(self._trace) < TRACED_SPANS:
            microseconds = {"ts": (entry.begin - self._start) * 1e6, "dur": seconds * 1e6}
            event = {"name": entry.label, "cat": key[1], "ph": "X", "pid": 0, "tid": 0}
            self._trace.append(event | microseconds | {"args": {"layer": entry.layer, "elements": entry.elements}})

    def totals(self) -> dict[str, Sum]:
        """Sums over all layers, of every label: zero where nothing happened."""
        self._settle()
        totals = {label: Sum() for label in get_args(Label)}
        for (label, _), part in self.sums.items():
            totals[label].add(part)
        return totals

    def summary(self) -> str:
        """The table, for all layers together and for each group of layers."""
        how = "on" if self.sync else "off"
        tables = {f"[DUQUANT][PROFILE] fake quantization summary (cuda_sync={how})": self.totals()}
        for group in sorted({group for _, group in self.sums}):
            found = {label: self.sums.get((label, group)) for label in get_args(Label)}
            tables[group] = {label: part for label, part in found.items() if part}
        return "\n\n".join(_table(title, sums) for title, sums in tables.items())

    def save(self, folder: pathlib.Path) -> None:
        """Writes `profile.json`, the sums, and `trace.json` for chrome://tracing or Perfetto; makes the folder."""
        totals = {label: dataclasses.asdict(part) for label, part in self.totals().items()}
        groups = [{"label": label, "group": g} | dataclasses.asdict(part) for (label, g), part in self.sums.items()]
        folder.mkdir(parents=True, exist_ok=True)
        values = {"stamp": stamp(), "cuda_sync": self.sync, "totals": totals, "groups": groups}
        (folder / "profile.json").write_text(json.dumps(values, indent=1) + "\n")
        (folder / "trace.json").write_text(json.dumps({"traceEvents": self._trace, "displayTimeUnit": "ms"}))


@functools.cache
def profile_until_exit(folder: pathlib.Path, *, sync: bool) -> Profile:
    """A profile of the rest of the process; at exit its table is printed, and written to a new folder in `folder`."""
    stack = contextlib.ExitStack()
    profile = stack.enter_context(Profile(sync=sync).active())

    def report() -> None:
        stack.close()
        target = folder / f"{dt.datetime.now(dt.UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
        profile.save(target)
        sys.stdout.write(f"{profile.summary()}\n\nwrote {target}/profile.json and trace.json (chrome://tracing)\n")

    atexit.register(report)
    return profile


def group_of(layer: str) -> str:
    """The group that a layer is summed up in: the same layer of all blocks, `gemma_expert.self_attn.q_proj`."""
    known = re.search(r"(language_model|gemma_expert|vision_tower)\b.*?\.layers\.\d+\.(.+)", layer)
    return f"{known[1]}.{known[2]}" if known else layer


def _table(title: str, sums: dict[str, Sum]) -> str:
    lines = [title, f"{'Label':<28} {'Calls':>8} {'Total ms':>12} {'Avg ms':>10} {'Elems':>16} {'GB/s':>10}"]
    lines.insert(1, "-" * len(lines[1]))
    for label, part in sums.items():
        rate = part.bytes / part.seconds / 1e9 if part.seconds else 0.0
        total = part.seconds * 1e3
        average = total / part.calls if part.calls else 0.0
        lines.append(f"{label:<28} {part.calls:>8} {total:>12.2f} {average:>10.3f} {part.elements:>16} {rate:>10.2f}")
    return "\n".join(lines)
