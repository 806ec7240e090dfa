"""How each trains and saves, as its documentation shows it; see ``reliability.py``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from shardopt import Guards, ShardedOptimizer, checkpoint

LIMIT = 5.0  # seconds that one communication may take, for all of them


class Engine:
    """A model and what trains it.

    Args:
        model: the same on every rank, or not.
        order: the parameters, as the optimizer gets them.
        lr: learning rate.
    """

    def __init__(self, model: nn.Module, order: Callable[[list], list], lr: float):
        self.module = self.model = model
        self.optimizer: Any = AdamW(order(list(model.parameters())), lr=lr)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def digest(self) -> str:
        """Of this rank's parameters, to compare with those of another run."""
        hashed = hashlib.sha256()
        for parameter in self.module.parameters():
            hashed.update(local(parameter).numpy().tobytes())
        return hashed.hexdigest()


class Shardopt(Engine):
    """``ShardedOptimizer`` with all its guards."""

    def __init__(self, model: nn.Module, order: Callable[[list], list], lr: float):
        self.module = self.model = model
        guards = Guards(nonfinite="raise", check_replicas_every=1, deadline=LIMIT)
        parameters = order(list(model.named_parameters()))
        self.optimizer = ShardedOptimizer(
            parameters, AdamW, lr=lr, gradients="sharded", guards=guards
        )

    def save(self, folder: Path, step: int) -> None:
        checkpoint.save(folder, step=step, model=self.model, optimizer=self.optimizer)

    def load(self, folder: Path) -> None:
        checkpoint.load(folder, model=self.model, optimizer=self.optimizer)


class Zero(Engine):
    """torch's ``ZeroRedundancyOptimizer`` beside DDP; saved as DDP's tutorial does."""

    def __init__(self, model: nn.Module, order: Callable[[list], list], lr: float):
        self.module = model
        self.model = DistributedDataParallel(model)
        self.optimizer = ZeroRedundancyOptimizer(order(list(model.parameters())), AdamW, lr=lr)

    def save(self, folder: Path, step: int) -> None:
        self.optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            folder.mkdir(exist_ok=True)
            state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, folder / "checkpoint.pt")
        dist.barrier()

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "checkpoint.pt")
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Fsdp2(Engine):
    """``fully_shard`` with ``torch.distributed.checkpoint``, as its tutorial does."""

    def __init__(self, model: nn.Module, order: Callable[[list], list], lr: float):
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        super().__init__(fully_shard(model), order, lr)

    def save(self, folder: Path, step: int) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


class DeepSpeed(Engine):
    """DeepSpeed's ZeRO stage 1, on the CPU, with torch's AdamW."""

    def __init__(self, model: nn.Module, order: Callable[[list], list], lr: float):
        import deepspeed

        self.module = model
        parameters = order(list(model.parameters()))
        self.model, *_ = deepspeed.initialize(
            model=model,
            optimizer=AdamW(parameters, lr=lr),
            model_parameters=parameters,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 8,
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
            },
        )

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self) -> None:
        self.model.step()

    def save(self, folder: Path, step: int) -> None:
        self.model.save_checkpoint(folder, tag=f"step-{step}")

    def load(self, folder: Path) -> None:
        path, _ = self.model.load_checkpoint(folder)
        if path is None:
            raise RuntimeError("load_checkpoint returned nothing")


ENGINES: dict[str, type[Any]] = {
    "shardopt": Shardopt,
    "ZeroRedundancyOptimizer": Zero,
    "FSDP2 + DCP": Fsdp2,
    "DeepSpeed": DeepSpeed,
}


def start() -> None:
    """Join the other ranks; every communication has ``LIMIT``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))


def local(parameter: Tensor) -> Tensor:
    """What this rank holds of it."""
    tensor = parameter.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
