"""The action expert: Gemma's layers at every denoising step; where they can, all of them in one launch."""

from collections.abc import Callable, Iterator, Sequence
import functools
import logging

import torch
from torch import Tensor
from torch import nn

from openpi_duquant import profiling
from openpi_duquant.architecture import TransformerSize
from openpi_duquant.engine.gemma import AdaptiveRMSNorm
from openpi_duquant.engine.gemma import DecoderLayer
from openpi_duquant.engine.gemma import KeyValue
from openpi_duquant.engine.gemma import RMSNorm
from openpi_duquant.engine.stack import stack_
from openpi_duquant.kernels import persistent
from openpi_duquant.kernels import self_test
from openpi_duquant.kernels.persistent import Stack

_LARGEST_ERROR = 0.1
"""Of the expert's layers in one launch: what bf16 and int8 make of another order of sums is well below it."""

_logger = logging.getLogger(__name__)


class ActionExpert(nn.Module):
    """Denoises actions while looking at the language model's cache.

    Args:
        size: The transformer.
        adaptive: Modulate by the time step (adaRMS, pi0.5).
    """

    def __init__(self, size: TransformerSize, *, adaptive: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(size, adaptive=adaptive) for _ in range(size.depth))
        self.norm = AdaptiveRMSNorm(size.width) if adaptive else RMSNorm(size.width)
        self._compared = False

    @functools.cached_property
    def _stack(self) -> Stack | None:
        return stack_(self.layers)

    def __getstate__(self) -> dict[str, object]:
        state = {name: value for name, value in super().__getstate__().items() if name != "_stack"}
        return state | {"_compared": False}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ActionExpert":  # noqa: FBT001, FBT002
        self.__dict__.pop("_stack", None)  # of tensors that the layers now have elsewhere
        self._compared = False
        return super()._apply(fn, recurse)

    def norms(self) -> Iterator[nn.Module]:
        """Every norm, in the order in which `forward` takes modulations."""
        for layer in self.layers:
            yield layer.input_layernorm
            yield layer.post_attention_layernorm
        yield self.norm

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cached: KeyValue,
        modulations: Sequence[Tensor | None],
        *,
        state_first: bool,
    ) -> Tensor:
        """One denoising step.

        Args:
            x: Embedded suffix [B, S, W].
            rotation: Cosines and sines [B, S, D] of its positions, see `rotary`.
            visible: [B, P] bool, of the cached keys; None for all.
            cached: Keys and values of the language model's layers.
            modulations: Of every norm, [3 W] fp32, or None for norms that take none.
            state_first: The first token is a state's, which looks at no other of the suffix.

        Returns:
            [B, S, W], what leaves the last layer: `norm` is not applied.
        """

        def one_by_one() -> Tensor:
            y = x
            for index, (layer, *own) in enumerate(zip(self.layers, *cached, strict=True)):
                modulation = modulations[2 * index : 2 * index + 2]
                y, _ = layer(y, rotation, visible, own, modulation, state_first=state_first)
            return y

        def in_one_launch() -> Tensor:
            norms = self._stack.norms if modulations[0] is None else modulations[:-1]
            return persistent.run_layers(x, self._stack, norms, rotation, visible, cached, state_first=state_first)

        alone = persistent.takes(x, rotation[0].shape[-1]) and not profiling.is_active() and self._stack is not None
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if alone and not self._compared and not capturing:
            self._compared = True
            fault = self_test.disagreement(in_one_launch, one_by_one(), _LARGEST_ERROR)
            if fault:
                _logger.warning("the expert's layers are launched one by one: all in one launch %s", fault)
                self.__dict__["_stack"] = alone = None
        return in_one_launch() if alone else one_by_one()
