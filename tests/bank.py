"""The bank of algorithms: one row for each way to build one. A new algorithm is a few new rows.

Every row meets every test of ``ranked/test_bank.py``; ``pure/test_algorithms.py`` keeps the bank
complete: no class and no argument forgotten, and no argument given in vain.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from tests.third_party import Lars, Lion

# What the second group has of its own, in every row.
SECOND: dict[type[Optimizer], dict[str, Any]] = {
    SGD: {"lr": 0.05, "weight_decay": 0.01},
    Adam: {"lr": 0.02, "betas": (0.8, 0.95)},
    AdamW: {"lr": 0.02, "betas": (0.8, 0.95)},
    Adamax: {"lr": 0.02, "betas": (0.8, 0.95)},
    NAdam: {"lr": 0.02, "momentum_decay": 0.01},
    RAdam: {"lr": 0.02, "betas": (0.8, 0.9)},
    Adagrad: {"lr": 0.05, "lr_decay": 0.01},
    Adadelta: {"lr": 0.5, "rho": 0.8},
    RMSprop: {"lr": 0.02, "alpha": 0.9},
    Rprop: {"lr": 0.02, "etas": (0.6, 1.1)},
    ASGD: {"lr": 0.05, "t0": 1},
    Adafactor: {"lr": 0.05, "d": 2.0},
    Muon: {"lr": 0.02, "momentum": 0.9},
    SparseAdam: {"lr": 0.02, "betas": (0.8, 0.95)},
    Lars: {"lr": 0.2, "trust": 0.05},
    Lion: {"lr": 0.01, "betas": (0.8, 0.95)},
}

# The classes for which kernel="auto" may choose torch's fused kernel, and on which devices.
FUSED_BY_AUTO = {SGD: "cpu cuda", Adam: "cpu cuda", AdamW: "cpu cuda", Adagrad: "cpu"}

# Torch refuses complex parameters.
REAL_ONLY = {Adafactor, Muon, SparseAdam}

# Its step calls a closure: ``ranked/test_lbfgs.py``.
NO_ROWS = {torch.optim.LBFGS}
REFUSED_ARGUMENTS = {"differentiable"}


@dataclass(frozen=True)
class Case:
    """One way to build one algorithm."""

    optimizer_class: type[Optimizer]
    options: Mapping[str, Any]  # of both groups, as the constructor takes them

    @property
    def name(self) -> str:
        """``SGD momentum=0.9 nesterov``; the class alone stands for its defaults."""
        words = [self.optimizer_class.__name__]
        for key, value in self.options.items():
            if value is True:
                words.append(key)
            elif "tensor" in str(value):
                words.append(f"{key}=tensor")
            else:
                words.append(f"{key}={value}".replace(" ", ""))
        return " ".join(words)

    @property
    def only_on_gpu(self) -> bool:
        """Torch runs ``capturable`` on accelerators alone."""
        return "capturable" in self.options

    @property
    def chooses_kernel(self) -> bool:
        """Whether the user says which of torch's kernels runs."""
        return "foreach" in self.options or "fused" in self.options

    @property
    def keeps_tensors_whole(self) -> bool:
        """Whether the class must see whole parameters."""
        return self.optimizer_class in (Adafactor, Muon, Lars)

    @property
    def takes_rows(self) -> bool:
        """Whether gradients are sparse: some rows of a table, some of them twice."""
        return self.optimizer_class is SparseAdam

    def fuses(self, device: str, dtype: torch.dtype) -> bool:
        """Whether ``kernel="auto"`` is to choose torch's fused kernel.

        torch's fused SGD does not move parameters of 16 bits on a CPU.
        """
        stands_still = self.optimizer_class is SGD and dtype.itemsize < 4 and device == "cpu"
        return (
            not self.chooses_kernel
            and not stands_still
            and device in FUSED_BY_AUTO.get(self.optimizer_class, "").split()
            and dtype.is_floating_point
            and not self.options.get("momentum")
        )


def case(optimizer_class: type[Optimizer], **options: Any) -> Case:
    """A row."""
    return Case(optimizer_class, options)


