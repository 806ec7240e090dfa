"""Sparse gradients: tables cut by rows for SparseAdam, and the classes that take both kinds."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, Optimizer, SparseAdam

from benchmarks.common import MB, peak_allocated
from shardopt import GradScaler, Guards, ShardedOptimizer
from shardopt.comm import choose_collectives
from shardopt.errors import GradientError, ParameterError, UnsupportedError
from tests.bank_runs import sparse
from tests.each_rank import KINDS, random
from tests.pairs import pair, random_parameters
from tests.ranked.test_mesh import on_mesh
from tests.ranked.test_traffic import Counted
from tests.ranks import on_ranks
from tests.twins import assert_same

pytestmark = pytest.mark.slow  # the bank is fast
every_kind = pytest.mark.parametrize("kind", KINDS)
TABLES = [(97, 7), (5, 3), (1, 4)]  # one is cut, and on three ranks not all have rows of each


def tables() -> nn.ModuleList:
    torch.manual_seed(7)
    return nn.ModuleList(nn.Embedding(*shape, sparse=True) for shape in TABLES)


def loss_of(model: nn.ModuleList, seed: int, rank: int) -> Tensor:
    """Each rank looks other rows up, some of them more than once."""
    parts = []
    for number, table in enumerate(model):
        generator = torch.Generator().manual_seed(100 * seed + 10 * number + rank)
        tokens = torch.randint(table.num_embeddings, (9,), generator=generator)
        parts.append((table(tokens) * random(9, 1, seed=seed, rank=rank)).sin().sum())
    return torch.stack(parts).sum()


class Twins:
    """Tables under ``ShardedOptimizer`` and under the plain class, which gets the mean."""

    def __init__(self, kind: str, rank: int, world_size: int, optimizer_class=SparseAdam, **ours):
        self.rank, self.world_size = rank, world_size
        self.ours, self.theirs = tables(), tables()
        self.optimizer = ShardedOptimizer(
            self.ours.named_parameters(), optimizer_class, gradients=kind, lr=0.1, **ours
        )
        self.plain = optimizer_class(self.theirs.parameters(), lr=0.1)

    def backward(self, *seeds: int) -> None:
        """Of both: each rank's own, and the mean of all."""
        for seed in seeds:
            loss_of(self.ours, seed, self.rank).backward()
            losses = [loss_of(self.theirs, seed, rank) for rank in range(self.world_size)]
            torch.stack(losses).mean().backward()

    def step(self, *seeds: int) -> None:
        """A whole step of both, then the comparison."""
        self.backward(*seeds)
        self.optimizer.step()
        self.follow()

    def follow(self) -> None:
        """Ours has stepped."""
        self.plain.step()
        self.plain.zero_grad()
        for ours, theirs in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# -- SparseAdam ------------------------------------------------------------------------------------


@on_ranks(1, 2, 3)
@every_kind
def test_each_rank_updates_its_rows_of_the_mean(kind, rank, world_size):
    twins = Twins(kind, rank, world_size)
    for seed in range(4):
        twins.step(seed)
        assert all(table.weight.grad is None for table in twins.ours)
    held = [tensor.shape[0] for tensor in twins.optimizer.optim.param_groups[0]["params"]]
    everything = sum(rows for rows, _ in TABLES)
    assert sum(held) == everything if world_size == 1 else sum(held) < everything
    twins.optimizer.consolidate_state_dict(to=None)
    ours, theirs = twins.optimizer.state_dict(), twins.plain.state_dict()
    for index, state in theirs["state"].items():
        assert ours["state"][index]["step"] == state["step"] == 4
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours["state"][index][name], state[name])


@on_ranks(2, 3)
@every_kind
def test_means_are_summed_in_rank_order(kind, rank, world_size):
    ours, theirs = Parameter(torch.ones(40, 8)), Parameter(torch.ones(40, 8))
    optimizer = ShardedOptimizer([ours], SparseAdam, gradients=kind, lr=0.1)
    plain = SparseAdam([theirs], lr=0.1)
    brought = [random(40, 8, seed=3, rank=one) for one in range(world_size)]
    ours.grad = brought[rank].to_sparse(1)
    total = brought[0]
    for other in brought[1:]:
        total = total + other
    theirs.grad = (total / world_size).to_sparse(1)
    optimizer.step()
    plain.step()
    assert_same(ours.detach(), theirs.detach())


