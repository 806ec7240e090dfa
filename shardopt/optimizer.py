"""``ShardedOptimizer``: any ``torch.optim`` algorithm with 1/N of its state on each of N ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from shardopt.algos import algorithm_for
from shardopt.comm import Collectives, choose_collectives
from shardopt.errors import StaleStateError
from shardopt.guard import agree, agree_on_success, agree_on_tensors
from shardopt.policies import Guards
from shardopt.shard import Group, LocalState, Shard
from shardopt.state import consolidate, load
from shardopt.validation import (
    check_rank,
    list_group,
    listed,
    probe,
    refuse_gradients,
    refuse_groups,
    refuse_policies,
    stand_in,
)

_log = logging.getLogger("shardopt")


class ShardedOptimizer(Optimizer):
    """A ``torch.optim`` optimizer whose state is sharded over ranks (ZeRO stage 1).

    Computes what ``optimizer_class`` computes on one device, with about 1/N of the optimizer
    state on each of N ranks, and has the same ``param_groups`` and the same consolidated
    ``state_dict``. Without a process group it is one process and the same code.

    Construction is collective: all ranks must bring the same parameters, options and values.
    The parameters become views of flat buffers; they stay the same objects.

    Args:
        params: parameters, named parameters, or dicts of groups, as for any optimizer.
        optimizer_class: any subclass of ``torch.optim.Optimizer``. The element-wise ones of
            ``torch.optim`` are cut evenly; others get whole parameters, placed by cost, and must
            update each parameter from its own gradient and state alone.
        process_group: whose ranks share the state: ``None`` (all), a ``ProcessGroup``, a 1-D
            ``DeviceMesh``, or a ``Collectives``.
        gradients: ``"replicated"``: ``.grad`` is the averaged gradient on every rank when ``step``
            is called (by DDP or by hand).
        kernel: ``"torch"``: the class with the user's ``foreach`` and ``fused``, bit for bit.
            ``"auto"``: the same, but torch's fused kernel where the class has one and the user
            chose neither flag; bit for bit the class with ``fused=True``.
        guards: what is checked while training.
        bucket_cap_mb: size of the buffers that are communicated as one, in MiB.
        **options: options of ``optimizer_class`` (``lr=3e-4, weight_decay=0.1``).

    Raises:
        TypeError, ValueError, RuntimeError: what ``optimizer_class`` raises for bad options.
        UnsupportedError: something shardopt does not do.
        AgreementError: on every rank, if ranks bring different things.

    Example:
        >>> model = DistributedDataParallel(model)
        >>> optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=3e-4)
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()
        >>> optimizer.consolidate_state_dict(to=0)        # on every rank
        >>> if rank == 0:
        ...     torch.save(optimizer.state_dict(), "optimizer.pt")

    References:
        ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (arXiv:1910.02054).
    """

    _built = False  # torch's constructor adds the groups one by one before there are shards
    _served: dict[Any, Any] | None = None  # what ``state`` shows while ``state_dict`` packs it

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
        self.collectives: Collectives = choose_collectives(process_group)
        self.optimizer_class = optimizer_class
        self.guards = Guards() if guards is None else guards
        self._num_steps = 0
        self._has_history = False  # a step was taken or a state loaded
        self._consolidated: dict[Any, Any] | None = None
        algorithm = algorithm_for(optimizer_class)
        policies = {
            "gradients": gradients,
            "kernel": kernel,
            "guards": self.guards,
            "bucket_cap_mb": bucket_cap_mb,
        }
        error = None
        try:
            entries = listed(params)
            super().__init__(entries, probe(optimizer_class, entries, options).defaults)
            refuse_policies(algorithm, **policies)
            refuse_groups(self.param_groups, self._names())
        except Exception as problem:  # any class may raise anything; every rank hears of it
            error = problem
        agree_on_success(self.collectives, error)
        self._shard = Shard(
            algorithm,
            self.collectives,
            kernel=kernel,
            bucket_bytes=int(bucket_cap_mb * (1 << 20)),
            options=options,
        )
        name = f"{optimizer_class.__module__}.{optimizer_class.__qualname__}"
        self._build(self.param_groups, {"the optimizer class": name, **policies})
        self._built = True

    # -- groups --------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, at any time. Collective; see ``torch.optim.Optimizer.add_param_group``.

        If it is refused, on any rank, the optimizer stays as it was.
        """
        if not self._built:
            super().add_param_group(param_group)
            return
        num_known, error = len(self.param_groups), None
        try:
            list_group(param_group)
            probe(self.optimizer_class, [param_group], self._shard.options)
            super().add_param_group(param_group)
            refuse_groups(self.param_groups, self._names())
        except Exception as problem:
            error = problem
        try:
            agree_on_success(self.collectives, error)
            self._build(self.param_groups[num_known:], {})
        except Exception:
            del self.param_groups[num_known:]
            raise
        self._consolidated = None

    def _build(self, groups: list[Group], facts: dict[str, object]) -> None:
        """Agree with the other ranks on new ``groups``, then move their parameters into buckets."""
        names = self._names()[len(self._shard.parameters) :]
        layout = self._shard.plan(groups, names)
        new = list({id(p): p for group in groups for p in group["params"]}.values())
        for number, group in enumerate(groups, len(self.param_groups) - len(groups)):
            facts[f"the number of parameters of group {number}"] = len(group["params"])
            options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            facts |= {f"group {number}, {key}": value for key, value in options.items()}
        for name, parameter in zip(names, new, strict=True):
            facts[f"parameter {name!r}"] = (
                f"{tuple(parameter.shape)} {parameter.dtype} on {parameter.device.type}, "
                f"strides {parameter.stride()}, requires_grad={parameter.requires_grad}"
            )
        facts["the layout"] = str(layout)
        agree(
            self.collectives,
            facts,
            "construct the model and ShardedOptimizer alike on every rank, in the same order",
        )
        if self.guards.replicas:
            agree_on_tensors(
                self.collectives,
                names,
                new,
                "value",
                "seed every rank alike, wrap the model in DistributedDataParallel before "
                "constructing ShardedOptimizer, or broadcast the parameters from rank 0",
            )
        self._shard.extend(layout, groups)

    def _names(self) -> list[str]:
        """A name for every parameter, for messages: the user's, or its number and shape."""
        names: dict[int, str] = {}
        for group in self.param_groups:
            given = group.get("param_names") or [None] * len(group["params"])
            for parameter, name in zip(group["params"], given, strict=True):
                unnamed = f"{len(names)}, of shape {tuple(parameter.shape)}"
                names.setdefault(id(parameter), name or unnamed)
        return list(names.values())

    # -- stepping ------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter from its ``.grad``. Collective.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients on.

        Returns:
            The closure's loss, or ``None``.

        Raises:
            ParameterError: a parameter has another shape, dtype or device than at construction.
            AgreementError: at the first step, if the gradients differ between ranks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._consolidated = None
        self._check_step()
        with torch.no_grad():
            self._shard.update(self.param_groups)
            self._gather()
        self._has_history = True
        self._num_steps += 1
        return loss

    def _check_step(self) -> None:
        """Take parameters back that left their buckets; at the first step, compare gradients."""
        error = None
        try:
            self._shard.buffers.take_back(self._shard.names)
            shard = self._shard
            refuse_gradients(shard.parameters, shard.names, shard.algorithm)
        except Exception as problem:
            if self._num_steps > 0:
                raise
            error = problem
        if self._num_steps > 0:
            return
        agree_on_success(self.collectives, error)
        if self.guards.replicas:
            agree_on_tensors(
                self.collectives,
                self._shard.names,
                [parameter.grad for parameter in self._shard.parameters],
                "gradient",
                "with gradients='replicated' every rank needs the averaged gradient: wrap the model "
                "in DistributedDataParallel, or all-reduce .grad before step()",
            )
        if self.collectives.world_size > 1 and self.collectives.rank == 0:
            _log.info(
                "the optimizer state is sharded over %d ranks; to save it, call "
                "optimizer.consolidate_state_dict(to=0) on every rank, then optimizer.state_dict() "
                "on rank 0",
                self.collectives.world_size,
            )

    def _gather(self) -> None:
        """All-gather every bucket, in order; then tell autograd that parameters have changed."""
        shard = self._shard
        handles = [
            self.collectives.all_gather(buffer, bucket.borders)
            for buffer, bucket in zip(shard.buffers.buckets, shard.layout.buckets, strict=True)
        ]
        for handle in handles:
            handle.wait()
        changed = [parameter for parameter in shard.parameters if parameter.grad is not None]
        torch.autograd.graph.increment_version(changed)

    # -- state ---------------------------------------------------------------------------------

    @property
    def optim(self) -> Optimizer:
        """The local optimizer over this rank's segments, for tools that look."""
        return self._shard.optim

    @property
    def state(self) -> Any:
        """Parameter -> state of this rank's part of it. Use ``state_dict`` for the whole."""
        return LocalState(self._shard) if self._served is None else self._served

    @state.setter
    def state(self, value: Any) -> None:
        """Torch's constructor sets it empty; the state lives in the local optimizer."""

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Put the full state together in CPU memory of rank ``to``. Collective.

        ``state_dict()`` then returns it there until the next step; one bucket at a time travels.

        Args:
            to: a rank of the group, or ``None`` for every rank.

        Raises:
            ValueError: no such rank.
            AgreementError: ranks call it for different targets or after different steps.
        """
        check_rank("to", to, self.collectives.world_size)
        agree(
            self.collectives,
            {"consolidate_state_dict(to=)": to, "the number of steps": self._num_steps},
            "call consolidate_state_dict alike on every rank, after the same step",
        )
        if self.collectives.world_size > 1:
            full = consolidate(self._shard, to)
            parameters = self._shard.parameters
            self._consolidated = {
                parameters[key] if isinstance(key, int) else key: state for key, state in full.items()
            }

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's form, with full tensors; loads into plain ``torch.optim``.

        On several ranks it is the copy that ``consolidate_state_dict`` made, which the next step
        drops; ranks that were not its target get the groups and empty state. Before the first
        step it is what the class has at construction.

        Raises:
            StaleStateError: on several ranks, without a fresh copy.
        """
        if self.collectives.world_size == 1:
            return super().state_dict()
        if self._consolidated is None and self._has_history:
            raise StaleStateError(
                f"the state is sharded over {self.collectives.world_size} ranks and no fresh copy is "
                "here; call optimizer.consolidate_state_dict(to=0) on every rank before state_dict()"
            )
        self._served = self._consolidated
        if self._served is None:
            self._served = self._state_at_construction()
        try:
            return super().state_dict()
        finally:
            self._served = None

    def _state_at_construction(self) -> dict[Any, Any]:
        """What the class has before any step, made without communication (Adagrad has some)."""
        groups, twins = [], {}
        for group in self.param_groups:
            held = [stand_in(p, "cpu") for p in group["params"]]
            twins.update(zip(held, group["params"], strict=True))
            groups.append({**group, "params": held})
            groups[-1].pop("param_names", None)
        fresh = self.optimizer_class(groups, **self._shard.options)
        return {twins.get(key, key): state for key, state in fresh.state.items()}

    def load_state_dict(self, state_dict: Any, from_: int | None = None) -> None:
        """Load a state in torch's form, saved by any world size or by plain torch. Collective.

        The dict is neither changed nor kept.

        Args:
            state_dict: the full state; on ranks other than ``from_``: ``None``.
            from_: the rank that has the state; ``None`` if every rank passes it.

        Raises:
            ValueError: groups or shapes do not fit, named by parameter; on every rank.
        """
        check_rank("from_", from_, self.collectives.world_size)
        agree(self.collectives, {"load_state_dict(from_=)": from_}, "pass the same from_ on every rank")
        if state_dict is not None and (from_ is None or from_ == self.collectives.rank):
            state_dict = copy.copy(state_dict)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                changed = pre_hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
        saved = load(self._shard, self.param_groups, state_dict, from_)
        options = self._shard.options_after_load(saved)
        for group, new, old in zip(self.param_groups, options, saved, strict=True):
            names = {"param_names": old.get("param_names", group.get("param_names"))}
            kept = {"params": group["params"], **({} if names["param_names"] is None else names)}
            group.clear()
            group.update({**new, **kept})
        self._consolidated, self._has_history = None, True
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def agree(self, facts: Mapping[str, object], remedy: str) -> None:
        """Return if every rank brings the same facts. Collective.

        Args:
            facts: what must be equal, by name.
            remedy: what to do otherwise; ends the message.

        Raises:
            AgreementError: on every rank, naming the first difference, the rank and both values.
        """
        agree(self.collectives, facts, remedy)

    # -- copies --------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedOptimizer:
        """A copy over copies of the parameters; it shares the process group."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        plain = {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_")}
        for shared in ("collectives", "_shard", "step", "_consolidated"):
            plain.pop(shared, None)
        twin.__dict__.update(copy.deepcopy(plain, memo))
        twin.collectives, twin._consolidated = self.collectives, None
        twin.__setstate__({})
        twin._shard = self._shard.clone(twin.param_groups)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a process group cannot be pickled."""
        raise TypeError(
            "ShardedOptimizer cannot be pickled, since it holds a process group; save "
            "optimizer.state_dict() after optimizer.consolidate_state_dict(), and load it into a "
            "new ShardedOptimizer"
        )
