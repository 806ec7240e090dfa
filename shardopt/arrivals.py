"""Parameters on their way to this rank, and whoever must wait for them.

``step()`` starts to gather each bucket as soon as it is updated. Without ``overlap_forward`` it
waits for all of them; with it the next forward does, module by module:

- a module waits for its parameters before its ``forward``;
- whoever takes a parameter out of a module (``module.weight``, ``model.parameters()``,
  ``model.state_dict()``) waits for it, since modules of the model keep them in ``WaitingDict``;
- the optimizer waits for all of them before its next step.

On a GPU it is a stream that waits; another one that comes later waits for the first.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, ValuesView
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from shardopt.comm.collectives import Handle
from shardopt.shard import Shard


class Arrivals:
    """The gathers under way, by bucket.

    Args:
        shard: whose buckets.
    """

    def __init__(self, shard: Shard):
        self._shard = shard
        self._under_way: dict[int, Handle] = {}
        self._waits: dict[int, torch.cuda.Event] = {}  # by bucket: a stream has it, or waits for it
        self._models: list[ref[nn.Module]] = []
        self._has_failed = False

    def expect(self, handles: dict[int, Handle]) -> None:
        """Gathers have been started; wait for them here unless a model does."""
        self._under_way.update(handles)
        if not any(model() is not None for model in self._models):
            self.wait()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def wait(self) -> None:
        """Every parameter is there."""
        for number in list(self._under_way):
            self._wait_for_bucket(number)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def wait_for(self, parameters: Iterable[Any]) -> None:
        """These parameters are there; others of their buckets come with them."""
        if not (self._under_way or self._waits):
            return
        for parameter in parameters:
            if isinstance(parameter, Tensor) and self._shard.holds(parameter):
                number, _ = self._shard.layout.place(self._shard.index(parameter))
                if number in self._under_way:
                    self._wait_for_bucket(number)
                elif (event := self._waits.get(number)) is None:
                    continue
                elif event.query():
                    del self._waits[number]
                else:
                    torch.cuda.current_stream(parameter.device).wait_event(event)

    def _wait_for_bucket(self, number: int) -> None:
        try:
            with self._shard.collectives.during("forward()"):
                self._under_way.pop(number).wait()
        except Exception:
            self._has_failed = True
            raise
        bucket = self._shard.buffers.buckets[number]
        if bucket.is_cuda and self._models:
            self._waits[number] = torch.cuda.current_stream(bucket.device).record_event()

    def __del__(self) -> None:
        if not self._has_failed:  # else the others do not come either, and the process is to end
            self.wait()  # a model may outlive its optimizer

    def overlap(self, model: nn.Module) -> None:
        """Let ``model`` wait for its parameters, each module for its own.

        Raises:
            ValueError: the model has none of the optimizer's parameters.
        """
        if any(known() is model for known in self._models):
            return
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        if not any(self._shard.holds(parameter) for parameter in parameters):
            raise ValueError(
                f"overlap_forward: expected a model with parameters of this optimizer, got a "
                f"{type(model).__name__} with none of them; pass the model that it was built for"
            )
        self._models.append(ref(model))
        for module in model.modules():
            held = module._parameters
            if any(p is not None and self._shard.holds(p) for p in held.values()):
                module._parameters = WaitingDict(held, self)
                module.register_forward_pre_hook(_wait_before_forward)


class WaitingDict(dict[str, Any]):
    """A module's parameters, each of which has arrived when it is taken out. Copies are plain."""

    def __init__(self, parameters: dict[str, Any], arrivals: Arrivals):
        super().__init__(parameters)
        self._arrivals = ref(arrivals)  # a model does not keep its optimizer alive

    def _wait_for(self, parameters: Iterable[Any]) -> None:
        if arrivals := self._arrivals():
            arrivals.wait_for(parameters)

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        self._wait_for([parameter])
        return parameter

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        self._wait_for(super().values())
        return super().get(name, default)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """As of a dict."""
        self._wait_for(super().values())
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """As of a dict."""
        self._wait_for(super().values())
        return super().items()

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)


def _wait_before_forward(module: nn.Module, inputs: Any) -> None:
    """Some modules keep their parameters in lists of their own, as LSTMs do."""
    if isinstance(module._parameters, WaitingDict):
        module._parameters.values()
