"""What shardopt and its peers do when something goes wrong.

    python benchmarks/reliability.py    # all that install, all faults
    python benchmarks/reliability.py --peers shardopt --faults killed stopped

Two gloo ranks train a small net; at step 3 something happens to rank 1, and the other rank is
watched for 20 s, or both are. A communication may take 5 s, whoever makes it. "Right" is what the
undisturbed run ends with, bit for bit; "step 2" what was saved then. DeepSpeed takes part where it
is installed (``DS_BUILD_OPS=0 pip install deepspeed``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from engines import ENGINES, local, start
from torch import nn

STEPS, AT, PATIENCE = 6, 3, 20.0
RIGHT = "none"  # fault


def model_of(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, width), nn.ReLU(), nn.Linear(width, 128))


def train(folder: Path, peer: str, fault: str, rank: int) -> None:
    """Take the steps; write what they end with."""
    width = 1024 if fault == "another shape" and rank == 1 else 2048
    lr = 1e-2 if fault == "another lr" and rank == 1 else 1e-3
    another_order = fault == "another order of parameters" and rank == 1
    begun(folder, rank)
    order = (lambda each: each[::-1]) if another_order else list
    engine = ENGINES[peer](model_of(width), order, lr)
    saves = fault in SAVES
    for step in range(STEPS):
        hit = step == AT and rank == 1
        if hit and fault == "a bit of a parameter":
            flip_a_bit(engine)
        if saves and step > 0 and step % 2 == 0:
            save(folder, engine, peer, fault, step, rank)
        generator = torch.Generator().manual_seed(2 * step + rank)
        batch = torch.randn(8, 128, generator=generator)
        loss = engine.model(batch).square().mean()
        if hit:
            begun(folder, rank)
        engine.backward(loss * float("nan") if hit and fault == "NaN gradient" else loss)
        if hit:
            HITS.get(fault, lambda: None)()
        if not (hit and fault == "step() skipped"):
            engine.step()
    write(folder, rank, "done", engine.digest())


def save(folder: Path, engine, peer: str, fault: str, step: int, rank: int) -> None:
    """After two steps; and again after four, where whoever writes is killed on the way."""
    if fault == "killed while saving" and step == 4:
        if rank == (0 if peer == "ZeroRedundancyOptimizer" else 1):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which ends the process
            size = os.path.getsize(max(files(folder / "saved"), key=os.path.getsize))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, size // 4))
        begun(folder, rank)
    write(folder, rank, f"step {step}", engine.digest())
    first = local(next(engine.module.parameters())).flatten()[:16]
    write(folder, rank, "bytes", first.numpy().tobytes().hex())
    engine.save(folder / "saved", step)


def load(folder: Path, peer: str, fault: str, rank: int) -> None:
    """What a new job finds."""
    begun(folder, rank)
    torch.manual_seed(1)
    engine = ENGINES[peer](model_of(2048), list, 1e-3)
    engine.load(folder / "saved")
    write(folder, rank, "done", engine.digest())


HITS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": lambda: time.sleep(3600),
    "an exception": lambda: 1 / 0,
}


@torch.no_grad()
def flip_a_bit(engine) -> None:
    """The 22nd of an element in the middle, by which it grows or shrinks by up to a half."""
    flat = local(next(engine.module.parameters())).view(-1).view(torch.int32)
    flat[flat.numel() // 2] ^= 1 << 22


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def flip_a_saved_bit(folder: Path) -> None:
    """Of the first parameter, as it was saved last."""
    sought = bytes.fromhex(json.loads((folder.parent / "0 bytes").read_text()))
    for path in files(folder):
        data = bytearray(path.read_bytes())
        if (at := data.find(sought)) >= 0:
            data[at + 2] ^= 1 << 4
            path.write_bytes(data)


class Evil:
    """Its pickle writes a file wherever it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def plant(folder: Path) -> None:
    """In place of each pickle, one that runs something."""
    evil = Evil(folder.parent / "ran")
    for path in files(folder):
        if path.name == ".metadata":
            path.write_bytes(pickle.dumps(evil))
        elif path.suffix == ".pt":
            torch.save(evil, path)


