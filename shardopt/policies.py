"""Policies: frozen, keyword-only values that say how an optimizer behaves, not what it computes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Guards:
    """What is checked so that a wrong job stops instead of training on.

    Args:
        replicas: compare what must be equal on every rank because nothing reduces it:
            parameter values at construction, and gradients at the first step. Costs one hash of
            each tensor, once. Switch off only where ranks differ on purpose.
        nonfinite: what a step does when a gradient holds an inf or a NaN on any rank:
            ``"ignore"`` trains on, as torch does; ``"skip"`` leaves parameters and state as they
            are on every rank, and logs a warning; ``"raise"`` raises ``GradientError`` on every
            rank. The message names the parameter, and the rank where the backend tells.
        find_unused_parameters: with ``gradients="local"`` or ``"sharded"``, whether a parameter
            may be without a gradient: it is then updated if any rank has one, from the mean over
            all ranks (DDP's meaning). Otherwise a missing gradient raises ``GradientError``.

    Example:
        >>> optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW,
        ...                              guards=Guards(nonfinite="skip"))
    """

    replicas: bool = True
    nonfinite: str = "ignore"
    find_unused_parameters: bool = False

    def __post_init__(self) -> None:
        choices = ("ignore", "skip", "raise")
        if self.nonfinite not in choices:
            raise ValueError(f"nonfinite: expected one of {choices}, got {self.nonfinite!r}")
