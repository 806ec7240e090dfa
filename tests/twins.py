"""Two equal trainings, one sharded and one plain, and the comparison of all they leave behind."""

import torch
from torch import nn


def make_model(seed: int = 0) -> nn.Module:
    """A small net whose matrices are cut over ranks when buckets are small (SMALL_BUCKETS)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(61, 53), nn.Tanh(), nn.Linear(53, 37), nn.Tanh(), nn.Linear(37, 1)
        )


SMALL_BUCKETS = 0.01  # MiB: two buckets of make_model(), both cut over two ranks


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps ``first`` to ``last``, on data that depends on the step alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(8, 61, generator=generator)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def assert_same(ours, theirs, path: str = "") -> None:
    """Equal in structure, order of keys, types, dtypes, shapes and every bit."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor), path
        assert ours.dtype == theirs.dtype, (path, ours.dtype, theirs.dtype)
        assert ours.shape == theirs.shape, (path, ours.shape, theirs.shape)
        assert torch.equal(ours, theirs), f"{path}: {(ours != theirs).sum()} elements differ"
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), (path, list(ours), list(theirs))
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{path}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert type(ours) is type(theirs) and len(ours) == len(theirs), path
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{path}[{i}]")
    else:
        assert ours == theirs, (path, ours, theirs)


def assert_same_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal names, order and bits."""
    assert_same(dict(ours.named_parameters()), dict(theirs.named_parameters()))
