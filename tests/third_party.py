"""Optimizer classes that are not torch's, as a user might bring them."""

import torch
from torch.optim import SGD, Optimizer

from shardopt.algos import register


class Lars(Optimizer):
    """Momentum scaled by a trust ratio (arXiv:1708.03888): reads norms of whole parameters.

    shardopt does not know it. Its state is of every kind a class may keep: tensors of the
    parameter's shape and of none, plain numbers, and a list; and it writes into its groups.
    """

    def __init__(self, params, lr=0.1, momentum=0.9, trust=0.02):
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "calls": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], **group)

    def _update(self, parameter, gradient, state, *, lr, momentum, trust, **_):
        if not state:
            state["step"] = 0
            state["velocity"] = torch.zeros_like(parameter)
            state["largest"] = torch.zeros(())
            state["norms"] = []
        norms = parameter.norm(), gradient.norm()
        state["step"] += 1
        state["norms"] = [*state["norms"][-1:], norms[1].clone()]
        state["largest"] = torch.maximum(state["largest"], norms[1].float())
        rate = lr * trust * norms[0] / norms[1].clamp(min=1e-12)
        state["velocity"].mul_(momentum).add_(gradient * rate)
        parameter.sub_(state["velocity"])


class Lion(Optimizer):
    """The sign of an interpolated momentum (arXiv:2302.06675): element-wise, and declared so."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], **group)

    def _update(self, parameter, gradient, state, *, lr, betas, weight_decay, **_):
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        parameter.mul_(1 - lr * weight_decay)
        parameter.sub_(lr * state["exp_avg"].lerp(gradient, 1 - betas[0]).sgn())
        state["exp_avg"].lerp_(gradient, 1 - betas[1])


class Scaling(SGD):
    """Has methods of its own, which change parameters, options and state."""

    fails = False

    def __init__(self, params, lr=0.1, **options):
        super().__init__(params, lr=lr, **options)
        self.handler = self.scale

    @torch.no_grad()
    def scale(self, factor):
        if self.fails:
            raise ValueError(f"no factor {factor}")
        for group in self.param_groups:
            group["lr"] *= factor
            for parameter in group["params"]:
                parameter.mul_(factor)
                self.state[parameter]["factor"] = factor
        return self

    def num_groups(self):
        return len(self.param_groups)

    def _hidden(self):
        raise AssertionError("nobody calls this")


register(Lion, per_element=["exp_avg"])