SAVES: dict[str, Callable[[Path], object]] = {  # and what then happens to the files
    "killed while saving": lambda folder: None,
    "a bit of a saved file": flip_a_saved_bit,
    "code in a saved file": plant,
}
FAULTS = [
    *HITS, "step() skipped", "another lr", "another order of parameters", "another shape",
    "NaN gradient", "a bit of a parameter", *SAVES,
]  # fmt: skip


def begun(folder: Path, rank: int) -> None:
    write(folder, rank, "begun", time.time())


def write(folder: Path, rank: int, name: str, value: object) -> None:
    path = folder / f"{rank} {name}"
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").rename(path)


def body(folder: Path, peer: str, fault: str, what: str) -> None:
    """One rank."""
    start()
    rank = int(os.environ["RANK"])
    try:
        (load if what == "load" else train)(folder, peer, fault, rank)
    except BaseException as problem:
        last = traceback.format_exception_only(problem)[-1]
        write(folder, rank, "error", [time.time(), " ".join(last.split())])
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run(folder: Path, peer: str, fault: str, what: str) -> list[subprocess.Popen]:
    """Both ranks, until they are at their end or patience is."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_WORLD_SIZE": "2"}
    ranks = []
    for rank in range(2):
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        line = [sys.executable, __file__, "--rank-of", str(folder), peer, fault, what]
        with open(folder / f"{what}.{rank}.log", "w") as log:
            environment = {**os.environ, **address, **quiet, **numbers}
            ranks.append(subprocess.Popen(line, env=environment, stdout=log, stderr=log))
    hit = folder / "1 begun"
    while any(each.poll() is None for each in ranks):
        since = json.loads(hit.read_text()) if hit.exists() else time.time()
        if time.time() > since + PATIENCE:
            break
        time.sleep(0.05)
    return ranks


def outcome(folder: Path, ranks: list[subprocess.Popen], rank: int, right: dict[str, str]) -> str:
    """What came of one rank, in words.

    Args:
        right: digest of parameters -> what they are.
    """
    code = ranks[rank].poll()
    began = folder / "1 begun"
    if (error := folder / f"{rank} error").exists():
        when, text = json.loads(error.read_text())
        blames = ", names rank 1" if re.search(r"\branks? 1\b|\[1\]", text) else ""
        return f"error after {when - json.loads(began.read_text()):.1f} s{blames}: {text[:230]}"
    if code is None:
        return f"waits still after {PATIENCE:.0f} s"
    if code < 0:
        return f"the process ends with {signal.Signals(-code).name}"
    if (done := folder / f"{rank} done").exists():
        ended = json.loads(done.read_text())
        return f"no error, {right.get(ended, 'other numbers')}"
    return f"exit code {code}"


def case(peer: str, fault: str, references: dict[str, dict[str, str]]) -> list[str]:
    """Both ranks' outcomes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = run(folder, peer, fault, "train")
        right = references.setdefault(peer, {})
        if fault in SAVES:
            stop(ranks)
            for path in folder.glob("? [de]*"):
                path.unlink()
            right = {
                json.loads(path.read_text()): path.name[2:] for path in folder.glob("? step *")
            }
            SAVES[fault](folder / "saved")
            ranks = run(folder, peer, fault, "load")
        elif fault == RIGHT:
            right |= {
                json.loads((folder / f"{rank} done").read_text()): "right" for rank in range(2)
            }
        found = [outcome(folder, ranks, rank, right) for rank in range(2)]
        stop(ranks)
        ran = " (and its code has run)" if (folder / "ran").exists() else ""
    return [each + ran for each in found]


def stop(ranks: list[subprocess.Popen]) -> None:
    for each in ranks:
        each.kill()
        each.wait()


def main() -> None:
    if sys.argv[1:2] == ["--rank-of"]:
        folder, peer, fault, what = sys.argv[2:]
        return body(Path(folder), peer, fault, what)
    peers = [
        name for name in ENGINES if name != "DeepSpeed" or importlib.util.find_spec("deepspeed")
    ]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="+", choices=peers, default=peers)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    arguments = parser.parse_args()
    references: dict[str, dict[str, str]] = {}
    for fault in [RIGHT, *arguments.faults]:
        print(fault, flush=True)
        for peer in arguments.peers:
            for rank, found in enumerate(case(peer, fault, references)):
                print(f"  {peer if rank == 0 else '':24} rank {rank}: {found}", flush=True)


if __name__ == "__main__":
    main()
