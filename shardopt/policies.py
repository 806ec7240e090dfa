"""Policies: frozen, keyword-only values that say how an optimizer behaves, not what it computes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Guards:
    """What is checked so that a wrong job stops instead of training on.

    Args:
        replicas: compare what must be equal on every rank because nothing reduces it:
            parameter values at construction, gradients at the first step, and on a CPU a sample
            of them at every step. Costs one hash of each tensor, once, and a hash of up to 64
            elements a step. Switch off only where ranks differ on purpose.
        check_replicas_every: compare the parameters of all ranks before every so many steps, see
            ``ShardedOptimizer.check_replicas``; 0 for never.
        deadline: how many seconds a rank waits for the others before it raises ``DeadlineError``,
            which names the one that is late, stopped or gone, and where it was last; ``None``: 10
            minutes, and the words of the backend. Longer than what one rank may do alone before
            it constructs the optimizer, or between steps (validate, write logs). Costs a thread
            that tells the store of the process group where its rank is, five times a second. A
            ``Collectives`` passed as ``process_group`` keeps its own time limit.
        nonfinite: what a step does when a gradient holds an inf or a NaN on any rank:
            ``"ignore"`` trains on, as torch does; ``"skip"`` leaves parameters and state as they
            are on every rank, and logs a warning; ``"raise"`` raises ``GradientError`` on every
            rank. The message names the parameter, and the rank where the backend tells.
        find_unused_parameters: with ``gradients="local"`` or ``"sharded"``, whether a parameter
            may be without a gradient: it is then updated if any rank has one, from the mean over
            all ranks (DDP's meaning). Otherwise a missing gradient raises ``GradientError``.

    Example:
        >>> guards = Guards(nonfinite="skip", check_replicas_every=100, deadline=120)
        >>> optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, guards=guards)
    """

    replicas: bool = True
    check_replicas_every: int = 0
    deadline: float | None = None
    nonfinite: str = "ignore"
    find_unused_parameters: bool = False

    def __post_init__(self) -> None:
        choices = ("ignore", "skip", "raise")
        if self.nonfinite not in choices:
            raise ValueError(f"nonfinite: expected one of {choices}, got {self.nonfinite!r}")
        for name in ("replicas", "find_unused_parameters"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"{name}: expected True or False, got {value!r}")
        every, deadline = self.check_replicas_every, self.deadline
        if type(every) is not int or every < 0:
            raise ValueError(
                f"check_replicas_every: expected a number of steps, or 0 for never, got {every!r}"
            )
        if deadline is not None and not (
            isinstance(deadline, (int, float))
            and not isinstance(deadline, bool)
            and 0 < deadline < float("inf")
        ):
            raise ValueError(
                f"deadline: expected a positive number of seconds, or None, got {deadline!r}"
            )
