"""What ranks must agree on, and the error on every rank when they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, NoReturn

import torch
from torch import Tensor

from shardopt.comm.collectives import Collectives, gather_texts
from shardopt.errors import AgreementError

_CHUNK = 1 << 17  # elements hashed at once: 3 MB beside the tensor, within a core's cache
_OF_PLACE = 0x1E3779B97F4A7C15


def agree(collectives: Collectives, facts: Mapping[str, object], remedy: str) -> None:
    """Return if every rank brings the same facts, in the same order.

    Args:
        facts: name -> value; values are compared as ``describe`` writes them.
        remedy: the end of the error message: what to do about it.

    Raises:
        AgreementError: on every rank, naming the first difference, the rank, and both values.
    """
    rows = collectives.all_gather_rows(torch.tensor([digest(facts)], device="cpu"))
    if (rows == rows[0]).all():
        return
    texts = gather_texts(collectives, _text(facts))
    raise AgreementError(f"{_first_difference(texts)}; {remedy}")


def digest(facts: Mapping[str, object]) -> int:
    """A hash of 64 bits with a sign, equal on two ranks if the facts are."""
    return int.from_bytes(blake2b(_text(facts), digest_size=8).digest(), "big", signed=True)


def _text(facts: Mapping[str, object]) -> bytes:
    lines = (f"{name}\t{describe(value)}".replace("\n", " ") for name, value in facts.items())
    return "\n".join(lines).encode()


def _first_difference(texts: Sequence[bytes]) -> str:
    ranks = [dict(line.split("\t", 1) for line in text.decode().split("\n")) for text in texts]
    names = list(dict.fromkeys(name for facts in ranks for name in facts))
    for name in names:
        values = [facts.get(name, "nothing") for facts in ranks]
        if len(set(values)) > 1:
            return f"ranks differ in {name}: {_odd_ranks(values)}"
    return "ranks bring the same facts in another order"


def _odd_ranks(values: Sequence[object]) -> str:
    """Which ranks differ from most others (from rank 0 where it is even), with both values."""
    counts = Counter(values)
    most = max(counts.values())
    expected = values[0] if counts[values[0]] == most else counts.most_common(1)[0][0]
    odd = [rank for rank, value in enumerate(values) if value != expected]
    other = next(rank for rank, value in enumerate(values) if value == expected)
    named = ", ".join(f"rank {rank} has {values[rank]}" for rank in odd[:4])
    more = f" (and {len(odd) - 4} more ranks differ)" if len(odd) > 4 else ""
    return f"{named}{more}, rank {other} has {expected}"


def describe(value: Any) -> str:
    """A text that is equal on two ranks if the values are; free of memory addresses."""
    if isinstance(value, Tensor):
        return f"tensor({value.tolist()}, {value.dtype})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(describe(item) for item in value)) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    text = repr(value)
    return text if " at 0x" not in text else f"{type(value).__module__}.{type(value).__qualname__}"


@contextmanager
def all_or_none(collectives: Collectives) -> Iterator[None]:
    """Run a block without collectives; if it fails on one rank, raise on every rank.

    Raises:
        Exception: where the block failed, its own error.
        AgreementError: elsewhere, with that error's type and message.
    """
    error = None
    try:
        yield
    except Exception as problem:
        error = problem
    failed = torch.tensor([int(error is not None)], device="cpu")
    try:
        if collectives.all_gather_rows(failed).any():
            fail_everywhere(collectives, error)
    finally:
        del error  # or its traceback and this frame hold one another


def fail_everywhere(collectives: Collectives, error: Exception | None) -> NoReturn:
    """Raise on every rank, since one of them has an ``error``; see ``all_or_none``. Collective."""
    texts = gather_texts(collectives, f"{type(error).__name__}: {error}".encode() if error else b"")
    try:
        if error is not None:
            raise error
    finally:
        del error
    rank = next(rank for rank, text in enumerate(texts) if text)
    raise AgreementError(f"rank {rank} failed where this one did not: {texts[rank].decode()}")


def attempt(action: Callable[[], None]) -> Exception | None:
    """What ``action`` raises, for ``fail_everywhere``."""
    try:
        action()
    except Exception as problem:
        return problem
    return None


def agree_on_values(
    collectives: Collectives, names: Sequence[str], parameters: Sequence[Tensor]
) -> None:
    """Return if every rank starts from the same parameters; else ``AgreementError``."""
    remedy = (
        "seed every rank alike, wrap the model in DistributedDataParallel before constructing "
        "ShardedOptimizer, or broadcast the parameters from rank 0"
    )
    _agree_on_tensors(collectives, "value", names, parameters, remedy)


def agree_on_gradients(
    collectives: Collectives, names: Sequence[str], parameters: Sequence[Tensor]
) -> None:
    """Return if every rank has the same gradients, and the same ones; else ``AgreementError``."""
    remedy = (
        "with gradients='replicated' every rank needs the averaged gradient: wrap the model in "
        "DistributedDataParallel, or all-reduce .grad before step()"
    )
    gradients = [parameter.grad for parameter in parameters]
    _agree_on_tensors(collectives, "gradient", names, gradients, remedy)


@torch.no_grad()
def agree_on_buckets(
    collectives: Collectives,
    buckets: Sequence[Tensor],  # each (numel,) of 8 bytes or a multiple
    names: Sequence[str],
    parameters: Sequence[Tensor],
) -> None:
    """Return if every rank has the same parameters; else ``AgreementError``. Collective.

    Buckets are hashed as they lie in memory, on their device; parameters only to name one.
    """
    if collectives.num_ranks == 1 or not buckets:
        return
    prints = [_hash(bucket.view(torch.uint8).view(torch.int64)) for bucket in buckets]
    rows = collectives.all_gather_rows(torch.stack([each.to(prints[0].device) for each in prints]))
    if (rows == rows[0]).all():
        return
    either = "of two ranks, either may be the odd one; " if collectives.num_ranks == 2 else ""
    remedy = (
        f"{either}memory has changed there, or code wrote to it on one rank alone: resume from the "
        "last checkpoint, and test that host"
    )
    _agree_on_tensors(collectives, "value", names, parameters, remedy)


def _agree_on_tensors(
    collectives: Collectives,
    what: str,
    names: Sequence[str],
    tensors: Sequence[Tensor | None],  # ``None``: this rank has none
    remedy: str,
) -> None:
    if collectives.num_ranks == 1 or not tensors:
        return
    prints = [0 if tensor is None else fingerprint(tensor) for tensor in tensors]
    rows = collectives.all_gather_rows(torch.tensor(prints, device="cpu"))
    for name, column in zip(names, rows.T.tolist(), strict=True):
        if len(set(column)) > 1:
            values = [f"hash {value & (1 << 64) - 1:016x}" if value else "none" for value in column]
            raise AgreementError(
                f"ranks differ in the {what} of parameter {name!r}: {_odd_ranks(values)}; {remedy}"
            )


@torch.no_grad()
def fingerprint(tensor: Tensor) -> int:
    """A 64-bit hash of values and positions, never 0; one flipped bit anywhere changes it.

    The sum, modulo 2**64, of a one-to-one scramble of each element's bits and position. (A sum
    alone, or ``torch.hash_tensor``, does not notice two elements that change places; bits times
    a weight of the position do not notice two doubles that change their signs.)
    """
    if tensor.layout is not torch.strided:
        return _of_sparse(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().resolve_neg().reshape(-1).view(integers[tensor.dtype.itemsize])
    return int(_hash(bits)) or 1


def _hash(
    bits: Tensor,  # (n,) integers
) -> Tensor:  # () int64, without waiting for the device
    places = torch.arange(1, min(bits.numel(), _CHUNK) + 1, device=bits.device).mul_(_OF_PLACE)
    room, more_room = torch.empty_like(places), torch.empty_like(places)
    total = places.new_zeros(())
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        mixed, shifted = room[: chunk.numel()], more_room[: chunk.numel()]
        torch.add(places[: chunk.numel()], chunk, out=mixed).add_(_signed(start * _OF_PLACE))
        _fold(mixed, shifted)
        mixed *= 0x2545F4914F6CDD1D
        _fold(mixed, shifted)
        total += mixed.sum()
    return total


def _fold(mixed: Tensor, shifted: Tensor) -> None:
    """XOR with itself, shifted by 32 bits as if it had no sign."""
    torch.bitwise_right_shift(mixed, 32, out=shifted).bitwise_and_(0xFFFFFFFF)
    mixed ^= shifted


def _signed(number: int) -> int:
    """The same 64 bits, as an integer with a sign."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _of_sparse(tensor: Tensor) -> int:
    """A hash of the entries of a sparse tensor; another than that of the same values when dense."""
    entries = tensor.coalesce()
    mixed = fingerprint(entries.indices()) ^ (fingerprint(entries.values()) * 3)
    return mixed % (1 << 63) or 1
