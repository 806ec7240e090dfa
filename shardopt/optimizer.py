"""``ShardedOptimizer``: any ``torch.optim`` algorithm with 1/N of its state on each of N ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardopt import evaluation, update, validation
from shardopt.algos import Algorithm
from shardopt.algos.registry import algorithms_for
from shardopt.arrivals import Arrivals
from shardopt.checks import CheckedOptimizer
from shardopt.comm import Collectives, choose_collectives
from shardopt.comm.watch import watch
from shardopt.gradients import GradientMethods, Gradients, gradients_of, refuse_ddp
from shardopt.guard import agree, agree_on_values, all_or_none
from shardopt.inner import InnerMethods
from shardopt.local_state import clone
from shardopt.policies import Guards
from shardopt.shard import Group, Shard, unique_parameters
from shardopt.state import Snapshot, StatefulOptimizer


class ShardedOptimizer(CheckedOptimizer, GradientMethods, StatefulOptimizer, InnerMethods):
    """A ``torch.optim`` optimizer whose state is sharded over ranks (ZeRO stage 1).

    Computes what ``optimizer_class`` computes on one device, with about 1/N of the optimizer
    state on each of N ranks, and has the same ``param_groups`` and the same consolidated
    ``state_dict``. Without a process group it is one process and the same code.

    Construction is collective: all ranks bring the same parameters, options and values. The
    parameters become views of flat buffers; they stay the same objects.

    Public methods that the class has of its own (schedule-free's ``train()`` and ``eval()``) are
    methods of this, too: all ranks call them alike, and they see no gradients.

    Args:
        params: parameters, named parameters, or dicts of groups, as for any optimizer. A group
            that has ``"optimizer_class"`` is that class's, with its defaults and no ``options``.
        optimizer_class: any subclass of ``torch.optim.Optimizer``. The element-wise ones of
            ``torch.optim``, and LBFGS (its memory: ``algos/lbfgs.py``), are cut evenly; others get
            whole parameters, placed by cost, and must update each from its own gradient and state.
        process_group: whose ranks share the state: ``None`` (all), a ``ProcessGroup``, a
            ``DeviceMesh`` (1-D, or 2-D: replicate x shard), an ``MPI.Comm``, or a ``Collectives``.
        gradients: what ranks bring in ``.grad``. ``"replicated"``: the averaged gradient (by DDP
            or by hand). ``"local"``: each its own; shardopt averages, while backward goes on.
            ``"sharded"``: the same, and frees each gradient as it is averaged: a rank keeps its
            shard (ZeRO stage 2). Both broadcast the first rank's parameters, and end a ``step``
            with ``.grad`` as ``None``.
        kernel: ``"torch"``: the class with the user's ``foreach`` and ``fused``, bit for bit.
            ``"auto"``: the same, but torch's fused kernel where the class has one that is safe
            (Adam, AdamW, SGD without momentum, Adagrad on a CPU) and the user chose neither flag;
            Muon in batches, near to the class (``shardopt/algos/muon.py``).
        guards: what is checked while training, and what happens then.
        bucket_cap_mb: size of the buffers that are communicated as one, in MiB.
        **options: options of ``optimizer_class`` (``lr=3e-4, weight_decay=0.1``).

    Raises:
        TypeError, ValueError, RuntimeError: what ``optimizer_class`` raises for bad options.
        UnsupportedError, AgreementError: what shardopt does not do; ranks that differ.

    Example:
        >>> model = DistributedDataParallel(model)
        >>> optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=3e-4)
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()
        >>> optimizer.consolidate_state_dict(to=0)        # on every rank
        >>> if rank == 0:
        ...     torch.save(optimizer.state_dict(), "optimizer.pt")

    References:
        ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv:1910.02054.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: type[Optimizer],
        process_group: Any = None,
        *,
        gradients: str = "replicated",
        kernel: str = "auto",
        guards: Guards | None = None,
        bucket_cap_mb: float = 25.0,
        **options: Any,
    ):
        self.guards = Guards() if guards is None else guards
        limit = getattr(guards, "deadline", None)  # what else guards may be is refused below
        self.collectives: Collectives = choose_collectives(process_group, limit)
        self.optimizer_class, self._kind = optimizer_class, gradients
        self._means_all_ranks = process_group is None
        policies = {"gradients": gradients, "kernel": kernel, "guards": self.guards}
        with all_or_none(self.collectives):
            entries = validation.listed(params)
            super().__init__(entries, validation.probe(optimizer_class, entries, options).defaults)
            validation.refuse_policies(**policies, bucket_cap_mb=bucket_cap_mb)
            algorithms = algorithms_for(entries, optimizer_class)
            validation.refuse_parameters(self.param_groups, algorithms)
            evaluation.refuse(algorithms, self.param_groups, self.guards)
            if gradients != "replicated":
                refuse_ddp(self.param_groups)
        self._shard = Shard(
            optimizer_class,
            self.collectives,
            kernel=kernel,
            bucket_bytes=int(bucket_cap_mb * (1 << 20)),
            options=options,
        )
        self._snapshot, self._arrivals = Snapshot(self._shard), Arrivals(self._shard)
        self._gradients = self._make_gradients()
        facts = {"the optimizer class": self._shard.class_of({}), **policies}
        self._build(self.param_groups, algorithms, facts)
        watch(self.collectives, limit)  # on which ranks have agreed
        self._built = True

    # -- groups --------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, at any time. Collective. Refused on any rank, it is added on none."""
        if not self._built:
            super().add_param_group(param_group)
            return
        with self.collectives.during("add_param_group()"):
            self._add_built_group(param_group)

    def _add_built_group(self, param_group: Group) -> None:
        num_known = len(self.param_groups)
        try:
            with all_or_none(self.collectives):
                validation.list_group(param_group)
                validation.probe(self.optimizer_class, [param_group], self._shard.options)
                algorithms = algorithms_for([param_group], self.optimizer_class)
                super().add_param_group(param_group)
                everything = [*self._shard.algorithms, *algorithms]
                validation.refuse_parameters(self.param_groups, everything)
                evaluation.refuse(everything, self.param_groups, self.guards)
            self._build(self.param_groups[num_known:], algorithms, {})
        except Exception:
            del self.param_groups[num_known:]
            raise
        self._snapshot.forget()

    def _build(
        self, groups: list[Group], algorithms: list[Algorithm], facts: dict[str, object]
    ) -> None:
        """Agree with the other ranks on new ``groups``, then move their parameters into buckets."""
        known = len(self._shard.parameters)
        names = validation.parameter_names(self.param_groups)[known:]
        layout = self._shard.plan(groups, algorithms, names)
        first = len(self.param_groups) - len(groups)
        facts = {
            **facts,
            **validation.group_facts(groups, names, first, known),
            "the layout": str(layout),
        }
        remedy = "construct the model and ShardedOptimizer alike on every rank, in the same order"
        agree(self.collectives, facts, remedy)
        if self.guards.replicas and not self._gradients.reduces:
            agree_on_values(self.collectives, names, unique_parameters(groups))
        first_bucket = len(self._shard.layout.buckets)
        self._shard.extend(layout, groups, algorithms, all_or_none(self.collectives))
        if self._gradients.reduces:
            update.broadcast(self._shard, first_bucket)
        self._gradients.extend()

    def _make_gradients(self) -> Gradients:
        def facts(norm_type: float | None) -> dict[str, object]:
            does = "step()" if norm_type is None else f"clip_grad_norm_(norm_type={norm_type})"
            counted = {
                "the number of steps": self._num_steps,
                "what is called": does,
                "the number of groups": len(self.param_groups),
            }
            return counted | validation.option_facts(self.param_groups, wait_for_device=False)

        return gradients_of(self._kind, self._shard, self.guards, facts)

    # -- stepping ------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter from its ``.grad``. Collective.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients on.
                ``LBFGS`` needs one that clears gradients too, and calls it as often as torch does.

        Returns:
            The closure's loss, or ``None``; with ``LBFGS`` the mean over ranks of the first loss.

        Raises:
            ParameterError: a parameter has another shape, dtype or device than at construction.
            GradientError: a gradient is missing, not finite or changed too late, see ``Guards``.
            AgreementError: ranks differ in options, in steps taken, in which gradients they have,
                or in gradients that should be the same; see ``Guards``.
            DeadlineError: a rank did not come in time, see ``Guards``.
        """
        with self.collectives.during("step()", self._num_steps + 1):
            return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if self._shard.flat:
            parts = (self._shard, self._arrivals, self._gradients)
            checks = (self._compare_replicas_if_due, self._check, self._check_alone)
            loss = evaluation.search(closure, *parts, self.param_groups, checks)
            self._num_steps += 1
            return loss
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._arrivals.wait()
        verdict = self._gradients.settle(self._check())
        self._compare_replicas_if_due()
        if not verdict.skips:
            with torch.no_grad():
                self._update(verdict.present, guarded=self._num_steps == 0)
            self._num_steps += 1
        self._gradients.consume()
        return loss

    def _update(self, present: frozenset[int], guarded: bool) -> None:
        """Update this rank's shard, and start to gather a bucket as soon as it is updated."""
        gradients, shard = self._gradients, self._shard
        buckets = update.update_buckets(shard, self.param_groups, gradients.of, gradients.sparse())
        if guarded:  # what a class refuses only when it steps, it refuses where the parameter lies
            with all_or_none(self.collectives):
                buckets = iter(list(buckets))
        self._arrivals.expect(update.gather(shard, buckets, present, gradients.of))

    def overlap_forward(self, model: nn.Module) -> None:
        """Let the next forward, not ``step``, wait for the updated parameters, module by module.

        Whoever takes a parameter out of ``model`` waits for it, and so does the next ``step``. Only
        who holds one since before ``step`` and looks at it before that has to call ``wait()``.

        Args:
            model: the model, or a part of it; not a copy made by ``torch.compile``, which is
                compiled after this.

        Example:
            >>> optimizer.overlap_forward(model)
        """
        self._arrivals.overlap(model)

    def wait(self) -> None:
        """Return when all updated parameters are there; needed after ``overlap_forward`` only."""
        self._arrivals.wait()

    # -- copies --------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedOptimizer:
        """A copy over copies of the parameters; it shares the process group."""
        self._arrivals.wait()
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        plain = {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_")}
        owned = ("collectives", "_shard", "_snapshot", "_gradients", "_arrivals")
        for own in (*owned, "step"):  # which a scheduler patches
            plain.pop(own, None)
        twin.__dict__.update(copy.deepcopy(plain, memo), collectives=self.collectives)
        twin.__setstate__({})
        twin._shard = clone(self._shard, twin.param_groups)
        twin._snapshot = self._snapshot.of(twin._shard)
        twin._arrivals = Arrivals(twin._shard)
        twin._gradients = twin._make_gradients()
        twin._gradients.extend()
        return twin
