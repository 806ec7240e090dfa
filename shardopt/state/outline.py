"""The outline of a state: itself, with a description in place of every tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardopt.buffers import dense_strides

State = dict[Any, Any]  # of one parameter: name -> tensor or plain value


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of the state looks like, in place of the tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """Describe ``tensor`` as a dense copy of it would be."""
        return TensorSpec(tuple(tensor.shape), tuple(dense_strides(tensor)), tensor.dtype)

    @staticmethod
    def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpec:
        """A contiguous tensor of ``shape``."""
        return TensorSpec.of(torch.empty(shape, dtype=dtype, device="meta"))

    def empty(self) -> Tensor:
        """A tensor like that, on the CPU."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="cpu")
