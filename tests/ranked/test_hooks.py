"""Step hooks, of the instance and global, fire once for the optimizer the user sees."""

import pytest
from torch.optim import AdamW
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tests.pairs import WholeAdamW, four, pair
from tests.ranks import on_ranks


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("optimizer_class", [AdamW, WholeAdamW], ids=lambda c: c.__name__)
def test_step_hooks_fire_once_of_the_instance_and_global(optimizer_class):
    trained, fired = pair(four, optimizer_class), []

    def noting(name):
        return lambda optimizer, args, kwargs: fired.append((name, optimizer))

    ours = trained.optimizer
    handles = [
        ours.register_step_pre_hook(noting("pre")),
        ours.register_step_post_hook(noting("post")),
        register_optimizer_step_pre_hook(noting("global pre")),
        register_optimizer_step_post_hook(noting("global post")),
    ]
    try:
        trained.give_gradients()
        for _ in range(2):
            fired.clear()
            ours.step()
            names = [name for name, optimizer in fired if optimizer is ours]
            assert sorted(names) == ["global post", "global pre", "post", "pre"]
            assert len(fired) == 4  # none for the local optimizer
            assert [name.split()[-1] for name in names] == ["pre", "pre", "post", "post"]
    finally:
        for handle in handles:
            handle.remove()


@on_ranks(1, 2, 3)
def test_a_hook_may_change_gradients_before_the_step():
    trained = pair(four)

    def halve(optimizer, args, kwargs):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = parameter.grad / 2

    for _, optimizer in trained.both():
        optimizer.register_step_pre_hook(halve)
    trained.train(2)
