"""Text to learn from that every Python brings along: the source of its standard library.

Real text with long-range structure, some 12 MB of it, without a download. Whole files are held out,
since a window cut from the middle of a training file would measure memory.
"""

import hashlib
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from options import Refused
from ranks import Ranks
from torch import Tensor

# What is installed next to the library, and tests, which repeat themselves and which some systems
# leave out: without them the text is nearly the same wherever a version of Python is installed.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
HELD_OUT_ONE_IN = 20  # files
HELD_OUT_BYTES = 16384  # read by each evaluation, or 64 windows where that is more


@dataclass(frozen=True)
class Corpus:
    """The text as bytes, and the order in which it is read.

    Attributes:
        training: what the model learns from, ``(bytes,)`` of uint8.
        held_out: what it is only measured on.
        num_files: files in both.
        sha256: of both, for two runs to compare what they read.
    """

    training: Tensor = field(repr=False)
    held_out: Tensor = field(repr=False)
    num_files: int
    sha256: str

    def __str__(self) -> str:
        training, held_out = self.training.numel() / 1e6, self.held_out.numel() / 1e6
        return (
            f"{training + held_out:.2f} MB in {self.num_files} files of Python's standard library"
            f" ({held_out:.2f} MB held out)\n           sha256 {self.sha256}"
        )

    def batch(
        self, step: int, *, seed: int, size: int, context: int, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        """This rank's part of the global batch of ``step``: bytes and the bytes that follow.

        The global batch is a function of ``seed`` and ``step`` alone: any number of ranks reads the
        same, and a resumed run goes on where the order was left, with nothing to save.
        """
        # Torch's generator keeps 32 bits of its seed: seed and step are mixed, not packed.
        digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        last = self.training.numel() - context
        starts = torch.randint(last, (size,), generator=generator)
        return _windows(self.training, starts[ranks.rank :: ranks.world_size], context)

    def held_out_part(self, context: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """This rank's part of the windows that every evaluation reads, evenly spaced."""
        num_windows = max(64, HELD_OUT_BYTES // context)
        last = self.held_out.numel() - context - 1
        starts = torch.linspace(0, last, num_windows, dtype=torch.float64).long()
        return _windows(self.held_out, starts[ranks.rank :: ranks.world_size], context)

    def to(self, device: torch.device) -> "Corpus":
        """The same corpus, with its text on ``device``."""
        moved = self.training.to(device), self.held_out.to(device)
        return Corpus(*moved, num_files=self.num_files, sha256=self.sha256)

    def check_context(self, context: int) -> None:
        """Refuse windows that do not fit into the text."""
        longest = min(self.training.numel(), self.held_out.numel()) - 2
        if context > longest:
            raise Refused(
                f"--context: expected at most {longest} bytes, the length of the held-out text,"
                f" got {context}; choose a shorter context"
            )


def read_corpus() -> Corpus:
    """The corpus of the Python that runs this, its files in the order of their names."""
    library = Path(sysconfig.get_path("stdlib"))
    names = sorted(_sources(library))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name in names:
        is_held_out = zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0
        parts[is_held_out].append((library / name).read_bytes())
    training, held_out = b"".join(parts[0]), b"".join(parts[1])
    if not held_out:
        raise Refused(
            f"expected the source of Python's standard library in {library}, got {len(names)}"
            " files; run a Python that has it"
        )
    sha256 = hashlib.sha256(training + held_out).hexdigest()
    return Corpus(_tensor(training), _tensor(held_out), num_files=len(names), sha256=sha256)


def _sources(library: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(library):
        folders[:] = set(folders) - LEFT_OUT  # walk does not enter the others
        for file in files:
            if file.endswith(".py"):
                yield (Path(folder) / file).relative_to(library).as_posix()


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _windows(
    text: Tensor,  # (bytes,)
    starts: Tensor,  # (windows,)
    context: int,
) -> tuple[Tensor, Tensor]:
    places = starts.to(text.device)[:, None] + torch.arange(context + 1, device=text.device)
    windows = text[places].long()
    return windows[:, :-1], windows[:, 1:]
