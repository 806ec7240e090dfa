"""The checks, in order: each returns, raises ``Skipped``, or fails with what is wrong."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from shardopt import checkpoint
from shardopt.comm.collectives import mean_of_rows
from shardopt.errors import AgreementError
from shardopt.policies import Guards
from shardopt.scaler import GradScaler
from shardopt.selftest.lab import Lab, Skipped, expect, expect_equal, expect_near
from shardopt.selftest.twins import KINDS, Twins

Check = Callable[[Lab], None]

# Class -> options, and the model it takes.
CLASSES: dict[str, tuple[dict[str, object], str]] = {
    "SGD": ({"lr": 0.1, "momentum": 0.9}, "everything"),
    "Adam": ({"lr": 0.01}, "everything"),
    "AdamW": ({"lr": 0.01}, "everything"),
    "Adamax": ({"lr": 0.01}, "everything"),
    "NAdam": ({"lr": 0.01}, "everything"),
    "RAdam": ({"lr": 0.01}, "everything"),
    "Adagrad": ({"lr": 0.05}, "everything"),
    "Adadelta": ({"lr": 1.0}, "everything"),
    "RMSprop": ({"lr": 0.01}, "everything"),
    "Rprop": ({"lr": 0.01}, "everything"),
    "ASGD": ({"lr": 0.1}, "everything"),
    "Adafactor": ({"lr": 0.05}, "everything"),
    "Muon": ({"lr": 0.02}, "matrices"),
    "SparseAdam": ({"lr": 0.02}, "table"),
}
ADAMW = {"lr": 0.01}


def all_checks() -> dict[str, Check]:
    """Name -> check."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    moves = {
        f"collectives, {str(dtype)[6:]}": partial(collectives, dtype=dtype) for dtype in dtypes
    }
    classes = {name: partial(equals_torch, name=name) for name in CLASSES}
    return {
        "small messages": small_messages,
        **moves,
        **classes,
        "LBFGS": lbfgs,
        "kernel auto": kernel_auto,
        "bf16 parameters": sixteen_bits,
        "clipping": clipping,
        "accumulation, no_sync": accumulation,
        "overlap_forward": overlap_forward,
        "GradScaler": grad_scaler,
        "NaN on one rank": nan_on_one_rank,
        "another lr on one rank": another_lr,
        "checkpoints": checkpoints,
    }


def small_messages(lab: Lab) -> None:
    """Rows, sums, and messages from rank to rank."""
    comm, everyone = lab.collectives, range(lab.world_size)
    rows = comm.all_gather_rows(torch.tensor([lab.rank, -lab.rank]))
    expect_equal(rows, torch.tensor([[rank, -rank] for rank in everyone]), "rows")
    total = comm.sum_rows(torch.tensor([lab.rank + 0.5], dtype=torch.float64))
    expect_equal(total, torch.tensor([sum(everyone) + lab.world_size / 2.0]).double(), "the sum")
    if lab.world_size == 1:
        return
    after, before = (lab.rank + 1) % lab.world_size, (lab.rank - 1) % lab.world_size
    sent = torch.full((3000,), float(lab.rank), device=comm.wire_device)
    came = torch.empty_like(sent)
    for handle in [comm.send(sent, after), comm.receive(came, before)]:
        handle.wait()
    expect_equal(came, torch.full((3000,), float(before)), "what the rank before has sent")


