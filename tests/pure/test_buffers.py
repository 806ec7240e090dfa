"""Parameters become views of buckets, and keep a storage, strides and values of their own."""

import copy
import gc
import io
import itertools
import random

import pytest
import torch
from torch import Tensor, nn

from shardopt import ShardedOptimizer
from shardopt.buffers import ParameterBuffers, dense_strides, in_memory_order, is_dense
from shardopt.comm import SoloCollectives
from shardopt.layout import Atom, Layout, ParameterSpec, plan_layout

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.bool,
]


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor whose elements can be told apart, as far as the dtype allows."""
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)


FORMS = {
    "0-dim": lambda: numbered()[...],
    "vector": lambda: numbered(70),
    "matrix": lambda: numbered(9, 11),
    "zero-size": lambda: numbered(3, 0),
    "channels_last": lambda: numbered(4, 3, 5, 2).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: numbered(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: numbered(9, 11).T,
    "permuted": lambda: numbered(3, 4, 5).permute(1, 2, 0),
    "1x1 convolution": lambda: numbered(6, 5, 1, 1).to(memory_format=torch.channels_last),
}
GAPPED = {
    "sliced": lambda: numbered(9, 11)[:, 2:7],
    "stepped": lambda: numbered(40)[::3],
    "expanded": lambda: numbered(5).expand(3, 5),
    "inner of three": lambda: numbered(3, 4, 5)[:, 1:3],
    "transposed and sliced": lambda: numbered(9, 11).T[1:4],
}


def layout_of(tensors, world_size=1, atom=Atom.ELEMENT, bucket_bytes=1 << 20) -> Layout:
    specs = [
        ParameterSpec(name=f"p{i}", shape=tuple(t.shape), dtype=t.dtype, cost=t.numel())
        for i, t in enumerate(tensors)
    ]
    return plan_layout(specs, atom, world_size=world_size, bucket_bytes=bucket_bytes)


def adopted(*tensors: Tensor) -> ParameterBuffers:
    """Buffers that have moved ``tensors`` in, with a neighbour on either side."""
    tensors = [torch.ones(5, dtype=tensors[0].dtype), *tensors, torch.ones(7, dtype=torch.float32)]
    buffers = ParameterBuffers(SoloCollectives())
    buffers.adopt(layout_of(tensors), tensors)
    return buffers


def assert_owns_its_storage(tensor: Tensor) -> None:
    assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert tensor.storage_offset() == 0


def lies_in(tensor: Tensor, memory: Tensor) -> bool:
    storage = memory.untyped_storage()  # smaller than the tensor, if that is expanded
    return 0 <= tensor.data_ptr() - storage.data_ptr() < storage.nbytes()


# -- what a parameter keeps ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_moves_in(dtype):
    requires_grad = dtype.is_floating_point or dtype.is_complex
    parameter = nn.Parameter(numbered(6, 7, dtype=dtype), requires_grad=requires_grad)
    before, before_id = parameter.detach().clone(), id(parameter)
    buffers = adopted(parameter)
    bucket = buffers.buckets[buffers_place(buffers, parameter)]
    assert lies_in(parameter, bucket) and bucket.dtype == dtype
    assert_owns_its_storage(parameter)
    assert id(buffers.parameters[1]) == before_id
    assert isinstance(parameter, nn.Parameter) and parameter.requires_grad == requires_grad
    assert parameter.is_leaf and torch.equal(parameter.view(torch.uint8), before.view(torch.uint8))


def buffers_place(buffers: ParameterBuffers, parameter: Tensor) -> int:
    return next(n for n, bucket in enumerate(buffers.buckets) if lies_in(parameter, bucket))


@pytest.mark.parametrize("form", FORMS)
def test_strides_of_dense_tensors_are_kept(form):
    tensor = FORMS[form]()
    before = tensor.clone(memory_format=torch.preserve_format)
    strides = tensor.stride()
    buffers = adopted(tensor)
    assert (tensor.stride(), tensor.shape) == (strides, before.shape)
    assert torch.equal(tensor, before)
    assert_owns_its_storage(tensor)
    assert lies_in(tensor, buffers.buckets[0]) or tensor.numel() == 0


@pytest.mark.parametrize("form", GAPPED)
def test_tensors_with_gaps_become_contiguous(form):
    tensor = GAPPED[form]()
    before = tensor.clone()
    assert not is_dense(tensor)
    adopted(tensor)
    assert is_dense(tensor) and torch.equal(tensor, before)
    assert_owns_its_storage(tensor)


@pytest.mark.parametrize("form", FORMS)
def test_bucket_and_parameter_are_one_memory(form):
    tensor = FORMS[form]()
    buffers = adopted(tensor)
    buffers.buckets[0].zero_()
    assert not tensor.any()
    tensor.fill_(3)
    assert buffers.buckets[0].sum() == 3 * tensor.numel()
    assert torch.equal(buffers.parameters[0], torch.zeros(5))  # the neighbour


# -- segments --------------------------------------------------------------------------------------

GRADIENTS = {
    "as the parameter": lambda like: torch.randn_like(like),
    "contiguous": lambda like: torch.randn(like.shape),
    "with gaps": lambda like: torch.randn(*like.shape, 2)[..., 0],
    "expanded": lambda like: torch.randn(1, 1, 1, 1).expand(like.shape),
}


@pytest.mark.parametrize("atom", Atom)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_segments_of_a_gradient_fit_those_of_its_parameter(atom, gradient):
    """In place, shape and strides: fused CPU kernels take strides to be equal without a look."""
    parameter = torch.zeros(40, 20, 3, 2).to(memory_format=torch.channels_last)
    layout = layout_of([parameter], world_size=3, atom=atom)
    buffers = ParameterBuffers(SoloCollectives())
    buffers.adopt(layout, [parameter])
    grad = GRADIENTS[gradient](parameter)
    segments = [s for rank in range(3) for s in layout.buckets[0].segments(rank)]
    assert len(segments) == (1 if atom is Atom.TENSOR else 3)
    for segment in segments:
        part, grad_part = buffers.segment(0, segment), buffers.segment_of(grad, segment)
        assert (part.shape, part.stride()) == (grad_part.shape, grad_part.stride())
        assert lies_in(grad_part, grad) == (gradient == "as the parameter")
        part.copy_(grad_part)
    assert torch.equal(parameter, grad)


def test_a_sparse_gradient_of_a_whole_parameter_stays_sparse():
    parameter = torch.zeros(4, 4)
    buffers, layout = adopted(parameter), layout_of([parameter])
    (segment,) = layout.buckets[0].segments(0)
    grad = torch.eye(4).to_sparse()
    assert buffers.segment_of(grad, segment) is grad


# -- what users do with a model --------------------------------------------------------------------


def optimized_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    model[1].to(memory_format=torch.channels_last)
    ShardedOptimizer(model.parameters(), torch.optim.AdamW)
    return model


def saved_bytes(module: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.tell()


def test_saving_one_layer_writes_that_layer():
    model = optimized_model()
    for layer in model:
        assert saved_bytes(layer) <= 1.01 * saved_bytes(copy.deepcopy(layer))
    assert saved_bytes(model[2]) < 3000 < 100_000 < saved_bytes(model)


def test_a_saved_layer_loads_with_its_values_and_strides():
    layer = optimized_model()[1]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)["weight"]
    assert torch.equal(loaded, layer.weight) and loaded.stride() == layer.weight.stride()


def test_a_deep_copy_of_the_model_has_memory_of_its_own():
    model = optimized_model()
    twin = copy.deepcopy(model)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
        assert_owns_its_storage(theirs)
        before = ours.detach().clone()
        theirs.data.fill_(7)
        assert torch.equal(ours, before)


def test_safetensors_saves_the_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = optimized_model()
    model[1].to(memory_format=torch.contiguous_format)  # safetensors takes no other
    safetensors.save_model(model, tmp_path / "model")
    loaded = safetensors.load_file(tmp_path / "model")
    assert {name: p.tolist() for name, p in model.named_parameters()} == {
        name: value.tolist() for name, value in loaded.items()
    }


def test_memory_outlives_the_optimizer():
    model = optimized_model()
    before = [parameter.tolist() for parameter in model.parameters()]
    gc.collect()
    noise = [torch.full((size,), 5.0) for size in range(1000, 100_000, 1000)]
    assert [parameter.tolist() for parameter in model.parameters()] == before
    del noise


# -- strides, by brute force -----------------------------------------------------------------------


def random_view(rng: random.Random) -> Tensor:
    """A tensor with up to 4 dimensions, permuted, sliced, expanded or neither."""
    tensor = numbered(*(rng.choice([1, 1, 2, 3, 4]) for _ in range(rng.randrange(5))))
    for _ in range(rng.randrange(3)):
        if tensor.dim() and rng.random() < 0.7:
            order = rng.sample(range(tensor.dim()), tensor.dim())
            tensor = tensor.permute(order)
        elif tensor.dim() and rng.random() < 0.5:
            dim = rng.randrange(tensor.dim())
            tensor = tensor.narrow(dim, 0, rng.randrange(tensor.shape[dim] + 1))
        else:
            tensor = tensor.unsqueeze(0).expand(rng.choice([1, 2]), *tensor.shape)
    return tensor


def offsets(tensor: Tensor) -> list[int]:
    """Where each element lies, counted from the first."""
    indices = itertools.product(*map(range, tensor.shape))
    return [sum(map(int.__mul__, index, tensor.stride())) for index in indices]


def test_is_dense_against_brute_force():
    rng, seen = random.Random(0), set()
    for _ in range(2000):
        tensor = random_view(rng)
        expected = sorted(offsets(tensor)) == list(range(tensor.numel()))
        assert is_dense(tensor) == expected, (tensor.shape, tensor.stride())
        seen.add(expected)
    assert seen == {True, False}


def test_dense_strides_are_dense_and_kept_where_they_were():
    rng = random.Random(1)
    for _ in range(500):
        tensor = random_view(rng)
        strides = dense_strides(tensor)
        assert is_dense(torch.empty_strided(tensor.shape, strides))
        assert strides == tensor.stride() or not is_dense(tensor)


def test_in_memory_order_against_brute_force():
    rng, num_views = random.Random(2), 0
    for _ in range(1000):
        tensor, other = random_view(rng), random_view(rng)
        strides = dense_strides(tensor)
        if other.shape == tensor.shape and is_dense(other):
            strides = other.stride()
        flat = in_memory_order(tensor, strides)
        places = offsets(torch.empty_strided(tensor.shape, strides))
        expected = [
            value for _, value in sorted(zip(places, tensor.reshape(-1).tolist(), strict=True))
        ]
        assert flat.shape == (tensor.numel(),) and flat.tolist() == expected
        num_views += flat.data_ptr() == tensor.data_ptr()
        if strides == tensor.stride():
            assert flat.data_ptr() == tensor.data_ptr() or tensor.numel() == 0
    assert num_views > 300
