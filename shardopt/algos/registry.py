"""The optimizer classes shardopt knows, one row to a class; a new one is a row.

===================================================  =======  ======================================
class                                                atom     paper
===================================================  =======  ======================================
SGD                                                  ELEMENT  Sutskever et al. 2013
Adam, Adamax                                         ELEMENT  Kingma and Ba 2014, arXiv:1412.6980
AdamW                                                ELEMENT  Loshchilov, Hutter, arXiv:1711.05101
NAdam                                                ELEMENT  Dozat 2016
RAdam                                                ELEMENT  Liu et al. 2019, arXiv:1908.03265
Adagrad                                              ELEMENT  Duchi et al. 2011
Adadelta                                             ELEMENT  Zeiler 2012, arXiv:1212.5701
RMSprop                                              ELEMENT  Hinton, lecture 6e; arXiv:1308.0850
Rprop                                                ELEMENT  Riedmiller and Braun 1993
ASGD                                                 ELEMENT  Polyak and Juditsky 1992
SparseAdam                                           ROW      Adam's, on the rows that are touched
LBFGS                                                ELEMENT  Liu and Nocedal 1989; see ``lbfgs.py``
Adafactor                                            TENSOR   Shazeer, Stern, arXiv:1804.04235
Muon                                                 TENSOR   Jordan et al. 2024
any other                                            TENSOR   its update may read a whole parameter
===================================================  =======  ======================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from shardopt.algos.base import Algorithm, Shape
from shardopt.algos.lbfgs import FLAT_STATE
from shardopt.algos.mixture import classes_of
from shardopt.algos.muon import BatchedMuon
from shardopt.errors import UnsupportedError
from shardopt.layout import Atom

_KNOWN: dict[type[Optimizer], Algorithm] = {}


def register(optimizer_class: type[Optimizer], *, per_element: Iterable[str]) -> None:
    """Declare that ``optimizer_class`` updates each element from that element's own history.

    Its parameters are then cut evenly over the ranks, instead of being placed whole.

    Args:
        optimizer_class: the class; not its subclasses.
        per_element: names of the state that has one value for each element of the parameter
            (``"exp_avg"``); all other state must belong to the parameter as a whole (``"step"``).

    Raises:
        TypeError: not an optimizer class, or names that are no list.
        ValueError: a class of torch's own, which shardopt knows.

    Example:
        >>> shardopt.algos.register(Lion, per_element=["exp_avg"])
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(f"expected a subclass of torch.optim.Optimizer, got {optimizer_class!r}")
    if isinstance(per_element, str):
        raise TypeError(
            f"per_element: expected a list of names, got {per_element!r}; put it in one"
        )
    if optimizer_class.__module__.startswith("torch.optim."):
        raise ValueError(
            f"expected a class of others, got torch's {optimizer_class.__name__}, which shardopt "
            "knows; a class derived from it may be registered"
        )
    _know(optimizer_class, Atom.ELEMENT, per_element=frozenset(per_element), separable=False)


def algorithm_for(optimizer_class: type[Optimizer]) -> Algorithm:
    """What is known of ``optimizer_class``; of an unknown one, that whole parameters are safe."""
    for known, algorithm in _KNOWN.items():
        if algorithm.flat and issubclass(optimizer_class, known) and optimizer_class is not known:
            return Algorithm(
                optimizer_class=optimizer_class,
                atom=Atom.TENSOR,
                refusal=f"a class derived from {known.__name__} may sum over parameters where "
                f"shardopt does not see it; use torch.optim.{known.__name__}",
            )
    unknown = Algorithm(optimizer_class=optimizer_class, atom=Atom.TENSOR)
    return _KNOWN.get(optimizer_class, unknown)


