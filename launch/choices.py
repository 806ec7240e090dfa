"""What there is to choose from: sizes of the model, optimizers, kinds of gradients, schedules."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Size(NamedTuple):
    """A preset: the model, and the batch and length of run that suit it."""

    num_layers: int
    num_heads: int
    width: int
    context: int  # bytes
    batch: int  # windows of one step, over all ranks
    steps: int


SIZES = {
    "tiny": Size(2, 2, 32, context=32, batch=6, steps=50),
    "small": Size(4, 4, 128, context=64, batch=16, steps=1000),
    "medium": Size(8, 8, 512, context=256, batch=64, steps=4000),
}


class Recipe(NamedTuple):
    """A class of ``torch.optim`` with the options it is tried with here."""

    lr: float
    options: Mapping[str, Any] = {}
    has_weight_decay: bool = True
    takes: str = "everything"  # or "matrices", or "embeddings": AdamW has the rest of the model
    evaluates: bool = False  # the model, by a closure, as often as it likes within a step


OPTIMIZERS = {
    "AdamW": Recipe(lr=4e-3),
    "Adam": Recipe(lr=4e-3),
    "Adamax": Recipe(lr=8e-3),
    "NAdam": Recipe(lr=4e-3),
    "RAdam": Recipe(lr=4e-3),
    "Adagrad": Recipe(lr=2e-2),
    "Adadelta": Recipe(lr=1.0),
    "RMSprop": Recipe(lr=1e-3),
    "Rprop": Recipe(lr=1e-3, has_weight_decay=False),
    "SGD": Recipe(lr=0.1, options={"momentum": 0.9}),
    "ASGD": Recipe(lr=0.5),
    "Adafactor": Recipe(lr=2e-2),
    "Muon": Recipe(lr=2e-2, takes="matrices"),
    "SparseAdam": Recipe(lr=4e-3, takes="embeddings", has_weight_decay=False),
    "LBFGS": Recipe(
        lr=1.0,
        options={"max_iter": 4, "history_size": 10, "line_search_fn": "strong_wolfe"},
        has_weight_decay=False,
        evaluates=True,
    ),
}
COMPANION = "AdamW"  # has what the chosen class does not take
GRADIENTS = {
    "replicated": "DDP averages them",
    "local": "shardopt averages them",
    "sharded": "shardopt averages them, and each rank keeps its part only",
}
SCHEDULERS = {
    "none": "the lr stays",
    "cosine": "warm-up over a twentieth of the steps, then half a cosine down to a tenth",
    "linear": "a straight line down to a tenth",
    "step": "times 0.3 after each third of the steps",
    "onecycle": "OneCycleLR with --lr as its peak",
    "plateau": "times 0.5 once the held-out loss has not improved for two evaluations",
}
