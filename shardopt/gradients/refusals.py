"""Gradients, and whoever brings them, that are refused before a step."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Sequence

import torch

from shardopt.errors import ParameterError, UnsupportedError, warn
from shardopt.layout import Atom
from shardopt.shard import Group, Shard


def refuse_gradients(shard: Shard, *, made_dense: bool) -> None:
    """Refuse gradients that cannot be cut as their parameters are.

    Args:
        shard: the parameters.
        made_dense: whether sparse gradients become dense on their way, but for those cut by rows.
    """
    for index, (name, parameter) in enumerate(zip(shard.names, shard.parameters, strict=True)):
        grad = parameter.grad
        atom = shard.layout.atom_of(index)
        if grad is None or atom is Atom.TENSOR:
            continue
        if made_dense and atom is Atom.ROW and grad.is_sparse and grad.sparse_dim() != 1:
            raise ParameterError(
                f"parameter {name!r}: expected a gradient with one sparse dimension, as of an "
                f"embedding, got {grad.sparse_dim()}; use gradients='replicated'"
            )
        algorithm = shard.algorithm_of(index)
        allowed = algorithm.gradient_layouts
        if grad.layout not in allowed and not (made_dense and torch.strided in allowed):
            expected = "dense" if torch.strided in allowed else "sparse"
            remedy = (
                "use sparse=False in its embedding, or assign parameter.grad.to_dense()"
                if expected == "dense"
                else "use sparse=True in its embedding, or a class that takes dense ones (Adam)"
            )
            raise ParameterError(
                f"parameter {name!r}: expected a {expected} gradient for "
                f"{algorithm.optimizer_class.__name__}, got {grad.layout}; {remedy}"
            )


def refuse_abandoned(shard: Shard, reduced: Collection[int], *, warns: bool) -> None:
    """Refuse parameters without a gradient that no model has any more, or warn of them.

    Args:
        shard: the parameters.
        reduced: indices of those whose gradient has been reduced.
        warns: whether parameters may have no gradient: then it is a warning.
    """
    parameters = shard.parameters
    references = [sys.getrefcount(parameter) for parameter in parameters]
    for index, (parameter, count) in enumerate(zip(parameters, references, strict=True)):
        has_gradient = parameter.grad is not None or index in reduced
        if has_gradient or not parameter.requires_grad or count > _OUR_REFERENCES:
            continue
        text = (
            f"parameter {shard.names[index]!r} has no gradient, and nothing but the optimizer "
            "holds it any more: the model has another now, as after load_state_dict(assign=True), "
            "or when a model and its optimizer are deep-copied apart; construct ShardedOptimizer "
            "after that, load with assign=False, or copy both at once: copy.deepcopy((model, "
            "optimizer))"
        )
        if not warns:
            raise ParameterError(text)
        warn(text)
        return


# Of a parameter that nobody else holds: those of a list, of the loop and of the call, which Python
# versions count differently, and that of its group.
_OUR_REFERENCES = next(sys.getrefcount(item) for item in [object()]) + 1


def refuse_ddp(groups: Sequence[Group]) -> None:
    """Refuse parameters of a model under DistributedDataParallel, which would reduce them too."""
    classes = _with_subclasses(torch.nn.parallel.DistributedDataParallel)
    things = gc.get_objects()  # some 200,000, which a loop in Python takes long to go through
    if classes.isdisjoint(map(type, things)):
        return
    ours = {id(parameter) for group in groups for parameter in group["params"]}
    for thing in things:
        if type(thing) in classes and any(id(p) in ours for p in thing.parameters()):
            raise UnsupportedError(
                "the model is wrapped in DistributedDataParallel, which averages gradients itself; "
                "pass gradients='replicated', or use the model without DistributedDataParallel"
            )


def _with_subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))
