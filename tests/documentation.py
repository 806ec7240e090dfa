"""The code of torch.optim's documentation, block by block, and a stage to run it on.

The blocks stand here as they stand there. ``with_sharded_optimizer`` changes the line that
constructs the optimizer, and nothing else::

    optim.SGD(model.parameters(), lr=0.01)
    ShardedOptimizer(model.parameters(), optim.SGD, lr=0.01)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss as loss_fn
from torch.optim import lr_scheduler

from shardopt import ShardedOptimizer

BLOCKS = {
    "construct": """
optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
optimizer = optim.Adam([var1, var2], lr=0.0001)
""",
    "per-parameter options": """
optim.SGD([
                {'params': model.base.parameters()},
                {'params': model.classifier.parameters(), 'lr': 1e-3}
            ], lr=1e-2, momentum=0.9)
""",
    "step": """
for input, target in dataset:
    optimizer.zero_grad()
    output = model(input)
    loss = loss_fn(output, target)
    loss.backward()
    optimizer.step()
""",
    "step closure": """
for input, target in dataset:
    def closure():
        optimizer.zero_grad()
        output = model(input)
        loss = loss_fn(output, target)
        loss.backward()
        return loss
    optimizer.step(closure)
""",
    "SGD": """
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> optimizer.zero_grad()
>>> loss_fn(model(input), target).backward()
>>> optimizer.step()
""",
    "scheduler": """
>>> scheduler = ...
>>> for epoch in range(100):
>>>     train(...)
>>>     validate(...)
>>>     scheduler.step()
""",
    "LambdaLR": """
>>> # Assuming optimizer has two groups.
>>> lambda1 = lambda epoch: epoch // 30
>>> lambda2 = lambda epoch: 0.95 ** epoch
>>> scheduler = LambdaLR(optimizer, lr_lambda=[lambda1, lambda2])
>>> for epoch in range(100):
>>>     train(...)
>>>     validate(...)
>>>     scheduler.step()
""",
    "StepLR": """
>>> # Assuming optimizer uses lr = 0.05 for all groups
>>> # lr = 0.05     if epoch < 30
>>> # lr = 0.005    if 30 <= epoch < 60
>>> # lr = 0.0005   if 60 <= epoch < 90
>>> # ...
>>> scheduler = StepLR(optimizer, step_size=30, gamma=0.1)
>>> for epoch in range(100):
>>>     train(...)
>>>     validate(...)
>>>     scheduler.step()
""",
    "MultiStepLR": """