def collectives(lab: Lab, dtype: torch.dtype) -> None:
    """All-gather, broadcast, all-to-all, reduce-scatter, of even and of uneven shards."""
    comm, size = lab.collectives, lab.world_size
    uneven = [1024 * (1 + rank % 3) * (rank != 1) for rank in range(size)]
    for sizes in ([2048] * size, uneven):
        borders = [0, *itertools.accumulate(sizes)]
        numel, mine = borders[-1], slice(*borders[lab.rank : lab.rank + 2])

        def of(rank: int, numel: int = numel) -> Tensor:
            generator = torch.Generator().manual_seed(rank)
            return torch.randn(numel, generator=generator).to(lab.device, dtype)

        whole = torch.cat([of(r)[low:high] for r, (low, high) in enumerate(pairwise(borders))])
        bucket = comm.allocate(numel, dtype, lab.device)
        bucket[mine] = of(lab.rank)[mine]
        comm.all_gather(bucket, borders).wait()
        expect_equal(bucket, whole, "all-gather")

        bucket.copy_(of(lab.rank))
        comm.broadcast(bucket, size - 1).wait()
        expect_equal(bucket, of(size - 1), "broadcast")

        out = bucket.new_empty(size * sizes[lab.rank])
        comm.all_to_all(of(lab.rank), sizes, out, [sizes[lab.rank]] * size).wait()
        expect_equal(out, torch.cat([of(rank)[mine] for rank in range(size)]), "all-to-all")

        mean = bucket.new_empty(sizes[lab.rank])
        comm.reduce_scatter(of(lab.rank), borders, mean).wait()
        rows = torch.stack([of(rank)[mine] for rank in range(size)])
        expected = torch.empty_like(rows[0])
        mean_of_rows(rows, expected)
        if lab.sums_in_rank_order:
            expect_equal(mean, expected, "reduce-scatter")
        else:
            expect_near([mean], [expected], [torch.zeros_like(mean)], 1e-5)


def equals_torch(lab: Lab, name: str) -> None:
    """Each kind of gradients, five steps, with states exchanged on the way."""
    options, parts = CLASSES[name]
    for kind in KINDS:
        twins = Twins(lab, getattr(torch.optim, name), options, kind=kind, parts=parts)
        try:
            twins.train(3).compare()
            twins.exchange_states()
            twins.train(2).compare()
        except AssertionError as problem:
            raise AssertionError(f"gradients={kind!r}: {problem}") from None


def lbfgs(lab: Lab) -> None:
    """Within rounding, since inner products are sums over ranks."""
    twins = Twins(lab, torch.optim.LBFGS, {"lr": 0.1, "max_iter": 4}, kind="local")

    def ours() -> Tensor:
        twins.sharded.zero_grad()
        loss = twins.ours.loss(0, lab.rank)
        loss.backward()
        return loss

    def theirs() -> Tensor:
        for parameter, mean in zip(twins.theirs.parameters(), twins.means(), strict=True):
            parameter.grad = mean
        return torch.stack([twins.theirs.loss(0, r) for r in range(lab.world_size)]).mean()

    for _ in range(2):
        twins.sharded.step(ours)
        twins.plain.step(theirs)  # type: ignore[arg-type]  # torch says float, takes tensors
    twins.compare(exact=False)


def kernel_auto(lab: Lab) -> None:
    """The kernel that shardopt chooses: near to the class, and alike on all ranks."""
    for optimizer_class in (AdamW, SGD):
        twins = Twins(lab, optimizer_class, ADAMW, kernel="auto").train(3)
        twins.compare(exact=False)


def sixteen_bits(lab: Lab) -> None:
    """Gradients of bf16 are summed in fp32."""
    Twins(lab, AdamW, ADAMW, dtype=torch.bfloat16).train(3).compare(exact=True)


def clipping(lab: Lab) -> None:
    """The norm is that of all ranks' mean, and the step is on what is left of it."""
    for kind in KINDS:
        twins = Twins(lab, SGD, {"lr": 0.1}, kind=kind)
        expected = torch.stack([mean.norm() for mean in twins.means()]).norm()
        norms: list[Tensor] = []
        bound = 0.5 * float(expected)
        twins.train(1, lambda: norms.append(twins.sharded.clip_grad_norm_(bound)))  # noqa: B023
        expect_near(norms, [expected], [torch.zeros_like(expected)], 1e-5)
        way = [
            ours.detach() - begun.detach()
            for ours, begun in zip(twins.ours.parameters(), twins.begun.parameters(), strict=True)
        ]
        length = torch.stack([part.norm() for part in way]).norm()
        expect_near([length], [0.1 * bound * torch.ones_like(length)], [0 * length], 1e-4)