@on_ranks(1, 2, 3)
@every_kind
def test_passes_add_up_and_no_sync_waits(kind, rank, world_size):
    twins = Twins(kind, rank, world_size)
    twins.step(0, 1, 2)
    with twins.optimizer.no_sync():
        twins.backward(3)
    twins.backward(4)
    twins.optimizer.step()
    twins.follow()
    twins.backward(5)
    for optimizer in (twins.optimizer, twins.plain):
        optimizer.zero_grad()
    twins.step(6)


@on_ranks(1, 2, 3)
@every_kind
def test_clipping(kind, rank, world_size):
    """What torch cannot do to sparse gradients at all; here against their values."""
    twins = Twins(kind, rank, world_size)
    for seed, order in enumerate([2.0, 1.0, float("inf")]):
        twins.backward(seed)
        means = [table.weight.grad.coalesce() for table in twins.theirs]
        values = torch.cat([mean.values().flatten() for mean in means])
        expected = torch.linalg.vector_norm(values, order)
        found = twins.optimizer.clip_grad_norm_(0.5, order)
        torch.testing.assert_close(found, expected)
        assert expected > 0.5
        twins.optimizer.clip_grad_value_(0.01)
        for table, mean in zip(twins.theirs, means, strict=True):
            clipped = (mean.values() * (0.5 / (expected + 1e-6))).clamp(-0.01, 0.01)
            table.weight.grad = sparse(mean.indices()[0], clipped, mean.shape)
        twins.optimizer.step()
        twins.follow()


@on_ranks(1, 2, 3)
def test_a_pass_after_clipping_adds_to_what_was_clipped(rank, world_size):
    """With gradients="sharded", as for dense ones; nothing is lost."""
    twins = Twins("sharded", rank, world_size)
    twins.backward(0)
    twins.optimizer.clip_grad_value_(0.0)
    twins.plain.zero_grad()
    twins.backward(1)
    twins.optimizer.step()
    for table in twins.theirs:  # the rows of the first pass are touched, by zeros
        rows = torch.arange(table.num_embeddings)
        zeros = sparse(rows[:0], torch.zeros(0, table.embedding_dim), table.weight.shape)
        table.weight.grad = table.weight.grad + zeros
    twins.plain.step()
    moved = [table.weight.grad.coalesce().indices()[0] for table in twins.theirs]
    for ours, theirs, rows in zip(twins.ours, twins.theirs, moved, strict=True):
        torch.testing.assert_close(ours.weight[rows], theirs.weight[rows], rtol=1e-5, atol=1e-6)


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("anew", [False, True])
def test_a_pass_after_clipping_is_refused_where_grad_stays(anew, rank, world_size):
    """Unless what was clipped has been put away; or one table's gradient alone, by hand."""
    twins = Twins("local", rank, world_size)
    twins.backward(0)
    twins.optimizer.clip_grad_norm_(1e-3)
    if anew:
        twins.ours.zero_grad()
        twins.plain.zero_grad()
        twins.step(1)
        return
    twins.backward(1)
    with pytest.raises(GradientError, match="had been clipped"):
        twins.optimizer.step()
    twins.optimizer.zero_grad()
    twins.plain.zero_grad()
    twins.backward(2)
    twins.optimizer.clip_grad_norm_(1e-3)
    table = twins.ours[0].weight
    table.grad = table.grad.clone()
    with pytest.raises(GradientError, match="had been clipped"):
        twins.optimizer.step()


