"""Policies: frozen, keyword-only values that say how an optimizer behaves, not what it computes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Guards:
    """What is checked so that a wrong job stops instead of training on.

    Args:
        replicas: compare what must be equal on every rank because nothing reduces it:
            parameter values at construction, and gradients at the first step. Costs one hash of
            each tensor, once. Switch off only where ranks differ on purpose.

    Example:
        >>> optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW,
        ...                              guards=Guards(replicas=False))
    """

    replicas: bool = True