>>> # Assuming optimizer uses lr = 0.05 for all groups
>>> # lr = 0.05     if epoch < 30
>>> # lr = 0.005    if 30 <= epoch < 80
>>> # lr = 0.0005   if epoch >= 80
>>> scheduler = MultiStepLR(optimizer, milestones=[30,80], gamma=0.1)
>>> for epoch in range(100):
>>>     train(...)
>>>     validate(...)
>>>     scheduler.step()
""",
    "ReduceLROnPlateau": """
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> scheduler = ReduceLROnPlateau(optimizer, 'min')
>>> for epoch in range(10):
>>>     train(...)
>>>     val_loss = validate(...)
>>>     # Note that step should be called after validate()
>>>     scheduler.step(val_loss)
""",
    "CyclicLR": """
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1)
>>> data_loader = torch.utils.data.DataLoader(...)
>>> for epoch in range(10):
>>>     for batch in data_loader:
>>>         train_batch(...)
>>>         scheduler.step()
""",
}

# What the documentation leaves out of a block, and what stands there when it runs.
LEFT_OUT = {"scheduler = ...": "scheduler = StepLR(optimizer, step_size=30)"}

# The optimizer of the blocks that assume one: "lr = 0.05 for all groups", "has two groups".
ASSUMED = """
optimizer = optim.SGD([
    {'params': model.base.parameters()},
    {'params': model.classifier.parameters()},
], lr=0.05, momentum=0.9)
"""


def source_of(name: str) -> str:
    """A block as a program: without prompts, after the optimizer that it assumes, if any."""
    text = re.sub(r"^>>> ?", "", BLOCKS[name], flags=re.MULTILINE)
    for ellipsis, filled in LEFT_OUT.items():
        text = text.replace(ellipsis, filled)
    return text if "optim." in text.replace("optim.lr_scheduler", "") else ASSUMED + text


def with_sharded_optimizer(source: str) -> str:
    """The program with every ``optim.SGD(X, ...)`` as ``ShardedOptimizer(X, optim.SGD, ...)``."""
    return ast.unparse(_ConstructorLine().visit(ast.parse(source)))


class _ConstructorLine(ast.NodeTransformer):
    def visit_Call(self, call: ast.Call) -> ast.AST:
        self.generic_visit(call)
        name = ast.unparse(call.func)
        if not re.fullmatch(r"(torch\.)?optim\.[A-Z]\w*", name):
            return call
        call.args.insert(1, call.func)
        call.func = ast.Name("ShardedOptimizer", ast.Load())
        return call


class Stage:
    """What the blocks take for granted: a model, data, and ``train(...)``.

    Args:
        sharded: run the blocks with the constructor line changed.
        flags: class -> what its constructor gets beside the options of the block.
    """

    def __init__(self, *, sharded: bool, flags: Mapping[type, dict[str, Any]] | None = None):
        torch.manual_seed(5)
        self.sharded = sharded
        self.flags = flags or {}
        self.model = _Model()
        self.variables = [nn.Parameter(torch.randn(numel)) for numel in (1500, 1600)]
        self.dataset = [(torch.randn(8, 40), torch.randn(8, 30)) for _ in range(4)]
        self.built: list[torch.optim.Optimizer] = []
        self.seen: list[tuple[list[float], list[torch.Tensor]]] = []

    def run(self, name: str) -> Stage:
        """Execute a block; what it constructed is in ``built``, what it trained in ``seen``."""
        source = source_of(name)
        if self.sharded:
            source = with_sharded_optimizer(source)
        exec(compile(source, f"<documentation: {name}>", "exec"), self._supplied())
        return self

    def train(self, *_: Any) -> None:
        """One step of the newest optimizer; blocks write ``train(...)``, with an Ellipsis."""
        optimizer = self.built[-1]
        inputs, target = self.dataset[len(self.seen) % len(self.dataset)]
        optimizer.zero_grad()
        loss = loss_fn(self.model(inputs), target)
        (loss + sum(variable.square().mean() for variable in self.variables)).backward()
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        self.seen.append((rates, self.values()))

    def validate(self, *_: Any) -> torch.Tensor:
        """The mean loss over all data."""
        with torch.no_grad():
            return torch.stack([loss_fn(self.model(x), y) for x, y in self.dataset]).mean()

    def values(self) -> list[torch.Tensor]:
        """A copy of everything that can be trained."""
        return [p.detach().clone() for p in (*self.model.parameters(), *self.variables)]

    def _kept(self, constructor: type) -> Callable[..., Any]:
        def construct(*args: Any, **options: Any) -> Any:
            self.built.append(constructor(*args, **options, **self.flags.get(constructor, {})))
            return self.built[-1]

        return construct

    def _supplied(self) -> dict[str, Any]:
        """Every name that a block uses and does not define."""
        classes = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
        if not self.sharded:
            classes = {name: self._kept(each) for name, each in classes.items()}
        optim = SimpleNamespace(**classes, lr_scheduler=lr_scheduler)
        data = SimpleNamespace(DataLoader=lambda _: self.dataset)
        return {
            **{name: getattr(lr_scheduler, name) for name in lr_scheduler.__all__},
            "ShardedOptimizer": self._kept(ShardedOptimizer),
            "optim": optim,
            "torch": SimpleNamespace(optim=optim, utils=SimpleNamespace(data=data)),
            "model": self.model,
            "var1": self.variables[0],
            "var2": self.variables[1],
            "dataset": self.dataset,
            "input": self.dataset[0][0],
            "target": self.dataset[0][1],
            "loss_fn": loss_fn,
            "train": self.train,
            "train_batch": self.train,
            "validate": self.validate,
        }


class _Model(nn.Module):
    """4,290 elements, so that three ranks cut it at 2,048 and 4,096."""

    def __init__(self):
        super().__init__()
        self.base, self.classifier = nn.Linear(40, 60), nn.Linear(60, 30)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.base(inputs)))
