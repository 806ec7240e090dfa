"""Collectives over MPI beside gloo's, in one job, in turn; and whether MPI goes on unwatched.

mpirun -n 2 python -m mpi4py benchmarks/mpi.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from common import timed
from mpi4py import MPI

from shardopt.comm import Collectives, choose_collectives

NUMEL, ROUNDS = 16 << 20, 15  # 64 MB of fp32
PAUSE = 0.5  # seconds

WORLD = MPI.COMM_WORLD


def actions(collectives: Collectives) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    size, rank = collectives.world_size, collectives.rank
    borders = [NUMEL * part // size for part in range(size + 1)]
    bucket, out = torch.ones(NUMEL), torch.empty(borders[rank + 1] - borders[rank])
    row = torch.ones(16, dtype=torch.float64)
    return {
        "all-gather of 64 MB": lambda: collectives.all_gather(bucket, borders).wait(),
        "reduce-scatter of 64 MB": lambda: collectives.reduce_scatter(bucket, borders, out).wait(),
        "broadcast of 64 MB": lambda: collectives.broadcast(bucket, 0).wait(),
        "all-gather of 16 numbers": lambda: collectives.all_gather_rows(row),
        "sum of 16 numbers": lambda: collectives.sum_rows(row),
    }


def wait_after_a_pause(collectives: Collectives) -> float:
    """Seconds that are left to wait, when nobody has looked for a while."""
    bucket = torch.ones(NUMEL)
    borders = [NUMEL * part // collectives.world_size for part in range(collectives.world_size + 1)]
    handle = collectives.all_gather(bucket, borders)
    time.sleep(PAUSE)
    start = time.perf_counter()
    handle.wait()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(WORLD.bcast(f"{tempfile.mkdtemp()}/rendezvous"), WORLD.size)
    dist.init_process_group("gloo", store=store, rank=WORLD.rank, world_size=WORLD.size)
    gloo, mpi = choose_collectives(None), choose_collectives(WORLD)
    of_gloo, of_mpi = actions(gloo), actions(mpi)
    report = [f"{WORLD.size} ranks, {' '.join(MPI.Get_library_version().split()[:3])}"]
    for name in of_gloo:
        pairs = [(timed(of_gloo[name]), timed(of_mpi[name])) for _ in range(ROUNDS + 1)][1:]
        gloos, mpis = zip(*pairs, strict=True)
        ratios = [mpi / gloo for gloo, mpi in pairs]
        report.append(
            f"  {name:26}gloo {1e3 * statistics.median(gloos):8.2f} ms, MPI "
            f"{1e3 * statistics.median(mpis):8.2f} ms, MPI / gloo {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    left = [wait_after_a_pause(mpi) for _ in range(ROUNDS)]
    report.append(
        f"  an all-gather of 64 MB that nobody looks at for {PAUSE} s: "
        f"{1e3 * statistics.median(left):.2f} ms left to wait"
    )
    if WORLD.rank == 0:
        print("\n".join(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
