"""``overlap_forward``: whoever looks at a parameter after ``step`` sees what it has become."""

import copy
import gc
import io

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from shardopt import ShardedOptimizer
from tests.ranked.test_waits import DeferredCollectives
from tests.ranks import on_ranks
from tests.twins import SMALL_BUCKETS, assert_same, assert_same_parameters, make_model, train


class Recurrent(nn.Module):
    """An LSTM keeps its weights in a list of its own as well."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(61, 32), nn.Linear(32, 1)

    def forward(self, batch):
        return self.head(self.lstm(batch)[0])


def recurrent():
    torch.manual_seed(0)
    return Recurrent()


def overlapped(model, kind="replicated"):
    """Gathers that start as late as possible: whoever does not wait sees the old values."""
    optimizer = ShardedOptimizer(
        model.parameters(),
        AdamW,
        DeferredCollectives(),
        gradients=kind,
        kernel="torch",
        bucket_cap_mb=SMALL_BUCKETS,
        lr=0.1,
    )
    optimizer.overlap_forward(model)
    return optimizer


@on_ranks(2, 3, slow=[3])
@pytest.mark.parametrize("kind", ["replicated", "local", "sharded"])
@pytest.mark.parametrize("make", [make_model, recurrent], ids=lambda make: make.__name__)
def test_training_is_the_same(make, kind):
    ours, theirs = make(), make()
    optimizer, twin = overlapped(ours, kind), AdamW(theirs.parameters(), lr=0.1)
    train(ours, optimizer, 0, 3)
    train(theirs, twin, 0, 3)
    optimizer.wait()
    # The mean of three equal gradients rounds.
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0 if kind == "replicated" else 1e-5)


def values(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return values(torch.load(stream, weights_only=False))


LOOKS = {
    "attributes": lambda model, optimizer: [
        getattr(model[i], name).detach().clone() for i in (0, 2, 4) for name in ("weight", "bias")
    ],
    "parameters": lambda model, optimizer: values(model),
    "named_parameters": lambda model, optimizer: [p.clone() for _, p in model.named_parameters()],
    "state_dict": lambda model, optimizer: [t.clone() for t in model.state_dict().values()],
    "eval": lambda model, optimizer: values(model.eval()),
    "deepcopy": lambda model, optimizer: values(copy.deepcopy(model)),
    "pickle": lambda model, optimizer: saved(model),
    "get_parameter": lambda model, optimizer: [
        model.get_parameter(name) for name in [*dict(make_model().named_parameters())]
    ],
    "wait": lambda model, optimizer: [optimizer.wait(), *optimizer.param_groups[0]["params"]][1:],
    "copy of the optimizer": lambda model, optimizer: [
        copy.deepcopy(optimizer),
        *optimizer.param_groups[0]["params"],
    ][1:],
}


@on_ranks(2)
@pytest.mark.parametrize("look", LOOKS)
def test_looking_waits(look):
    ours, theirs = make_model(), make_model()
    optimizer, twin = overlapped(ours), AdamW(theirs.parameters(), lr=0.1)
    train(theirs, twin, 0, 1)
    held = [*ours.parameters()]
    train(ours, optimizer, 0, 1)
    arrived = [torch.equal(p, q) for p, q in zip(held, theirs.parameters(), strict=True)]
    assert not all(arrived), "nothing was under way"
    seen = LOOKS[look](ours, optimizer)
    assert_same([t.detach() for t in seen], [p.detach() for p in theirs.parameters()])


@on_ranks(2)
def test_changing_a_parameter_and_dropping_the_optimizer_wait():
    ours, theirs = make_model(), make_model()
    optimizer, twin = overlapped(ours), AdamW(theirs.parameters(), lr=0.1)
    for model, each in ((ours, optimizer), (theirs, twin)):
        train(model, each, 0, 1)
        with torch.no_grad():
            model[0].weight.mul_(2)
            for parameter in model[2].parameters():
                parameter.add_(1)
        train(model, each, 1, 2)
    del optimizer, each
    gc.collect()
    assert_same_parameters(ours, theirs)


@on_ranks(2)
def test_a_step_waits_for_the_one_before():
    """Nothing of the model has looked at the parameters in between."""
    ours, theirs = make_model(), make_model()
    optimizer, twin = overlapped(ours), AdamW(theirs.parameters(), lr=0.1)
    for model, each in ((ours, optimizer), (theirs, twin)):
        train(model, each, 0, 1)
        each.step()
    assert_same_parameters(ours, theirs)


@on_ranks(1, 2)
def test_a_model_of_another_optimizer_is_refused():
    optimizer = ShardedOptimizer(make_model().parameters(), AdamW)
    with pytest.raises(ValueError, match="got a Sequential with none of them"):
        optimizer.overlap_forward(make_model())
    with pytest.raises(ValueError, match="got a NoneType with none of them"):
        optimizer.overlap_forward(None)


@on_ranks(2)
def test_a_copy_of_the_model_is_plain():
    model = make_model()
    optimizer = overlapped(model)
    assert type(copy.deepcopy(model)[0]._parameters) is dict
    assert type(model[0]._parameters) is not dict
    optimizer.wait()
