"""Parts of sparse gradients: what lies in some rows, or in some elements, of a parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of(gradient: Tensor, first: int, last: int) -> Tensor:
    """Rows ``first`` to ``last`` of a sparse COO tensor, entry by entry, as a sparse tensor."""
    indices, values = gradient._indices(), gradient._values()
    here = (indices[0] >= first) & (indices[0] < last)
    indices = indices[:, here]
    indices[0] -= first
    shape = (last - first, *gradient.shape[1:])
    return _sparse(indices, values[here], shape, gradient.is_coalesced())


def elements_of(gradient: Tensor, strides: Sequence[int], offset: int, numel: int) -> Tensor:
    """The part of a sparse COO tensor that lies in memory at ``[offset, offset + numel)``.

    Args:
        gradient: shaped as the parameter.
        strides: of the parameter.
        offset: of the part.
        numel: its length.

    Returns:
        A sparse tensor ``(numel,)`` with an entry for each element, in the order of ``gradient``'s.
    """
    indices, values = gradient._indices(), gradient._values()
    sparse_dim = gradient.sparse_dim()
    places = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    steps = torch.tensor(strides[:sparse_dim], device=indices.device)
    places += (indices * steps[:, None]).sum(0).view(-1, *[1] * gradient.dense_dim())
    for dim, stride in enumerate(strides[sparse_dim:], 1):
        along = torch.arange(values.shape[dim], device=values.device) * stride
        places += along.view(-1, *[1] * (values.dim() - dim - 1))
    flat = places.view(-1) - offset
    here = (flat >= 0) & (flat < numel)
    in_order = gradient.is_coalesced() and list(strides) == sorted(strides, reverse=True)
    return _sparse(flat[here][None], values.reshape(-1)[here], (numel,), in_order)


def rows_in(gradient: Tensor) -> Tensor:  # (number of rows,), int64
    """The rows that have an entry in a sparse COO tensor, in order, each once."""
    return gradient._indices()[0].unique()


def sparse_rows(
    numbers: Tensor,  # (n,) of int64
    values: Tensor,  # (n, ...)
    shape: Sequence[int],
    *,
    coalesced: bool = False,
) -> Tensor:
    """Rows as a sparse COO tensor."""
    return _sparse(numbers[None], values, shape, coalesced)


def _sparse(indices: Tensor, values: Tensor, shape: Sequence[int], coalesced: bool) -> Tensor:
    return torch.sparse_coo_tensor(
        indices, values, tuple(shape), is_coalesced=coalesced, check_invariants=False
    )
