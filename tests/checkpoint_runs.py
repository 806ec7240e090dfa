"""Models and optimizers with all that a checkpoint meets, and how they are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, AdamW, Muon, SparseAdam

from shardopt import ShardedOptimizer
from shardopt.comm import SoloCollectives
from tests.bank_runs import sparse
from tests.twins import SMALL_BUCKETS, assert_same

SAVED_AT, STEPS = 2, 4


class Zoo(nn.Module):
    """Cut parameters and whole ones, tied, frozen, idle and empty ones; buffers; memory formats."""

    def __init__(self, dtypes: tuple[torch.dtype, ...] = (torch.float32,)):
        super().__init__()
        self.conv = nn.Conv2d(8, 40, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(40)
        self.wide = nn.Linear(61, 53)
        self.tied = nn.Linear(61, 53, bias=False)
        self.tied.weight = self.wide.weight
        self.frozen = nn.Linear(30, 40)
        self.frozen.requires_grad_(False)
        self.scale = Parameter(torch.tensor(0.5))
        self.empty = Parameter(torch.zeros(0, 4))
        self.idle = Parameter(torch.randn(50, 50))
        self.others = nn.ParameterList(torch.randn(37, 71, dtype=dtype) for dtype in dtypes)
        self.register_buffer("seen", torch.arange(6).view(2, 3).T)  # not in row-major order
        self.register_buffer("forgotten", torch.ones(3), persistent=False)


class Tables(nn.Module):
    """Embeddings with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(90, 33, sparse=True)
        self.places = nn.Embedding(40, 5, sparse=True)


class Net(nn.Module):
    """Matrices for Muon, and what is not for it."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(24 + 8 * i, 24, bias=False) for i in range(3))
        self.head = nn.Linear(61, 53)


def make(model_class: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model whose values depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class()


def mixed_zoo() -> nn.Module:
    return Zoo((torch.bfloat16, torch.float64, torch.complex64))


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [{"params": named[:4]}, {"params": named[4:], "lr": 0.05}]


def without_empty(model: nn.Module) -> list[dict[str, Any]]:
    """Adafactor divides by the number of elements."""
    model.empty.requires_grad_(False)
    return two_groups(model)


def two_classes(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [*model.head.named_parameters(prefix="head")]},
        {"params": [*model.body.named_parameters(prefix="body")], "optimizer_class": Muon},
    ]


@dataclass(frozen=True)
class Kind:
    """What is trained, and by which class."""

    model: Callable[[], nn.Module]
    optimizer_class: type[torch.optim.Optimizer]
    options: dict[str, Any]
    groups: Callable[[nn.Module], Any] = two_groups
    exact: bool = True  # the same bits at any number of ranks


KINDS = {
    "AdamW": Kind(Zoo, AdamW, {"lr": 0.01, "amsgrad": True}),
    "AdamW, four dtypes": Kind(mixed_zoo, AdamW, {"lr": 0.01}),
    "SGD momentum": Kind(Zoo, SGD, {"lr": 0.01, "momentum": 0.9}),
    "SGD": Kind(Zoo, SGD, {"lr": 0.01}),
    "Adagrad": Kind(mixed_zoo, Adagrad, {"lr": torch.tensor(0.01)}),
    "Adafactor": Kind(Zoo, Adafactor, {"lr": 0.01}, without_empty),
    "Muon and AdamW": Kind(Net, AdamW, {"lr": 0.01}, two_classes),
    "SparseAdam": Kind(Tables, SparseAdam, {"lr": 0.01}, lambda m: m.named_parameters()),
    "LBFGS": Kind(Net, LBFGS, {"lr": 0.1, "history_size": 3}, lambda m: m.parameters(), False),
}


@dataclass
class Run:
    """A model and its optimizer."""

    model: nn.Module
    optimizer: ShardedOptimizer

    def train(self, first: int, last: int, rank: int = 0) -> Run:
        """Steps ``first`` to ``last``; another ``rank`` has other gradients."""
        for step in range(first, last):
            self._set_gradients(1000 * rank + step)
            if isinstance(self.optimizer.optimizer_class, type) and issubclass(
                self.optimizer.optimizer_class, LBFGS
            ):
                self.optimizer.step(lambda step=step: self._loss(step))
            else:
                self.optimizer.step()
            for name, buffer in self.model.named_buffers():
                buffer.add_(len(name))
        return self

    def _set_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if name == "idle" or not parameter.requires_grad:
                continue
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if isinstance(self.model, Tables):
                rows = torch.randint(len(parameter), (1, 9), generator=generator)
                gradient = sparse(rows[0], gradient[:9], parameter.shape)
            parameter.grad = gradient

    def _loss(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        loss = sum(((p - 0.01 * step) ** 2).sum() for p in self.model.parameters())
        loss.backward()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """The optimizer's full state, on every rank of it, copied. Collective.

        Options are sorted: in which order a load leaves them is torch's business.
        """
        self.optimizer.consolidate_state_dict(to=None)
        state = copy.deepcopy(self.optimizer.state_dict())
        state["param_groups"] = [dict(sorted(group.items())) for group in state["param_groups"]]
        return state

    def everything(self) -> dict[str, Any]:
        """All that a checkpoint is to bring back, copied. Collective."""
        model = {name: value.clone() for name, value in self.model.state_dict().items()}
        return {"model": model, "optimizer": self.state()}

    def local(self) -> dict[str, Any]:
        """This rank's parameters, buffers, state and groups, copied. Not collective."""
        optim = self.optimizer.optim
        return {
            "model": {name: value.clone() for name, value in self.model.state_dict().items()},
            "state": [copy.deepcopy(state) for state in optim.state.values()],
            "groups": [
                {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
                for groups in (self.optimizer.param_groups, optim.param_groups)
                for group in groups
            ],
        }


def start(kind: str | Kind, process_group: Any = None, seed: int = 0, **options: Any) -> Run:
    """A run from the beginning; with another seed it begins elsewhere. Collective."""
    how = KINDS[kind] if isinstance(kind, str) else kind
    model = make(how.model, seed)
    options = {"kernel": "torch", "bucket_cap_mb": SMALL_BUCKETS, **how.options, **options}
    options = copy.deepcopy(options)
    return Run(
        model, ShardedOptimizer(how.groups(model), how.optimizer_class, process_group, **options)
    )


def undisturbed(kind: str | Kind, steps: int = STEPS) -> Run:
    """The same run in one process, to its end."""
    return start(kind, SoloCollectives()).train(0, steps)


@cache
def group_of(size: int) -> dist.ProcessGroup:
    """The first ranks of the world. Every rank of it calls for the same ones in the same order."""
    return dist.new_group(list(range(size)))


def assert_same_run(ours: Run, theirs: Run, what: str = "") -> None:
    """Equal parameters, buffers, memory formats, state and groups. Collective."""
    assert_same(ours.everything(), theirs.everything(), what)
    for name, value in ours.model.state_dict().items():
        assert value.stride() == theirs.model.state_dict()[name].stride(), name
