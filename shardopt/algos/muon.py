"""Muon with equal shapes in one batch. Jordan et al. 2024, kellerjordan.github.io/posts/muon.

[Note: The iteration, and how far it is from torch's]

``torch.optim.Muon`` iterates each matrix by itself and in bf16, whatever the device. Here matrices
of equal shape, transposed alike, are stacked, and

- on a GPU the stack is iterated in bf16, by torch's products in torch's order;
- on a CPU in fp32, where bf16 is emulated and slower. There a wide matrix ``X (m, n)`` is not
  touched until the end: with ``G = X X'`` and ``P = a + b G + c G G``, which commute, a step is
  ``X <- P X`` and so ``G <- P G P``; five steps cost ``34 m^3 + 4 m^2 n`` instead of
  ``10 m^3 + 20 m^2 n`` operations.

Of random matrices, the update differs from that of the exact iteration (in fp64) by less than 1e-3
of its norm on a CPU, and torch's by about 0.015 (with a few rows by up to 0.1), so the two by as
much: ``TOLERANCE``. Of matrices whose singular values lie far apart, ours stays within 1e-3 of the
exact iteration, while torch's is off by up to its own norm: what bf16 rounds off at the start,
five steps multiply by up to ``a^5``, about 500. Which matrices share a stack changes an update by
rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon

TOLERANCE = 0.025  # of the norm of an update, against torch.optim.Muon: of random matrices
EXACTNESS = 1e-3  # of the norm of any matrix's update, against the iteration in fp64, on a CPU
_GROWTH = 20_000  # of what rounding leaves in G where X has nothing: 1e-3 in fp32
STACK_NUMEL = 1 << 24  # a stack has at most so many elements, or one matrix


class BatchedMuon(Muon):
    """``torch.optim.Muon``, with its options and its state, in fewer and larger products.

    Equal to it as far as bf16 goes, see [Note: The iteration, and how far it is from torch's].
    Beside parameters and state, a step takes the updates of a group, and four stacks of at most
    ``STACK_NUMEL`` elements.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, as torch's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            if parameters:
                _update(group, parameters, gradients, momenta)
        return loss


def _update(
    group: dict[str, Any],
    parameters: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
) -> None:
    lr, momentum = float(group["lr"]), group["momentum"]
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    updates: Sequence[Tensor] = momenta
    if group["nesterov"]:
        updates = torch._foreach_lerp(gradients, momenta, momentum)
    torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    for members in _stacks(updates):
        stack = _stacked([updates[index] for index in members])
        stack /= torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        stack = zeroth_power(stack, group["ns_coefficients"], group["ns_steps"])
        for index, update in zip(members, stack, strict=True):
            parameter = parameters[index]
            alpha = -_adjusted(lr, group["adjust_lr_fn"], parameter.shape)
            parameter.add_(update.T if _is_tall(parameter) else update, alpha=alpha)


def zeroth_power(
    stack: Tensor,  # (matrices, m, n), m <= n, each of norm 1 at most
    coefficients: tuple[float, float, float],
    steps: int,
) -> Tensor:
    """The quintic Newton-Schulz iteration of each matrix: singular values go towards one."""
    (_, m, n), (a, b, c) = stack.shape, coefficients
    through_gram = 4 * n + 2 * m * (4 * steps - 3)  # operations over m^2
    is_exact = stack.dtype is torch.float32 and abs(a) ** (2 * steps - 2) < _GROWTH
    if is_exact and through_gram < steps * (4 * n + 2 * m):
        return _through_gram(stack, coefficients, steps)
    for _ in range(steps):
        gram = torch.bmm(stack, stack.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        stack = torch.baddbmm(stack, polynomial, stack, beta=a)
    return stack


def _through_gram(
    stack: Tensor, coefficients: tuple[float, float, float], steps: int
) -> Tensor:  # as zeroth_power
    a, b, c = coefficients
    gram = torch.bmm(stack, stack.mT)
    product = None
    for step in range(1, steps + 1):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else torch.bmm(polynomial, product)
        if step < steps:
            gram = torch.bmm(torch.bmm(polynomial, gram), polynomial)
    return stack if product is None else torch.bmm(product, stack)


def _stacks(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of matrices that share a stack."""
    alike: dict[Any, list[int]] = {}
    for index, matrix in enumerate(matrices):
        key = (*sorted(matrix.shape), matrix.dtype, matrix.device)
        alike.setdefault(key, []).append(index)
    for members in alike.values():
        many = max(1, STACK_NUMEL // max(1, matrices[members[0]].numel()))
        yield from (members[i : i + many] for i in range(0, len(members), many))


def _stacked(matrices: Sequence[Tensor]) -> Tensor:  # (matrices, m, n), m <= n
    first = matrices[0]
    dtype = torch.float32 if first.device.type == "cpu" else torch.bfloat16
    stack = first.new_empty(len(matrices), *sorted(first.shape), dtype=dtype)
    for place, matrix in zip(stack, matrices, strict=True):
        place.copy_(matrix.T if _is_tall(matrix) else matrix)
    return stack


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _adjusted(lr: float, rule: str | None, shape: Sequence[int]) -> float:
    """The learning rate for a matrix of ``shape``, by the rules of torch."""
    rows, columns = shape
    if rule == "match_rms_adamw":
        return lr * 0.2 * max(rows, columns) ** 0.5
    return lr * max(1, rows / columns) ** 0.5
