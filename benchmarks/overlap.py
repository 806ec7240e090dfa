"""A profiler trace of one step with sharded gradients: reduce-scatter runs beside backward.

    python benchmarks/overlap.py                      # docs/overlap.json.gz, docs/overlap.png

torch's profiler on rank 0 of two gloo ranks, over one step of the GPT of ``gradients.py``,
after two to warm up. Kept are the phases, the matrix products and kernels of the update, and what
gloo's own threads report: reduce-scatter is an all-to-all there, all-gather a broadcast for each
shard. chrome://tracing and ui.perfetto.dev open the file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pathlib
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from common import on_ranks
from matplotlib.figure import Figure
from model import gpt, loss_of, windows
from torch.profiler import ProfilerActivity, profile, record_function

from shardopt import ShardedOptimizer

Event = dict[str, Any]

PHASES = ("forward", "backward", "clip", "step")
COMPUTE = ("aten::mm", "aten::_fused_adamw_", "aten::_foreach_copy_")
WIRE = {"gloo:all_to_all": "tab:red", "gloo:broadcast": "tab:green", "gloo:all_gather": "black"}
MEANING = {
    "gloo:all_to_all": "reduce-scatter",
    "gloo:broadcast": "all-gather",
    "gloo:all_gather": "agreement",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs"))
    arguments = parser.parse_args()
    on_ranks(arguments.ranks, trace, arguments.out)


def trace(rank: int, out: pathlib.Path) -> None:
    """Profile a step; rank 0 writes."""
    model, batch = gpt(width=512, layers=8, context=64), windows(rank, 4, 64)
    optimizer = ShardedOptimizer(
        model.parameters(), torch.optim.AdamW, gradients="sharded", lr=1e-3, fused=True
    )
    for _ in range(2):
        step(model, optimizer, batch)
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(model, optimizer, batch)
    if rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            whole = json.loads(pathlib.Path(f"{folder}/trace.json").read_text())
        events = trimmed(whole["traceEvents"])
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
        (out / "overlap.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        draw(out / "overlap.png", [event for event in events if event["ph"] == "X"])


def step(model: torch.nn.Module, optimizer: ShardedOptimizer, batch: tuple) -> None:
    with record_function("forward"):
        loss = loss_of(model, batch)
    with record_function("backward"):
        loss.backward()
    with record_function("clip"):
        optimizer.clip_grad_norm_(1.0)
    with record_function("step"):
        optimizer.step()


def trimmed(events: list[Event]) -> list[Event]:
    """What the picture shows, in microseconds since the step began."""
    wanted = {*PHASES, *COMPUTE, *WIRE}
    shown = [e for e in events if e.get("ph") == "X" and e["name"] in wanted]
    threads = {event["tid"] for event in shown}
    named = {e["tid"]: e for e in events if e["name"] == "thread_name" and e["tid"] in threads}
    start = min(event["ts"] for event in shown)
    shown = [
        {
            "name": event["name"],
            "ph": "X",
            "pid": event["pid"],
            "tid": event["tid"],
            "ts": round(event["ts"] - start, 1),
            "dur": round(event["dur"], 1),
        }
        for event in shown
    ]
    return [*named.values(), *sorted(shown, key=lambda event: event["ts"])]


def draw(path: pathlib.Path, events: list[Event]) -> None:
    """The timeline: phases, what this rank computes, what each of gloo's threads sends."""
    wire = sorted({event["tid"] for event in events if event["name"] in WIRE})
    rows = ["phases", "compute", *(f"gloo thread {number}" for number, _ in enumerate(wire, 1))]
    figure = Figure(figsize=(11, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for event in events:
        name, span = event["name"], (event["ts"] / 1e3, event["dur"] / 1e3)
        if name in PHASES:
            shade = ("0.9", "0.8", "0.6", "0.7")[PHASES.index(name)]
            axes.broken_barh([span], (-0.4, 0.8), color=shade)
            axes.text(span[0] + span[1] / 2, 0, name, va="center", ha="center", fontsize=8)
        elif name in COMPUTE:
            color = "tab:blue" if name == "aten::mm" else "tab:orange"
            axes.broken_barh([span], (0.6, 0.8), color=color)
        else:
            axes.broken_barh([span], (1.6 + wire.index(event["tid"]), 0.8), color=WIRE[name])
    legend = [("matrix product", "tab:blue"), ("copy, update", "tab:orange")]
    legend += [(MEANING[name], color) for name, color in WIRE.items()]
    for label, color in legend:
        axes.broken_barh([(0, 0)], (0, 0), color=color, label=label)
    axes.legend(ncols=len(legend), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    axes.set(yticks=range(len(rows)), yticklabels=rows, xlabel="ms, rank 0")
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
    print(overlap(events))


def overlap(events: list[Event]) -> str:
    """How much of the reduce-scatter has passed before backward has."""
    phase = next(event for event in events if event["name"] == "backward")
    end = phase["ts"] + phase["dur"]
    spans = [e for e in events if MEANING.get(e["name"]) == "reduce-scatter"]
    beside = sum(max(0.0, min(e["ts"] + e["dur"], end) - e["ts"]) for e in spans)
    total = sum(event["dur"] for event in spans)
    return (
        f"backward {phase['dur'] / 1e3:.0f} ms; {len(spans)} reduce-scatters,"
        f" {total / 1e3:.0f} ms, of which {beside / 1e3:.0f} ms run beside backward"
    )


if __name__ == "__main__":
    main()
