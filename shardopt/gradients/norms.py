"""Norms of gradients that lie in parts on many ranks. Nothing here waits for a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROW = 1024


def is_host(device: torch.device) -> bool:
    """Whether a number can be read without waiting for an accelerator."""
    return device.type == "cpu"


def a_number(argument: str, value: Any) -> float:
    """The value as a float; ``TypeError`` for what is none, such as a model's parameters."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{argument}: expected a number, got {type(value).__name__}; the optimizer's own "
            "clipping takes no parameters: optimizer.clip_grad_norm_(1.0)"
        ) from None


def norm_order(norm_type: Any) -> float:
    """The order of a norm as a number; ``ValueError`` for what is not positive."""
    try:
        order = float(norm_type)
    except (TypeError, ValueError):
        order = math.nan
    if not order > 0:
        raise ValueError(f"norm_type: expected a positive number or inf, got {norm_type!r}")
    return order


def power_sum(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The sum of ``|x|**norm_type`` over all elements, or the largest ``|x|``; 0-dim, float64.

    Elements are added up in fp32 at least within rows of 1024, and in float64 from there on: one
    fp32 sum over a bucket of millions is off by 2e-4.

    Args:
        tensors: contiguous ones.
        norm_type: the order of the norm, positive or inf.
        device: where the result lies.
    """
    norms = []
    for tensor in tensors:
        flat = _real(tensor, norm_type).view(-1)
        wide = torch.float32 if flat.dtype.itemsize < 4 else flat.dtype
        whole = flat.numel() // _ROW * _ROW
        for rows in (flat[:whole].view(-1, _ROW), flat[whole:].view(1, -1)):
            if rows.numel():
                norm = torch.linalg.vector_norm(rows, norm_type, dim=1, dtype=wide)
                norms.append(norm.to(device, torch.float64, non_blocking=True))
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    together = torch.cat(norms)
    return together.max() if math.isinf(norm_type) else together.pow(norm_type).sum()


def all_finite(tensor: Tensor) -> Tensor:  # () bool, without waiting for the device
    """Whether no element is an inf or a NaN.

    The smallest and the largest element tell, at 25 GB/s a core where ``isfinite()`` and
    ``vector_norm`` run at 1.3.
    """
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return torch.stack(torch.aminmax(real)).isfinite().all()


def first_nonfinite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Which of ``tensors`` is the first with an inf or a NaN, plus 1; 0 for none. 0-dim."""
    if not tensors:
        return torch.zeros((), dtype=torch.int64, device=device)
    bad = [(~all_finite(tensor)).to(device, non_blocking=True) for tensor in tensors]
    together = torch.stack(bad)
    return torch.where(together.any(), together.int().argmax() + 1, 0)


def total_norm(
    powers: Tensor,  # (world_size,)
    norm_type: float,
) -> Tensor:  # 0-dim
    """The norm over all ranks, from each rank's ``power_sum``, summed in rank order."""
    return powers.max() if math.isinf(norm_type) else powers.sum().pow(1.0 / norm_type)


def clip_factor(total: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by, as in ``torch.nn.utils.clip_grad_norm_``; at most 1."""
    return (max_norm / (total + 1e-6)).clamp(max=1.0)


def _real(tensor: Tensor, order: float) -> Tensor:
    """Real numbers with the same norm."""
    if not tensor.is_complex():
        return tensor
    return torch.view_as_real(tensor) if order == 2 else tensor.abs()
