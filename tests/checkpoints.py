"""Checkpoints of any layout, written by hand: what ``save`` gives any number of ranks."""

import json
import random
import zlib
from pathlib import Path

import torch

from shardopt.checkpoint.boxes import Box, boxes_of_range
from shardopt.checkpoint.crc import block_crcs
from shardopt.checkpoint.entries import Chunk, FileEntry, TensorEntry
from shardopt.checkpoint.manifest import NAME, Manifest, file_header
from shardopt.checkpoint.plain import TensorKey, decode, encode

ALIGNMENT = 64


def order_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Dims from outermost to innermost in memory, ``None`` for row-major."""
    if tensor.is_contiguous():
        return None
    return tuple(sorted(range(tensor.ndim), key=lambda d: (-tensor.stride(d), -tensor.size(d))))


def raw(tensor: torch.Tensor, order: tuple[int, ...] | None) -> bytes:
    """Bytes of a tensor's elements, in an order of its dims."""
    flat = tensor.permute(order) if order else tensor
    out = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    return bytes(out.view(-1).view(torch.uint8).numpy())


def ranges(numel: int, world_size: int) -> list[tuple[int, int]]:
    """Uneven shares of so many elements, one for each rank, some of which may be empty."""
    cuts = sorted(random.Random(numel).choices(range(numel + 1), k=world_size - 1))
    return list(zip([0, *cuts], [*cuts, numel], strict=True))


def write_checkpoint(
    directory: Path,
    tree: dict,
    step: int = 4,
    world_size: int = 2,
    run: str = "5eed5eed",
    facts: dict | None = None,
) -> Manifest:
    """A checkpoint of a tree, whose tensors are spread over the files of ``world_size`` ranks."""
    directory.mkdir(parents=True)
    manifest = Manifest(run, step, world_size, facts or {"optimizer_class": "torch.optim.AdamW"})
    tensors: dict[str, torch.Tensor] = {}

    def refer(value, name):
        if isinstance(value, torch.Tensor):
            tensors[name] = value
            return TensorKey(name)
        return None

    manifest.tree = json.loads(json.dumps(encode(tree, (), refer)), object_hook=decode)
    contents = [bytearray(file_header(run, step, rank)) for rank in range(world_size)]
    for name, tensor in tensors.items():
        order = order_of(tensor)
        entry = TensorEntry(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), order)
        manifest.tensors[name] = entry
        dims = order or tuple(range(tensor.ndim))
        back = [dims.index(dim) for dim in range(tensor.ndim)]
        for rank, (start, stop) in enumerate(ranges(tensor.numel(), world_size)):
            for box in boxes_of_range(Box.whole(entry.shape).permuted(dims).sizes, start, stop):
                _add(contents[rank], f"rank-{rank}.bin", entry, tensor, box.permuted(back))
    for rank, content in enumerate(contents):
        _write(directory, manifest, f"rank-{rank}.bin", bytes(content), rank)
    _write(directory, manifest, ".metadata", b"what torch reads", None)
    (directory / NAME).write_bytes(manifest.to_bytes())
    return manifest


def _add(content: bytearray, file: str, entry: TensorEntry, tensor: torch.Tensor, box: Box) -> None:
    if box.numel == 0:
        return
    content.extend(b"-" * (-len(content) % ALIGNMENT))
    part = tensor[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
    data = raw(part, entry.order)
    entry.chunks.append(Chunk(box, file, len(content), block_crcs(memoryview(data))))
    content.extend(data)


def _write(directory: Path, manifest: Manifest, name: str, data: bytes, rank: int | None) -> None:
    (directory / name).write_bytes(data)
    manifest.files[name] = FileEntry(len(data), zlib.crc32(data), rank)


def flip(path: Path, at: int, bit: int = 1) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def training_tree(numel: int = 40_000) -> dict:
    """A model, the state of AdamW over it after a step, and values of many types."""
    from collections import Counter, OrderedDict, deque

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),
        torch.nn.Linear(numel // 40, 40),
        torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16),
    )
    names = [name for name, _ in model.named_parameters()]
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, amsgrad=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    packed = optimizer.state_dict()
    order = [name for group in groups for p in group["params"]
             for name, q in zip(names, model.parameters(), strict=True) if p is q]  # fmt: skip
    state = {order[index]: value for index, value in packed["state"].items()}
    for group in packed["param_groups"]:
        group["params"] = [order[index] for index in group["params"]]
    return {
        "model": OrderedDict((k, v.detach()) for k, v in model.state_dict().items()),
        "optimizer": {"state": state, "param_groups": packed["param_groups"]},
        "scheduler": {
            "last_epoch": 3,
            "_last_lr": [0.01, float("inf")],
            "milestones": Counter([2]),
        },
        "extra": {
            3: (1, 2.5, None, True, -0.0, 1 << 70),
            "window": deque([1, 2], maxlen=4),
            "seen": {1, "a"},
            "frozen": frozenset({5}),
            "bytes": [b"", b"\x00\xff"],
            "complex": 1 + 2j,
            "rng": torch.get_rng_state(),
            "empty": torch.zeros(0, 3),
        },
    }
