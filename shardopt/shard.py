"""One rank's part of the optimizer: its segments, and the stock class that updates them.

The class gets one tensor to a segment: a whole parameter in its own shape, a part as a 1-D tensor.
Nothing merges, so nothing has to split, and presence is torch's own rule: a segment without a
gradient is skipped. Bit for bit what the class computes on whole parameters, since an element-wise
update does not care where a tensor is cut on 64-element borders.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from shardopt.algos import Algorithm, algorithm_for
from shardopt.algos.mixture import CLASS, class_name, instance_of, joined
from shardopt.buffers import ParameterBuffers, no_elements
from shardopt.comm import Collectives
from shardopt.errors import ParameterError, UnsupportedError
from shardopt.layout import Layout, ParameterSpec, Segment, plan_layout

Group = dict[str, Any]
NOT_OPTIONS = ("params", "param_names")


class Shard:
    """The local optimizer over this rank's segments, and the buckets they are views of.

    Attributes:
        layout: where every parameter lies; the same on every rank.
        buffers: the parameters and their memory.
        names: of the parameters, for messages.
        segments: parameter index -> its segment on this rank and the tensor the class updates.
        algorithms: how the class of each group is sharded.
        optim: the local instance of the optimizer class, one group to each of the user's; a
            ``Mixture`` of instances where groups name classes of their own.
        num_added: numbers of groups, those of the constructor first, that came at one time.
    """

    optim: Optimizer

    def __init__(
        self,
        optimizer_class: type[Optimizer],  # of groups that name none
        collectives: Collectives,
        *,
        kernel: str,
        bucket_bytes: int,
        options: Mapping[str, Any],  # of the class, as its constructor takes them
    ):
        self.optimizer_class = optimizer_class
        self.collectives = collectives
        self.kernel = kernel
        self.bucket_bytes = bucket_bytes
        self.options = dict(options)
        self.layout = Layout((), collectives.world_size, ())
        self.buffers = ParameterBuffers(collectives)
        self.segments: dict[int, tuple[Segment, Tensor]] = {}
        self.names: list[str] = []
        self.num_added: list[int] = []
        self._index: dict[int, int] = {}  # id of the user's tensor -> parameter index
        self.algorithms: list[Algorithm] = []  # by group
        self._algorithm_of: list[Algorithm] = []  # by parameter
        self._may_fuse: list[bool] = []  # by group
        self._members: list[tuple[str, list[int]]] = []  # by group: its class, its parameters' ids

    # -- building ------------------------------------------------------------------------------

    def plan(
        self, groups: Sequence[Group], algorithms: Sequence[Algorithm], names: Sequence[str]
    ) -> Layout:
        """The layout with the parameters of new ``groups`` added. Moves nothing."""
        parameters = unique_parameters(groups)
        per_parameter = by_parameter(groups, algorithms)
        devices = list(dict.fromkeys(p.device for p in [*self.parameters, *parameters]))
        specs = [
            ParameterSpec(
                name=name,
                shape=tuple(parameter.shape),
                dtype=parameter.dtype,
                device=devices.index(parameter.device),
                cost=algorithm.cost(tuple(parameter.shape)),
            )
            for name, parameter, algorithm in zip(names, parameters, per_parameter, strict=True)
        ]
        return plan_layout(
            specs,
            [algorithm.atom for algorithm in per_parameter],
            world_size=self.collectives.world_size,
            bucket_bytes=self.bucket_bytes,
            extend=self.layout,
        )

    def extend(
        self,
        layout: Layout,
        groups: Sequence[Group],
        algorithms: Sequence[Algorithm],  # of the new groups
        guard: AbstractContextManager[None] | None = None,
    ) -> None:
        """Move the parameters of new ``groups`` into buckets and give the class their segments.

        The class is constructed within ``guard``. If it raises there, the shard is as it was; the
        parameters stay usable where they lie.
        """
        known, first_bucket = self.layout, len(self.layout.buckets)
        parameters = unique_parameters(groups)
        for index, parameter in enumerate(parameters, len(self.parameters)):
            self._index[id(parameter)] = index
        self.buffers.adopt(layout, parameters)
        self.layout = layout
        self.names = [spec.name for spec in layout.parameters]
        for number, bucket in list(enumerate(layout.buckets))[first_bucket:]:
            for segment in bucket.segments(self.collectives.rank):
                tensor = self.buffers.segment(number, segment)
                tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex())
                self.segments[segment.parameter] = (segment, tensor)
        self.algorithms += algorithms
        self._algorithm_of += by_parameter(groups, algorithms)
        for group, algorithm in zip(groups, algorithms, strict=True):
            self._may_fuse.append(algorithm.may_fuse(group["params"]))
        try:
            with guard or nullcontext():
                fresh = self._construct(groups)
        except Exception:
            self._retract(known)
            raise
        self._take(fresh)
        self.num_added.append(len(groups))
        self._members += [self._membership(group) for group in groups]

    def _retract(self, known: Layout) -> None:
        """Undo the part of ``extend`` that went before a failure."""
        for parameter in self.parameters[len(known.parameters) :]:
            self.segments.pop(self._index.pop(id(parameter)), None)
        self.buffers.release(known)
        self.layout = known
        self.names = self.names[: len(known.parameters)]
        del self._algorithm_of[len(known.parameters) :]
        for by_group in (self.algorithms, self._may_fuse):
            del by_group[len(self._members) :]

    def _construct(self, groups: Sequence[Group]) -> Optimizer:
        """An instance of the class over this rank's segments of new ``groups``."""
        first = len(self._members)
        local = []
        for number, group in enumerate(groups, first):
            held = [self._index[id(parameter)] for parameter in group["params"]]
            tensors = [self.segments[index][1] for index in held if index in self.segments]
            if self.flat:
                tensors.insert(0, no_elements(group["params"]))
            local.append({**self.inner_options(number, group), "params": tensors})
        with _told_of_duplicates():
            fresh = self.instance(local, first)
        if len(fresh.param_groups) != len(local):
            raise UnsupportedError(
                f"{type(fresh).__name__} makes {len(fresh.param_groups)} groups out of "
                f"{len(local)}; shardopt needs one to each of yours"
            )
        return fresh

    def instance(self, groups: Sequence[Group], first: int = 0) -> Optimizer:
        """An instance of the class or classes over stand-ins for the groups from ``first`` on."""
        classes = [algorithm.class_for(self.kernel) for algorithm in self.algorithms]
        named = [
            {**group, CLASS: classes[number]} if CLASS in group else group
            for number, group in enumerate(groups, first)
        ]
        main = algorithm_for(self.optimizer_class).class_for(self.kernel)
        return instance_of(main, named, self.options)

    def _take(self, fresh: Optimizer) -> None:
        """Adopt a new instance, or its groups."""
        with _told_of_duplicates():
            known = getattr(self, "optim", None)
            self.optim = joined(known, fresh, self.options) if known else fresh

    def class_of(self, group: Group) -> str:
        """The full name of a group's class, as the group has it."""
        return str(group.get(CLASS, class_name(self.optimizer_class)))

    def _membership(self, group: Group) -> tuple[str, list[int]]:
        return self.class_of(group), [id(parameter) for parameter in group["params"]]

    def check_groups(self, groups: Sequence[Group]) -> None:
        """Refuse groups whose parameters or classes are not those that were built."""
        members = [self._membership(group) for group in groups]
        if members == self._members:
            return
        pairs = zip_longest(members, self._members)
        number = next(i for i, (now, built) in enumerate(pairs) if now != built)
        raise ParameterError(
            "param_groups: expected the groups, their parameters and classes as they were built, "
            f"got others from group {number} on; use add_param_group, or construct "
            "ShardedOptimizer anew and load the state"
        )

    # -- stepping ------------------------------------------------------------------------------

    @property
    def parameters(self) -> list[Tensor]:
        """The user's tensors, in order of registration, each once."""
        return self.buffers.parameters

    def inner_options(
        self, number: int, group: Group, sparse: frozenset[int] = frozenset()
    ) -> Group:
        """A group's options as the class gets them: with our choice where the user made none.

        torch's fused kernels take no ``sparse`` gradients.
        """
        options = {key: value for key, value in group.items() if key not in NOT_OPTIONS}
        free = group.get("fused") is None and group.get("foreach") is None
        if (
            self.kernel == "auto"
            and free
            and self._may_fuse[number]
            and self.algorithms[number].fused(group)
            and not (
                sparse and any(self.index(parameter) in sparse for parameter in group["params"])
            )
        ):
            options["fused"] = True
        return options

    def load_groups(self, saved: Sequence[Group]) -> list[Group]:
        """Saved options as the class should load them, with the hidden choice of kernel."""
        return [self.inner_options(number, group) for number, group in enumerate(saved)]

    def options_after_load(self, saved: Sequence[Group]) -> list[Group]:
        """What the class made of saved options (defaults added), without the hidden choice."""
        return [
            {
                key: group.get(key) if key == "fused" else value
                for key, value in inner.items()
                if key not in NOT_OPTIONS
            }
            for inner, group in zip(self.optim.param_groups, saved, strict=True)
        ]

    @property
    def flat(self) -> frozenset[str]:
        """Names of state that is vectors over all parameters, of a class that has such."""
        return self.algorithms[0].flat if self.algorithms else frozenset()

    def algorithm_of(self, index: int) -> Algorithm:
        """How a parameter is sharded."""
        return self._algorithm_of[index]

    def holds(self, parameter: Tensor) -> bool:
        """Whether it is one of the user's tensors here."""
        return id(parameter) in self._index

    def index(self, parameter: Tensor) -> int:
        """The index of one of the user's tensors. Raises ``KeyError`` for any other tensor."""
        return self._index[id(parameter)]


@contextmanager
def _told_of_duplicates() -> Iterator[None]:
    """The user's own group has warned of duplicate parameters; the class over segments need not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "optimizer contains a parameter group with dup")
        yield


def unique_parameters(groups: Sequence[Group]) -> list[Tensor]:
    """The parameters of ``groups`` in order, each once."""
    return list({id(p): p for group in groups for p in group["params"]}.values())


def by_parameter(groups: Sequence[Group], algorithms: Sequence[Algorithm]) -> list[Algorithm]:
    """The algorithm of each of ``unique_parameters(groups)``."""
    pairs = zip(groups, algorithms, strict=True)
    return list({id(p): algorithm for group, algorithm in pairs for p in group["params"]}.values())
