"""LBFGS on shards: torch's own step on this rank's part of every vector, its sums over all ranks.

torch's ``LBFGS`` computes on vectors over all parameters: element by element, which does not care
where a vector is cut, and by three reductions to one number. While it steps, ``SumsOverRanks``
takes these over all ranks; what follows from them (the step length, whether to go on) is then the
same on every rank.

Memory of each rank, in vectors of its 1/N of all parameters: ``2 * history_size`` for the history,
beside which 2 stay between steps (``d``, ``prev_flat_grad``) and at most 7 are there within one; 12
with ``line_search_fn="strong_wolfe"``.

References:
    Nocedal, Updating Quasi-Newton Matrices with Limited Storage, 1980; Liu and Nocedal, On the
    Limited Memory BFGS Method for Large Scale Optimization, 1989.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FLAT_STATE = frozenset({"d", "old_dirs", "old_stps", "prev_flat_grad"})

GatherRows = Callable[[Tensor], Tensor]  # (k,) of each rank -> (number of ranks, k), on the CPU

_REDUCTIONS: dict[Any, Callable[[Any, Any], Any]] = {
    Tensor.dot: operator.add,
    Tensor.sum: operator.add,
    Tensor.max: lambda one, other: one if one >= other or one != one else other,  # a NaN stays
}


class SumsOverRanks(TorchFunctionMode):
    """Within it, a reduction of a vector to one number is one over all ranks' parts of the vector.

    Every rank gets the same bits: numbers are added in rank order, in fp64, and rounded once. With
    one rank they are what torch computes.

    Args:
        gather_rows: every rank's row, in rank order, on every rank.
    """

    def __init__(self, gather_rows: GatherRows):
        super().__init__()
        self._gather_rows = gather_rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reduce over ranks what ``func`` reduces here."""
        kwargs = kwargs or {}
        combine = _REDUCTIONS.get(func)
        is_vector = any(isinstance(arg, Tensor) and arg.dim() == 1 for arg in args)
        if combine and is_vector:
            return self._over_ranks(func, args, kwargs, combine)
        result = func(*args, **kwargs)
        if is_vector and isinstance(result, Tensor) and result.dim() == 0:
            assert func is Tensor.view_as, f"LBFGS of this torch reduces a vector by {func}"
        return result

    def _over_ranks(self, func: Any, args: Any, kwargs: Any, combine: Any) -> Tensor:
        vector = args[0]
        if vector.numel():
            here = func(*args, **kwargs)
        else:  # nothing, which changes no sum and no largest element
            here = vector.new_full((), -torch.inf if func is Tensor.max else 0.0)
        rows = self._gather_rows(here.double().view(1)).flatten().tolist()
        return torch.tensor(reduce(combine, rows), dtype=here.dtype, device=here.device)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """In here tensors are those of a user, and nothing is reduced over ranks."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()
