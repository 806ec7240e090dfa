"""Storage of a layout: one buffer to a bucket, of which parameters become views.

A parameter keeps a storage of its own size, an alias over the bucket's memory made through
DLPack, so that saving one layer writes that layer and not the bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from shardopt.comm import Collectives
from shardopt.errors import ParameterError, warn
from shardopt.layout import Bucket, Layout, Segment, Slot
from shardopt.sparse import elements_of, rows_of


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in any order of dimensions."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides a dense copy of ``tensor`` has: its own if it is dense, else contiguous ones."""
    return tensor.stride() if is_dense(tensor) else torch.empty_like(tensor, device="meta").stride()


def in_memory_order(tensor: Tensor, strides: Sequence[int]) -> Tensor:  # (numel,)
    """The elements of ``tensor`` in the order that ``strides`` lay them out; a view if possible."""
    if tuple(tensor.stride()) != tuple(strides) and not _same_order(tensor, strides):
        laid_out = torch.empty_strided(
            tensor.shape, tuple(strides), dtype=tensor.dtype, device=tensor.device
        )
        tensor = laid_out.copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _same_order(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether both strides put every element in the same place; those of size 1 do not matter."""
    return tensor.numel() == 0 or all(
        size == 1 or mine == wanted
        for size, mine, wanted in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def no_elements(parameters: Sequence[Tensor]) -> Tensor:  # (0,)
    """A tensor that makes a vector with parts of ``parameters`` what one with all of them is."""
    if not parameters:
        return torch.empty(0)
    dtype = reduce(torch.promote_types, [parameter.dtype.to_real() for parameter in parameters])
    return torch.empty(0, dtype=dtype, device=parameters[0].device)


class ParameterBuffers:
    """The parameters of a layout, moved into the buffers of its buckets.

    Attributes:
        parameters: the user's tensors, in order of ``Layout.parameters``.
        strides: the strides each keeps while it lies in its bucket.
        buckets: one buffer to a bucket of the layout.
    """

    def __init__(self, collectives: Collectives):
        self._collectives = collectives
        self._layout = Layout((), collectives.world_size, ())
        self.parameters: list[Tensor] = []
        self.strides: list[tuple[int, ...]] = []
        self.buckets: list[Tensor] = []
        self._homes: list[tuple[object, ...]] = []
        self._aliases: list[Tensor] = []
        self._slots: list[Tensor] = []

    def adopt(self, layout: Layout, parameters: Sequence[Tensor]) -> None:
        """Move the parameters that ``layout`` adds, one bucket's memory at a time."""
        first = len(self.parameters)
        self._layout = layout
        self.parameters += parameters
        self.strides += [dense_strides(parameter) for parameter in parameters]
        self._homes += [()] * len(parameters)
        self._aliases += [torch.empty(0)] * len(parameters)
        self._slots += [torch.empty(0)] * len(parameters)
        for bucket in layout.buckets[len(self.buckets) :]:
            device = self.parameters[bucket.slots[0].parameter].device
            buffer = self._collectives.allocate(bucket.numel, bucket.dtype, device)
            self.buckets.append(buffer)
            self._adopt_bucket(bucket, buffer, first)

    def _adopt_bucket(self, bucket: Bucket, buffer: Tensor, first: int) -> None:
        for slot in bucket.slots:
            index = slot.parameter
            assert index >= first, "a parameter is adopted once"
            self._slots[index] = buffer[slot.start : slot.stop]
            self._aliases[index] = self._alias(index)
            self._homes[index] = _whereabouts(self._aliases[index])
            self._move_in(index)

    def _alias(self, index: int) -> Tensor:
        """The slot's memory, shaped as the parameter, with a storage of its own.

        It passes through DLPack as bytes: torch 2.9 refuses float8 there, and changes strides.
        """
        parameter, slot = self.parameters[index], self._slots[index]
        own = torch.from_dlpack(slot.view(torch.uint8)).view(slot.dtype)
        return own.as_strided(parameter.shape, self.strides[index])

    def release(self, layout: Layout) -> None:
        """Keep the parameters and buckets of ``layout``; others live as long as their users."""
        self._layout = layout
        for rows in (self.parameters, self.strides, self._homes, self._aliases, self._slots):
            del rows[len(layout.parameters) :]
        del self.buckets[len(layout.buckets) :]

    def _move_in(self, index: int) -> None:
        """Copy a parameter's value to its slot and make the slot its storage."""
        parameter, alias = self.parameters[index], self._aliases[index]
        with torch.no_grad():
            is_view = parameter.data_ptr() == alias.data_ptr()
            alias.copy_(parameter.clone() if is_view else parameter)
            parameter.data = alias

    def take_back(self, names: Sequence[str]) -> None:
        """Move parameters that were taken out of their buckets back in.

        Compares where and how they lie, so it costs no device synchronisation.

        Raises:
            ParameterError: one cannot come back, since its shape, dtype or device is another now.
        """
        for index, parameter in enumerate(self.parameters):
            if _whereabouts(parameter) == self._homes[index]:
                continue
            if _whereabouts(self._aliases[index]) != self._homes[index]:  # share_memory() did it
                self._aliases[index] = self._alias(index)
                warn(
                    f"the memory of parameter {names[index]!r} is no longer shared with other "
                    "processes: ShardedOptimizer has taken it back into its bucket; share the "
                    "model before constructing ShardedOptimizer",
                )
            alias = self._aliases[index]
            now = (tuple(parameter.shape), parameter.dtype, parameter.device)
            before = (tuple(alias.shape), alias.dtype, alias.device)
            if now != before:
                raise ParameterError(
                    f"parameter {names[index]!r}: expected {_describe(*before)} as when the "
                    f"optimizer was constructed, got {_describe(*now)}; convert or move the model "
                    "before constructing ShardedOptimizer, or construct it anew and load the state"
                )
            if not _same_order(parameter, alias.stride()):
                warn(
                    f"parameter {names[index]!r} has strides {parameter.stride()} now and goes "
                    f"back to {alias.stride()}, as when ShardedOptimizer was constructed; change "
                    "the memory format of the model before",
                )
            self._move_in(index)

    def segment(self, bucket: int, segment: Segment) -> Tensor:
        """The memory of a segment: a whole parameter or its rows so shaped, else ``(numel,)``."""
        part = self.buckets[bucket][segment.start : segment.start + segment.numel]
        return self._shaped(part, segment).detach()

    def slot_of(self, buffer: Tensor, slot: Slot) -> Tensor:
        """The part of another buffer of the same bucket that belongs to a parameter, so shaped."""
        shape, strides = self.parameters[slot.parameter].shape, self.strides[slot.parameter]
        return buffer.as_strided(shape, strides, slot.start)

    def segment_of(self, tensor: Tensor, segment: Segment) -> Tensor:
        """The part of a full ``tensor``, shaped as the parameter, that belongs to ``segment``."""
        strides = self.strides[segment.parameter]
        if tensor.layout is not torch.strided:
            return self._sparse_segment_of(tensor, segment)
        if segment.whole and tensor.stride() == strides:
            return tensor
        # Whole ones too: fused kernels go by memory order, and do not look at strides on a CPU.
        flat = in_memory_order(tensor, strides)
        return self._shaped(flat[segment.offset : segment.offset + segment.numel], segment)

    def _sparse_segment_of(self, tensor: Tensor, segment: Segment) -> Tensor:
        if segment.whole:
            return tensor
        if segment.parameter in self._layout.by_rows:
            row = self._layout.parameters[segment.parameter].row_numel
            return rows_of(tensor, segment.offset // row, (segment.offset + segment.numel) // row)
        strides = self.strides[segment.parameter]
        return elements_of(tensor, strides, segment.offset, segment.numel)

    def _shaped(
        self,
        flat: Tensor,  # (numel,)
        segment: Segment,
    ) -> Tensor:
        """A segment's elements, which lie end to end, in its shape."""
        shape = self._layout.shape_of(segment)
        if not segment.whole:
            return flat.view(shape)
        return flat.as_strided(shape, self.strides[segment.parameter], flat.storage_offset())


def _whereabouts(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _describe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{shape} {dtype} on {device}"