ROWS = [
    case(SGD),
    case(SGD, lr=0.1),
    case(SGD, lr=tensor(0.1)),
    case(SGD, momentum=0.9),
    case(SGD, momentum=0.9, dampening=0.5),
    case(SGD, momentum=0.9, nesterov=True),
    case(SGD, momentum=0.9, weight_decay=0.1, maximize=True),
    case(SGD, weight_decay=0.1),
    case(SGD, weight_decay=tensor(0.1)),
    case(SGD, maximize=True),
    case(SGD, foreach=True, momentum=0.9, nesterov=True),
    case(SGD, fused=True),
    case(SGD, fused=True, momentum=0.9, nesterov=True, maximize=True),
    *(
        row
        for adam in (Adam, AdamW)
        for row in (
            case(adam),
            case(adam, lr=0.01),
            case(adam, lr=tensor(0.01)),
            case(adam, betas=(0.5, 0.7)),
            case(adam, lr=tensor(0.01), betas=(tensor(0.5), tensor(0.7))),
            case(adam, eps=1e-2),
            case(adam, weight_decay=0.1),
            case(adam, amsgrad=True),
            case(adam, maximize=True),
            case(adam, foreach=True, amsgrad=True),
            case(adam, fused=True),
            case(adam, fused=True, amsgrad=True, weight_decay=0.1, maximize=True),
            case(adam, fused=True, lr=tensor(0.01)),
            case(adam, capturable=True, amsgrad=True),
        )
    ),
    case(Adam, weight_decay=0.1, decoupled_weight_decay=True),
    case(Adamax),
    case(Adamax, lr=0.01),
    case(Adamax, lr=tensor(0.01)),
    case(Adamax, betas=(0.5, 0.7)),
    case(Adamax, eps=1e-2),
    case(Adamax, weight_decay=0.1),
    case(Adamax, maximize=True),
    case(Adamax, foreach=True),
    case(Adamax, capturable=True),
    case(NAdam),
    case(NAdam, lr=0.01),
    case(NAdam, lr=tensor(0.01)),
    case(NAdam, betas=(0.5, 0.7)),
    case(NAdam, eps=1e-2),
    case(NAdam, weight_decay=0.1),
    case(NAdam, momentum_decay=0.1),
    case(NAdam, weight_decay=0.1, decoupled_weight_decay=True),
    case(NAdam, maximize=True),
    case(NAdam, foreach=True),
    case(NAdam, capturable=True),
    case(RAdam),
    case(RAdam, lr=0.01),
    case(RAdam, lr=tensor(0.01)),
    case(RAdam, betas=(0.5, 0.7)),
    case(RAdam, eps=1e-2),
    case(RAdam, weight_decay=0.1),
    case(RAdam, weight_decay=0.1, decoupled_weight_decay=True),
    case(RAdam, maximize=True),
    case(RAdam, foreach=True),
    case(RAdam, capturable=True),
    case(Adagrad),
    case(Adagrad, lr=0.1),
    case(Adagrad, lr=tensor(0.1)),
    case(Adagrad, lr_decay=0.1),
    case(Adagrad, weight_decay=0.1),
    case(Adagrad, initial_accumulator_value=0.5),
    case(Adagrad, eps=1e-2),
    case(Adagrad, maximize=True),
    case(Adagrad, foreach=True),
    case(Adagrad, fused=True, lr_decay=0.1, maximize=True),
    case(Adadelta),
    case(Adadelta, lr=0.1),
    case(Adadelta, lr=tensor(0.1)),
    case(Adadelta, rho=0.5),
    case(Adadelta, eps=1e-2),
    case(Adadelta, weight_decay=0.1),
    case(Adadelta, maximize=True),
    case(Adadelta, foreach=True),
    case(Adadelta, capturable=True),
    case(RMSprop),
    case(RMSprop, lr=0.1),
    case(RMSprop, lr=tensor(0.1)),
    case(RMSprop, alpha=0.5),
    case(RMSprop, eps=1e-2),
    case(RMSprop, weight_decay=0.1),
    case(RMSprop, momentum=0.9),
    case(RMSprop, centered=True),
    case(RMSprop, maximize=True),
    case(RMSprop, foreach=True, momentum=0.9, centered=True),
    case(RMSprop, capturable=True),
    case(Rprop),
    case(Rprop, lr=0.1),
    case(Rprop, lr=tensor(0.1)),
    case(Rprop, etas=(0.3, 1.5)),
    case(Rprop, step_sizes=(0.008, 0.012)),
    case(Rprop, maximize=True),
    case(Rprop, foreach=True),
    case(Rprop, capturable=True),
    case(ASGD),
    case(ASGD, lr=0.1),
    case(ASGD, lr=tensor(0.1)),
    case(ASGD, lambd=0.1),
    case(ASGD, alpha=0.5, lambd=0.1),
    case(ASGD, t0=2),
    case(ASGD, weight_decay=0.1),
    case(ASGD, maximize=True),
    case(ASGD, foreach=True),
    case(ASGD, capturable=True),
    case(Adafactor),
    case(Adafactor, lr=0.1),
    case(Adafactor, lr=tensor(0.1)),
    case(Adafactor, beta2_decay=-0.5),
    case(Adafactor, eps=(1e-2, 1e-2)),
    case(Adafactor, d=1.5),
    case(Adafactor, weight_decay=0.1),
    case(Adafactor, maximize=True),
    case(Adafactor, foreach=True),
    case(Muon),
    case(Muon, lr=0.1),
    case(Muon, lr=tensor(0.1)),
    case(Muon, weight_decay=0.5),
    case(Muon, momentum=0.5),
    case(Muon, nesterov=False),
    case(Muon, ns_coefficients=(3.0, -4.0, 2.0)),
    case(Muon, eps=1e3),
    case(Muon, ns_steps=3),
    case(Muon, adjust_lr_fn="match_rms_adamw"),
    case(SparseAdam),
    case(SparseAdam, lr=0.1),
    case(SparseAdam, lr=tensor(0.1)),
    case(SparseAdam, betas=(0.5, 0.7)),
    case(SparseAdam, eps=1e-2),
    case(SparseAdam, maximize=True),
    case(Lars),
    case(Lars, lr=0.3),
    case(Lars, momentum=0.5),
    case(Lars, trust=0.1),
    case(Lion),
    case(Lion, lr=0.01),
    case(Lion, betas=(0.5, 0.7)),
    case(Lion, weight_decay=0.1),
]

BANK = {row.name: row for row in ROWS}
DEFAULTS = [name for name, row in BANK.items() if not row.options]
ON_CPU = [name for name, row in BANK.items() if not row.only_on_gpu]
ON_GPU = [
    name
    for name, row in BANK.items()
    if not row.options or row.only_on_gpu or row.options.get("fused")
]
LEFT_TO_AUTO = [
    name
    for name in ON_CPU
    if name in DEFAULTS
    or (BANK[name].optimizer_class in FUSED_BY_AUTO and not BANK[name].chooses_kernel)
]
