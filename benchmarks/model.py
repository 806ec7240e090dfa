"""The GPT of ``launch/``, as the benchmarks train it."""

from __future__ import annotations

import argparse
import pathlib
import sys

import torch
from torch import Tensor, nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "launch"))

from gpt import GPT, NUM_BYTES, summed_loss


def gpt_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Options of the model, of its batches, and of how often to measure."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4, help="in the batch of one rank")
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def gpt(width: int, layers: int, context: int) -> GPT:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return GPT(num_layers=layers, num_heads=8, width=width, context=context)


def windows(rank: int, size: int, context: int) -> tuple[Tensor, Tensor]:
    """Random bytes, of each rank its own, and the bytes that follow."""
    generator = torch.Generator().manual_seed(1 + rank)
    text = torch.randint(NUM_BYTES, (size, context + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over the batch, in nats."""
    bytes_in, bytes_out = batch
    return summed_loss(model(bytes_in), bytes_out) / bytes_out.numel()