def accumulation(lab: Lab) -> None:
    """Two passes with the same batch, the first within ``no_sync``: twice the gradient."""
    for kind in ("local", "sharded"):
        twins = Twins(lab, SGD, {"lr": 0.1}, kind=kind)
        with twins.sharded.no_sync():
            twins.ours.loss(0, lab.rank).backward()
        twins.ours.loss(0, lab.rank).backward()
        twins.sharded.step()
        for parameter, mean in zip(twins.theirs.parameters(), twins.means(), strict=True):
            parameter.grad = 2 * mean
        twins.plain.step()
        twins.compare()


def overlap_forward(lab: Lab) -> None:
    """The next forward waits for parameters, not the step."""
    twins = Twins(lab, AdamW, ADAMW)
    twins.sharded.overlap_forward(twins.ours)
    twins.train(5).compare()


def grad_scaler(lab: Lab) -> None:
    """An inf on one rank: all skip, and all halve the scale."""
    twins = Twins(lab, AdamW, ADAMW)
    scaler = GradScaler(lab.device.type, init_scale=1024.0)
    last = lab.rank == lab.world_size - 1
    scaler.scale(twins.ours.loss(0, lab.rank) * (float("inf") if last else 1.0)).backward()
    scaler.step(twins.sharded)
    scaler.update()
    expect(scaler.get_scale() == 512.0, f"expected a scale of 512, got {scaler.get_scale()}")
    expect_equal([*twins.ours.parameters()], [*twins.begun.parameters()], "skipped parameters")


def nan_on_one_rank(lab: Lab) -> None:
    """``Guards(nonfinite="skip")``: all ranks skip that step, and go on."""
    twins = Twins(lab, AdamW, ADAMW, guards=Guards(nonfinite="skip"))
    last = lab.rank == lab.world_size - 1
    log, quiet = logging.getLogger("shardopt"), logging.Filter("nothing")
    log.addFilter(quiet)  # which warns of what is done here on purpose
    try:
        (twins.ours.loss(0, lab.rank) * (float("nan") if last else 1.0)).backward()
        twins.sharded.step()
    finally:
        log.removeFilter(quiet)
    expect_equal([*twins.ours.parameters()], [*twins.begun.parameters()], "skipped parameters")
    twins.train(2).compare()


def another_lr(lab: Lab) -> None:
    """It raises on every rank before anything is updated."""
    lab.need_ranks()
    twins = Twins(lab, AdamW, ADAMW)
    twins.ours.loss(0, lab.rank).backward()
    if lab.rank == 1:
        twins.sharded.param_groups[0]["lr"] = 0.5
    try:
        twins.sharded.step()
    except AgreementError as error:
        expect("rank 1 has 0.5" in str(error), f"another message: {error}")
    else:
        raise AssertionError("expected AgreementError, got none")
    expect_equal([*twins.ours.parameters()], [*twins.begun.parameters()], "parameters")


def checkpoints(lab: Lab) -> None:
    """Saved, saved beside training, verified, loaded: training goes on as if undisturbed."""
    if lab.directory is None:
        raise Skipped("needs --directory, on a file system that all ranks see")
    twins = Twins(lab, AdamW, ADAMW).train(2)
    parts: dict[str, Any] = {"model": twins.ours, "optimizer": twins.sharded}
    checkpoint.save(lab.directory, step=1, **parts)
    twins.train(1)
    pending = checkpoint.async_save(lab.directory, step=2, **parts, extra={"seen": (3, 4)})
    twins.train(1)
    pending.result()
    resumed = Twins(lab, AdamW, ADAMW)
    loaded = checkpoint.load(lab.directory, model=resumed.ours, optimizer=resumed.sharded)
    expect(loaded.step == 2 and loaded.extra == {"seen": (3, 4)}, f"loaded {loaded}")
    resumed.ours.loss(3, lab.rank).backward()
    resumed.sharded.step()
    expect_equal([*resumed.ours.parameters()], [*twins.ours.parameters()], "resumed parameters")