@on_ranks(2, 3)
@every_kind
def test_what_others_brought_is_forgotten_too(kind, rank, world_size):
    """By ``model.zero_grad``, on a rank that has brought nothing dense of its own."""
    model = nn.ModuleList([nn.Embedding(7, 3, sparse=True), nn.Linear(3, 1)])
    groups = [
        {"params": list(model[0].parameters()), "optimizer_class": SparseAdam},
        {"params": list(model[1].parameters())},
    ]
    guards = Guards(find_unused_parameters=True)
    optimizer = ShardedOptimizer(groups, SGD, gradients=kind, guards=guards, lr=1.0)
    start = model[1].weight.detach().clone()
    rows = model[0](torch.arange(7))
    (rows.sum() if rank else rows.sum() + 100 * model[1].weight.sum()).backward()
    model.zero_grad()
    (model[0](torch.arange(7)).sum() + model[1].weight.sum()).backward()
    optimizer.step()
    assert_same(model[1].weight.detach(), start - 1.0)


@on_ranks(1, 2, 3)
@every_kind
def test_a_table_that_one_rank_alone_looks_up(kind, rank, world_size):
    guards = Guards(find_unused_parameters=True)
    twins = Twins(kind, rank, world_size, guards=guards)
    for seed in range(3):
        for model, here in ((twins.ours, [rank]), (twins.theirs, range(world_size))):
            for one in here:
                own = model[0](torch.tensor([seed, 50 + one])).sin().sum()
                if one == world_size - 1:
                    own = own + model[1](torch.tensor([2])).sin().sum()
                (own / (1 if model is twins.ours else world_size)).backward()
        twins.optimizer.step()
        twins.follow()
    strict = ShardedOptimizer(twins.ours.named_parameters(), SparseAdam, gradients=kind)
    twins.ours[0](torch.tensor([3])).sum().backward()
    with pytest.raises(
        GradientError, match=r"got none on rank 0 for parameter '1.weight' and 1 more"
    ):
        strict.step()


@on_ranks(2, 3)
@every_kind
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_nan_on_one_rank(kind, policy, rank, world_size):
    twins = Twins(kind, rank, world_size, guards=Guards(nonfinite=policy))
    twins.step(0)
    before = [table.weight.detach().clone() for table in twins.ours]
    loss = loss_of(twins.ours, 1, rank)
    (loss * float("nan") if rank == 1 else loss).backward()
    if policy == "raise":
        with pytest.raises(
            GradientError, match=r"gradient of parameter '0.weight' from rank 1 is not finite"
        ):
            twins.optimizer.step()
        twins.optimizer.zero_grad()
    else:
        twins.optimizer.step()
    assert_same([table.weight.detach() for table in twins.ours], before)
    twins.step(2)


@on_ranks(1, 2)
@every_kind
def test_the_scaler(kind, rank, world_size):
    twins = Twins(kind, rank, world_size)
    scaler = GradScaler("cpu", init_scale=64.0)
    for seed in range(3):
        scaler.scale(loss_of(twins.ours, seed, rank)).backward()
        scaler.step(twins.optimizer)
        scaler.update()
        losses = [loss_of(twins.theirs, seed, one) for one in range(world_size)]
        torch.stack(losses).mean().backward()
        twins.follow()


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ZeroDivisionError("half-way")


@on_ranks(1, 2, 3)
def test_an_exception_half_way_and_another_try(rank, world_size):
    """The rows that the first try has left are not added to the second's."""
    twins = Twins("sharded", rank, world_size)

    def fail(seed: int) -> None:
        last = Fails.apply(twins.ours[0](torch.tensor([1]))).sum()  # backward comes to it last
        with pytest.raises(ZeroDivisionError):
            (loss_of(twins.ours, seed, rank) + last).backward()

    for seed in range(2):
        fail(8)
        twins.step(seed)
    twins.backward(3)
    fail(4)
    twins.backward(4)  # the rows of 3 went with the failed pass, and this does not hide it
    with pytest.raises(GradientError, match=r"call optimizer.zero_grad\(\) and repeat all"):
        twins.optimizer.step()