def algorithms_for(entries: Sequence[Any], main: type[Optimizer]) -> list[Algorithm]:
    """What is known of the class of each group; ``entries`` is what an optimizer is given.

    Raises:
        UnsupportedError: shardopt cannot shard a class, or not beside the others.
    """
    classes = classes_of(entries, main)
    every = dict.fromkeys([main, *classes])
    for algorithm in map(algorithm_for, every):
        name = algorithm.optimizer_class.__name__
        if algorithm.refusal:
            raise UnsupportedError(f"{name} is not supported, since {algorithm.refusal}")
        if not algorithm.mixes and len(every) > 1:
            names = [known.__name__ for known in every]
            raise UnsupportedError(
                f"{name} cannot share an optimizer with other classes, got {', '.join(names)}; "
                "give it a ShardedOptimizer of its own"
            )
    return [algorithm_for(its_class) for its_class in classes]


def _know(optimizer_class: type[Optimizer], atom: Atom, **traits: Any) -> None:
    traits = {"separable": True, **traits}  # torch's own are
    _KNOWN[optimizer_class] = Algorithm(optimizer_class=optimizer_class, atom=atom, **traits)


def _newton_schulz(shape: Shape) -> int:
    """Five iterations of products of ``(m, n)`` by ``(n, m)``, ``m`` the smaller."""
    return max(shape) * min(shape) ** 2 if shape else 1


def _row_variance(shape: Shape) -> Shape:
    return (*shape[:-1], 1)


def _column_variance(shape: Shape) -> Shape:
    return (*shape[:-2], 1, shape[-1])


_CPU_AND_CUDA = frozenset({"cpu", "cuda"})
_DENSE_AND_SPARSE = frozenset({torch.strided, torch.sparse_coo})
_optim = torch.optim

for _class, _names in {
    _optim.Adamax: ("exp_avg", "exp_inf"),
    _optim.NAdam: ("exp_avg", "exp_avg_sq"),
    _optim.RAdam: ("exp_avg", "exp_avg_sq"),
    _optim.Adadelta: ("square_avg", "acc_delta"),
    _optim.RMSprop: ("square_avg", "momentum_buffer", "grad_avg"),
    _optim.Rprop: ("prev", "step_size"),
    _optim.ASGD: ("ax",),
}.items():
    _know(_class, Atom.ELEMENT, per_element=frozenset(_names))
for _class in (_optim.Adam, _optim.AdamW):
    _know(
        _class,
        Atom.ELEMENT,
        per_element=frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        fused=lambda group: True,
        fused_devices=_CPU_AND_CUDA,
    )
_know(
    _optim.Adagrad,
    Atom.ELEMENT,
    per_element=frozenset({"sum"}),
    gradient_layouts=_DENSE_AND_SPARSE,
    coalesces=True,
    fused=lambda group: True,
    fused_devices=frozenset({"cpu"}),
)
_know(
    _optim.SGD,
    Atom.ELEMENT,
    per_element=frozenset({"momentum_buffer"}),
    gradient_layouts=_DENSE_AND_SPARSE,
    # With momentum its fused kernel fails when a first gradient comes late; on a CPU it leaves
    # parameters of 16 bits where they are (torch 2.13).
    fused=lambda group: group["momentum"] == 0,
    fuses_16_bits_on_cpu=False,
    fused_devices=_CPU_AND_CUDA,
)
_know(
    _optim.Adafactor,
    Atom.TENSOR,
    per_element=frozenset({"variance"}),
    shapes={"row_var": _row_variance, "col_var": _column_variance},
)
_know(
    _optim.Muon,
    Atom.TENSOR,
    per_element=frozenset({"momentum_buffer"}),
    cost=_newton_schulz,
    faster=BatchedMuon,
)
_know(
    _optim.SparseAdam,
    Atom.ROW,
    per_element=frozenset({"exp_avg", "exp_avg_sq"}),
    gradient_layouts=frozenset({torch.sparse_coo}),
    coalesces=True,
)
_know(
    _optim.LBFGS,
    Atom.ELEMENT,
    flat=FLAT_STATE,
    gradient_layouts=_DENSE_AND_SPARSE,
    mixes=False,
    separable=False,
)
