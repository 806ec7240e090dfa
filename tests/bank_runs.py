"""Trainings of the bank's rows, sharded and plain, that must not differ in a bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from shardopt import ShardedOptimizer
from tests.bank import SECOND, Case
from tests.twins import assert_same

# Two groups. The large parameter of each ends up in a bucket of its own, of 2049 to 3072 elements:
# cut on two ranks, and on three with a part for each.
SHAPES = [[(70, 33), (33,), (5, 7)], [(2500,), (), (40, 5)]]
MATRICES = [[(70, 33), (33, 8), (8, 9)], [(25, 40), (12, 50), (40, 5)]]  # all that Muon takes
TABLES = [[(70, 33), (33,), (5, 7)], [(250, 10), (6, 2, 5), (40, 5)]]  # whose rows are touched
BUCKET_NUMEL = 5000
LARGE = (0, 3)  # the parameters whose gradients come late or never

SAVED_AT, STEPS = 3, 6  # RAdam's rule changes at the sixth step

Presence = Callable[[int, int], bool]  # (step, parameter) -> has it a gradient?
PRESENCE: dict[str, Presence] = {
    "all always": lambda step, index: True,
    "one never": lambda step, index: index != LARGE[0],
    "some late": lambda step, index: index not in LARGE or step >= 2,
    "come and go": lambda step, index: (step + index) % 3 != 0 and step != 2,
}


def presences(case: Case) -> list[str]:
    """The patterns that torch's class itself can take.

    Its fused SGD with momentum fails where some parameters of a group have a momentum buffer
    already and others get their first gradient.
    """
    if case.options.get("fused") and case.options.get("momentum"):
        return ["all always", "one never"]
    return list(PRESENCE)


def set_gradients(
    parameters: list[Parameter], step: int, presence: str, *, of_rows: bool = False
) -> None:
    """The gradients of one step: equal on every rank, different at every step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, parameter in enumerate(parameters):
        shape = parameter.shape
        if of_rows:
            rows = torch.randint(len(parameter), (1 + len(parameter) // 3,), generator=generator)
            shape = torch.Size((len(rows), *shape[1:]))
        gradient = torch.randn(shape, dtype=parameter.dtype, generator=generator)
        if of_rows:
            gradient = sparse(rows, gradient, parameter.shape)
        there = PRESENCE[presence](step, index)
        parameter.grad = gradient.to(parameter.device) if there else None


def sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A gradient of some rows, as an embedding has it: in any order, some twice."""
    return torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=False)


@dataclass
class Training:
    """What is trained and what trains it."""

    case: Case
    parameters: list[Parameter]
    optimizer: Optimizer

    def run(self, presence: str, first: int, last: int) -> Training:
        """Steps ``first`` to ``last``; at step 2 the learning rate of each group is halved."""
        for step in range(first, last):
            set_gradients(self.parameters, step, presence, of_rows=self.case.takes_rows)
            if step == 2:
                for group in self.optimizer.param_groups:
                    group["lr"] = group["lr"] * 0.5
            self.optimizer.step()
        return self

    def saved(self) -> dict[str, Any]:
        """The full state, on the CPU, nothing of it shared with the training; a collective.

        Parameters are in order of their numbers. Torch has them in order of their first
        gradients, which means nothing.
        """
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.consolidate_state_dict(to=None)
            return on_cpu(self.optimizer.state_dict())
        saved = on_cpu(self.optimizer.state_dict())
        return {**saved, "state": dict(sorted(saved["state"].items()))}

    def go_on(self, saved: dict[str, Any] | None, **how: Any) -> Training:
        """A training of the same kind, newly built, that goes on from here with ``saved`` state.

        ``how`` may change the kind: ``kernel=None`` for the plain class, ``from_=0``.
        """
        arguments: dict[str, Any] = {}
        if isinstance(self.optimizer, ShardedOptimizer):
            arguments["kernel"] = "torch"
        arguments |= how
        from_ = {key: arguments.pop(key) for key in ["from_"] if key in arguments}
        parameters = [Parameter(parameter.detach().clone()) for parameter in self.parameters]
        training = build(self.case, parameters, **arguments)
        training.optimizer.load_state_dict(saved, **from_)
        return training


def build(
    case: Case,
    parameters: list[Parameter],
    kernel: str | None = None,  # ``None``: the plain class
    **options: Any,
) -> Training:
    """A training that begins with ``parameters``, in two groups."""
    half = len(parameters) // 2
    groups = [
        {"params": parameters[:half]},
        {"params": parameters[half:], **SECOND[case.optimizer_class]},
    ]
    options = {**copy.deepcopy(dict(case.options)), **options}
    if kernel is None:
        return Training(case, parameters, case.optimizer_class(groups, **options))
    bucket_cap_mb = BUCKET_NUMEL * parameters[0].dtype.itemsize / (1 << 20)
    options |= {"kernel": kernel, "bucket_cap_mb": bucket_cap_mb}
    return Training(case, parameters, ShardedOptimizer(groups, case.optimizer_class, **options))


def start(
    case: Case,
    kernel: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Training:
    """A training from the beginning: the same parameters at every call, on every rank."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"Muon": MATRICES, "SparseAdam": TABLES}.get(case.optimizer_class.__name__, SHAPES)
    parameters = [
        Parameter(torch.randn(shape, dtype=dtype, generator=generator).to(device))
        for group in shapes
        for shape in group
    ]
    return build(case, parameters, kernel, **options)


def on_cpu(tree: Any) -> Any:
    """A copy of ``tree`` with all its tensors on the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: on_cpu(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(on_cpu(value) for value in tree)
    return tree


def assert_same_parameters(ours: Training, twin: Training, what: str) -> None:
    """Bit for bit."""
    for index, (our, other) in enumerate(zip(ours.parameters, twin.parameters, strict=True)):
        assert_same(our.detach(), other.detach(), f"{what}: parameter {index}")


def assert_same_training(ours: Training, twin: Training, what: str) -> dict[str, Any]:
    """Equal parameters, state and groups; returns our state. A collective when sharded."""
    assert_same_parameters(ours, twin, what)
    saved = ours.saved()
    assert_same(saved, twin.saved(), f"{what}: state_dict")
    return saved


def assert_alive(training: Training, presence: str) -> None:
    """Guards against a vacuous comparison: what had a gradient has moved, and nothing else.

    In bf16 a small step may round to nothing in all elements of a small parameter.
    """
    dtype = training.parameters[0].dtype
    begun = start(training.case, dtype=dtype).parameters
    for index, (before, after) in enumerate(zip(begun, training.parameters, strict=True)):
        assert after.isfinite().all(), f"{presence}: parameter {index}"
        had = any(PRESENCE[presence](step, index) for step in range(STEPS))
        if index in LARGE or dtype is not torch.bfloat16 or not had:
            assert torch.equal(before, after.cpu()) is not had, f"{presence}: parameter {index}"


def assert_sharded(training: Training) -> None:
    """Guards against a vacuous comparison: parameters are cut, or lie whole on several ranks."""
    layout = training.optimizer._shard.layout
    if layout.world_size == 1:
        return
    segments = [
        [segment for bucket in layout.buckets for segment in bucket.segments(rank)]
        for rank in range(layout.world_size)
    ]
    assert all(segments), "a rank has nothing to do"
    cut = {s.parameter for rank in segments for s in rank if not s.whole}
    assert not cut if training.case.keeps_tensors_whole else cut >= set(LARGE)