@on_ranks(2, 4)
@every_kind
def test_on_a_mesh(kind, rank, world_size):
    twins = Twins(kind, rank, world_size)
    shape = (2, world_size // 2)
    optimizer = on_mesh(twins.ours, shape, SparseAdam, gradients=kind, lr=0.1)
    twins.optimizer = optimizer
    for seed in range(3):
        twins.step(seed)


@on_ranks(2, 3)
def test_dense_tables_are_refused_on_every_rank():
    table = nn.Embedding(50, 4)
    optimizer = ShardedOptimizer(table.named_parameters(), SparseAdam)
    table(torch.tensor([1])).sum().backward()
    words = (
        "'weight': expected a sparse gradient for SparseAdam, got torch.strided; use sparse=True"
    )
    for _ in range(2):
        with pytest.raises(ParameterError, match=words):
            optimizer.step()


@on_ranks(1, 2)
@every_kind
def test_what_cannot_be_cut_between_rows_is_refused(kind):
    with pytest.raises(UnsupportedError, match=r"parameter 0 of .*: expected a contiguous tensor"):
        ShardedOptimizer([Parameter(torch.ones(6, 5).t())], SparseAdam)
    parameter = Parameter(torch.ones(6, 5))
    optimizer = ShardedOptimizer([("table", parameter)], SparseAdam, gradients=kind)
    parameter.grad = torch.eye(6, 5).to_sparse()
    with pytest.raises(ParameterError, match="'table': expected a gradient with one sparse dim"):
        optimizer.step()


@on_ranks(1, 2, 3)
def test_an_entry_for_each_element_is_taken_where_gradients_are_replicated():
    trained = pair(lambda: random_parameters((50, 40)), SparseAdam, lr=0.1)
    for step in range(3):
        for parameters, optimizer in trained.both():
            parameters[0].grad = (torch.eye(50, 40) * (step + 1)).roll(step, 0).to_sparse()
            optimizer.step()
    trained.assert_same()


# -- what travels, and what it takes ---------------------------------------------------------------


def bytes_of_steps(num_rows: int, touched: int, kind: str, rank: int) -> int:
    """What one rank sends in a step that touches some rows of a table."""
    collectives = Counted(choose_collectives(None))
    table = nn.Embedding(num_rows, 16, sparse=True)
    nn.init.zeros_(table.weight)
    optimizer = ShardedOptimizer(table.parameters(), SparseAdam, collectives, gradients=kind)
    for _ in range(2):
        collectives.calls.clear()
        rows = torch.arange(touched) * (num_rows // touched)
        (table(rows) * (1 + rank)).sum().backward()
        if kind == "replicated":
            table.weight.grad = sparse(rows, torch.ones(touched, 16), table.weight.shape)
        optimizer.step()
    return sum(size for _, size in collectives.calls)


@on_ranks(2, 3)
@pytest.mark.parametrize("kind", ["replicated", *KINDS])
def test_traffic_follows_the_touched_rows(kind, rank):
    """In both directions, and not the size of the table; in elements, small messages included."""
    small, large = (bytes_of_steps(num_rows, 8, kind, rank) for num_rows in (64, 6400))
    assert small == large
    more = bytes_of_steps(6400, 80, kind, rank)
    assert 5 < more / small < 10
    directions = 1 if kind == "replicated" else 2
    assert more < directions * 80 * (16 + 1) + 64


ROWS, WIDTH = 1 << 16, 64
TABLE = 4 * ROWS * WIDTH / MB


def train_large_table(table, optimizer, kind: str, rank: int, world_size: int) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed * world_size + rank * (kind != "replicated"))
        table(torch.randint(ROWS, (64,), generator=generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kind", ["replicated", *KINDS])
def test_memory_of_a_large_table(kind, rank, world_size):
    """Beside the table a rank's part of two moments; a dense gradient would be a table more."""
    table = nn.Embedding(ROWS, WIDTH, sparse=True)
    optimizer = ShardedOptimizer(table.parameters(), SparseAdam, gradients=kind)
    peak = peak_allocated(lambda: train_large_table(table, optimizer, kind, rank, world_size))
    assert peak == pytest.approx(TABLE * 2 / world_size, rel=0.05)


# -- classes that take both ------------------------------------------------------------------------

BOTH: list[tuple[type[Optimizer], dict]] = [
    (SGD, {}),
    (SGD, {"maximize": True}),
    (Adagrad, {}),
    (Adagrad, {"lr_decay": 0.1, "maximize": True}),
]


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("kernel", ["torch", "auto"])
@pytest.mark.parametrize("number", range(len(BOTH)))
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, within Adagrad
def test_sgd_and_adagrad_take_what_torch_takes(number, kernel):
    """Bit for bit, rows touched twice included; "auto" leaves these groups to torch."""
    optimizer_class, options = BOTH[number]
    trained = pair(
        lambda: random_parameters((7,), (50, 40), (2500,)),
        optimizer_class,
        lambda parameters: [{"params": parameters[:2]}, {"params": parameters[2:]}],
        **options,
    )
    ours = ShardedOptimizer(
        [{"params": trained.ours[:2]}, {"params": trained.ours[2:]}],
        optimizer_class,
        kernel=kernel,
        bucket_cap_mb=0.01,
        lr=0.01,
        **options,
    )
    trained.optimizer = ours
    for step in range(4):
        trained.give_gradients()
        rows = torch.tensor([1, 3, 3, 49, 3, 17, step])
        values = random(7, 40, seed=step, rank=0)
        elements = torch.arange(2500)[:: 10 + step]
        for parameters, optimizer in trained.both():
            parameters[1].grad = sparse(rows, values.clone(), torch.Size((50, 40)))
            parameters[2].grad = sparse(elements, elements * 0.1, torch.Size((2500,)))
            optimizer.step()
    assert not any(group.get("fused") for group in ours.optim.param_groups)
    trained.assert_same()


@on_ranks(1, 2, 3)
def test_strides_of_the_parameter_are_minded():
    def make() -> list[Tensor]:
        image = torch.randn(6, 8, 9, 10, generator=torch.Generator().manual_seed(1))
        return [Parameter(image.to(memory_format=torch.channels_last))]

    trained = pair(make, SGD)
    for parameters, optimizer in trained.both():
        parameters[0].grad = sparse(
            torch.tensor([1, 4, 2]), random(3, 8, 9, 10, seed=0, rank=0), torch.Size((6, 8, 9, 10))
        )
        optimizer.step()
    trained.assert_same()


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("optimizer_class", [SGD, SparseAdam])
def test_a_nan_in_replicated_sparse_gradients(optimizer_class):
    table = nn.Embedding(60, 30, sparse=True)
    guards = Guards(nonfinite="raise")
    optimizer = ShardedOptimizer(table.named_parameters(), optimizer_class, guards=guards, lr=0.1)
    values = torch.ones(3, 30)
    for bad in (False, True):
        values[1, 7] = float("nan") if bad else 1.0
        table.weight.grad = sparse(torch.tensor([3, 50, 3]), values.clone(), table.weight.shape)
        before = table.weight.detach().clone()
        if not bad:
            optimizer.step()
            continue
        with pytest.raises(GradientError, match=r"gradient of parameter 'weight' .* is not finite"):
            optimizer.step()
        assert_same(table.weight.detach(), before)


@on_ranks(2, 3)
def test_momentum_of_sparse_gradients_trains_and_is_not_saved():
    """torch keeps a sparse momentum, which cannot be moved between ranks."""
    trained = pair(lambda: random_parameters((50, 40)), SGD, momentum=0.9)
    for step, (parameters, optimizer) in itertools.product(range(3), trained.both()):
        rows = torch.tensor([1, 3 + step])
        parameters[0].grad = sparse(rows, random(2, 40, seed=step, rank=0), torch.Size((50, 40)))
        optimizer.step()
    assert_same(trained.ours[0].detach(), trained.theirs[0].detach())
    with pytest.raises(Exception, match=r"expected dense tensors in the optimizer's state"):
        trained.optimizer.consolidate_state_dict()


@on_ranks(2, 3)
def test_others_name_the_parameter():
    trained = pair(lambda: random_parameters((7,), (50, 40)), Adam)
    trained.give_gradients()
    trained.ours[1].grad = torch.eye(50, 40).to_sparse()
    with pytest.raises(
        ParameterError, match=r"expected a dense gradient for Adam, got torch.sparse"
    ):
        trained.optimizer.step()
    dist.barrier()
