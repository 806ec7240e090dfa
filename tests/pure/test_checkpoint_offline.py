"""What consolidate writes, read by torch and by safetensors; what diff says of two checkpoints."""

import json
import math
import struct
import subprocess
import sys
import zipfile
from collections import deque
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from shardopt.checkpoint import stream
from shardopt.checkpoint.diff import diff
from shardopt.checkpoint.offline import consolidate
from shardopt.checkpoint.plain import TensorKey, decode, map_tensors
from shardopt.errors import CorruptError, IncompleteError, MismatchError, UnsupportedError
from tests import ROOT
from tests.checkpoints import flip, training_tree, write_checkpoint
from tests.pure.test_checkpoint_plain import assert_same


@pytest.fixture
def tree():
    return training_tree()


@pytest.fixture
def step(tmp_path, tree):
    write_checkpoint(tmp_path / "step-4", tree, world_size=3)
    return tmp_path / "step-4"


def assert_tensor(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def by_index(optimizer: dict) -> dict:
    """The same with numbers for names, as plain torch has it."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    groups = [
        {**group, "params": [names.index(name) for name in group["params"]]}
        for group in optimizer["param_groups"]
    ]
    state = {names.index(name): state for name, state in optimizer["state"].items()}
    return {"state": state, "param_groups": groups}


def assert_state(got: dict, expected: dict) -> None:
    assert got["param_groups"] == expected["param_groups"]
    assert got["state"].keys() == expected["state"].keys()
    for key, state in expected["state"].items():
        assert got["state"][key].keys() == state.keys()
        for name, value in state.items():
            assert_tensor(got["state"][key][name], value)


@pytest.mark.parametrize("piece", [4 << 20, 64])
def test_a_torch_file_holds_it_all(tmp_path, step, tree, piece, monkeypatch):
    monkeypatch.setattr(stream.Stream.__init__, "__defaults__", (piece,))
    notes = consolidate(step, tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(loaded) == ["model", "optimizer", "scheduler", "extra", "step"]
    assert loaded["step"] == 4
    assert list(loaded["model"]) == list(tree["model"])
    for name, tensor in tree["model"].items():
        assert_tensor(loaded["model"][name], tensor)
        assert loaded["model"][name].stride() == tensor.stride()
        assert loaded["model"][name]._backward_hooks is None  # which tensors must not share
    assert_state(loaded["optimizer"], by_index(tree["optimizer"]))
    assert_same(loaded["scheduler"], tree["scheduler"])
    extra = loaded["extra"]
    assert_tensor(extra.pop("rng"), tree["extra"]["rng"])
    assert extra.pop("empty").shape == (0, 3)
    expected = {k: v for k, v in tree["extra"].items() if k not in ("rng", "empty")}
    assert_same(extra, {**expected, "window": [1, 2], "frozen": (5,)})
    assert notes == [
        "extra['window']: deque written as list",
        "extra['frozen']: frozenset written as tuple",
    ]


def test_the_archive_is_a_sound_zip_that_torch_maps(tmp_path, step, tree, monkeypatch):
    monkeypatch.setattr(stream.Stream.__init__, "__defaults__", (1024,))
    consolidate(step, tmp_path / "out.pt", only="model")
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
        starts = [info.header_offset for info in archive.infolist()]
    data = (tmp_path / "out.pt").read_bytes()
    for start in starts:  # the checksum stands in front of each record, too
        crc = int.from_bytes(data[start + 14 : start + 18], "little")
        assert crc in {info.CRC for info in archive.infolist() if info.header_offset == start}
        lengths = [int.from_bytes(data[start + at : start + at + 2], "little") for at in (26, 28)]
        assert (start + 30 + sum(lengths)) % 64 == 0  # where the record's data start
    mapped = torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)
    for name, tensor in tree["model"].items():
        assert_tensor(mapped[name], tensor)


def test_parts_load_bare_into_plain_torch(tmp_path, step, tree):
    consolidate(step, tmp_path / "model.pt", only="model")
    consolidate(step, tmp_path / "optimizer.pt", only="optimizer")
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(1000, 40), torch.nn.Linear(1, 1, bias=False)
    )
    model[2].to(torch.bfloat16)
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    groups = [[p for p in model.parameters() if p.ndim > 1], model[0].bias, model[1].bias]
    optimizer = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1:]}])
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    names = [name for group in tree["optimizer"]["param_groups"] for name in group["params"]]
    parameters = dict(model.named_parameters())
    for name in names:
        assert_tensor(parameters[name].detach(), tree["model"][name])
        state = tree["optimizer"]["state"][name]
        assert_tensor(optimizer.state[parameters[name]]["exp_avg_sq"], state["exp_avg_sq"])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_state_by_name(tmp_path, step, tree):
    consolidate(step, tmp_path / "out.pt", only="optimizer", keys="name")
    assert_state(torch.load(tmp_path / "out.pt", weights_only=True), tree["optimizer"])


def test_what_an_optimizer_keeps_of_its_own_stands_among_the_state(tmp_path):
    tree = {"optimizer": {"state": {"w": {"step": 1}}, "own": {"global": {"n": 2}},
                          "param_groups": [{"params": ["w"], "param_names": ["w"]}]}}  # fmt: skip
    write_checkpoint(tmp_path / "step-4", tree)
    for keys, key in (("index", 0), ("name", "w")):
        consolidate(tmp_path / "step-4", tmp_path / keys, only="optimizer", keys=keys)
        assert torch.load(tmp_path / keys, weights_only=True) == {
            "state": {key: {"step": 1}, "global": {"n": 2}},
            "param_groups": [{"params": [key], "param_names": ["w"]}],
        }


DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
          "float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128",
          "float8_e4m3fn", "float8_e5m2"]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_and_order_is_kept(tmp_path, dtype):
    size = getattr(torch, dtype).itemsize
    data = torch.randint(0, 2, (2 * 3 * 5 * size,), dtype=torch.uint8).view(getattr(torch, dtype))
    tensor = data.view(2, 3, 5).permute(2, 0, 1)
    tree = {"model": {"w": tensor, "scalar": data[0], "none": tensor[:0].contiguous()}}
    write_checkpoint(tmp_path / "step-4", tree, world_size=3)
    consolidate(tmp_path / "step-4", tmp_path / "out.pt", only="model")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert loaded["w"].stride() == tensor.stride()
    for name, expected in tree["model"].items():
        assert_tensor(loaded[name], expected)
    if dtype in ("complex32", "complex128"):
        with pytest.raises(UnsupportedError, match=rf"model\['w'\]: expected a dtype .*{dtype}"):
            consolidate(tmp_path / "step-4", tmp_path / "o.safetensors", format="safetensors")
        return
    consolidate(tmp_path / "step-4", tmp_path / "o.safetensors", format="safetensors", only="model")
    for name, got in safetensors.torch.load_file(tmp_path / "o.safetensors").items():
        assert got.is_contiguous()
        assert_tensor(got, tree["model"][name])


def test_tied_tensors_share_their_storage(tmp_path):
    weight = torch.randn(4, 3)
    tree = {"model": {"a": weight, "b": torch.ones(4)}}
    manifest = write_checkpoint(tmp_path / "step-4", tree)
    manifest.tree["model"]["c"] = manifest.tree["model"]["a"]
    manifest.tensors["model.d"] = manifest.tensors["model.a"]
    manifest.tree["model"]["d"] = TensorKey("model.d")
    (tmp_path / "step-4" / "manifest.json").write_bytes(manifest.to_bytes())
    consolidate(tmp_path / "step-4", tmp_path / "out.pt", only="model")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert loaded["a"].data_ptr() == loaded["c"].data_ptr() == loaded["d"].data_ptr()
    assert loaded["a"].data_ptr() != loaded["b"].data_ptr()
    consolidate(tmp_path / "step-4", tmp_path / "o.safetensors", format="safetensors", only="model")
    loaded = safetensors.torch.load_file(tmp_path / "o.safetensors")
    for name in "acd":
        assert_tensor(loaded[name], weight)


@pytest.mark.parametrize("only", [None, "optimizer"])
def test_tensors_in_sets_and_deques_are_written_and_named(tmp_path, only):
    one, two, three, four = (torch.full((3,), float(number)) for number in range(1, 5))
    state = {"set": {one, (2, two)}, "deque": deque([three], maxlen=2), "sets": {frozenset({four})}}
    groups = [{"params": ["w"], "words": {"a", "b"}}]
    tree = {"optimizer": {"state": {"w": state}, "param_groups": groups, "own": {}}}
    write_checkpoint(tmp_path / "step-4", tree)
    out = tmp_path / "o.safetensors"
    consolidate(tmp_path / "step-4", out, format="safetensors", only=only)
    loaded = safetensors.torch.load_file(out)
    with safetensors.safe_open(out, "pt") as file:
        text = file.metadata()["optimizer"]
    found = map_tensors(
        json.loads(text, object_hook=decode), lambda key: float(loaded.pop(key.key)[0])
    )
    assert not loaded
    state = {"set": {1.0, (2, 2.0)}, "deque": deque([3.0], maxlen=2), "sets": {frozenset({4.0})}}
    assert_same(found["state"], {0: state})
    assert found["param_groups"] == [{"params": [0], "words": {"a", "b"}}]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_mapped_elements_of_16_bytes_need_no_alignment(tmp_path):
    weight = torch.arange(30).to(torch.complex128).view(2, 3, 5).transpose(0, 1)
    state = {"model": {"a": weight, "b": weight * 2j, "c": weight + 1}}
    dcp.save(state, checkpoint_id=tmp_path / "there", no_dist=True)
    consolidate(tmp_path / "there", tmp_path / "out.pt", only="model")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, tensor in state["model"].items():
        assert torch.equal(loaded[name], tensor)


def test_an_integer_that_weights_only_cannot_read_is_refused(tmp_path):
    write_checkpoint(tmp_path / "fits", {"extra": {"n": [1 << 2038, -(1 << 2038)]}})
    consolidate(tmp_path / "fits", tmp_path / "fits.pt")
    assert torch.load(tmp_path / "fits.pt")["extra"]["n"] == [1 << 2038, -(1 << 2038)]
    write_checkpoint(tmp_path / "step-4", {"extra": {"n": [1 << 2039]}})
    with pytest.raises(UnsupportedError, match=r"extra\['n'\]\[0\]: expected integers of at most"):
        consolidate(tmp_path / "step-4", tmp_path / "out.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits", "fits.pt", "step-4"]


def test_safetensors_holds_it_all(tmp_path, step, tree):
    consolidate(step, tmp_path / "out.safetensors", format="safetensors", keys="name")
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        about = file.metadata()
        got = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = {f"model.{name}": tensor for name, tensor in tree["model"].items()}
    for key, state in tree["optimizer"]["state"].items():
        expected |= {f"optimizer.state.{key}.{name}": value for name, value in state.items()}
    expected |= {f"extra.{name}": tree["extra"][name] for name in ("rng", "empty")}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_tensor(got[name], tensor)
    data = (tmp_path / "out.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    places = json.loads(data[8 : 8 + length])
    for name, tensor in expected.items():  # where memory can be mapped
        assert (8 + length + places[name]["data_offsets"][0]) % tensor.itemsize == 0
    assert set(about) == {"format", "step", "optimizer", "scheduler", "extra"}
    assert about["format"] == "pt"
    assert about["step"] == "4"
    assert_same(json.loads(about["scheduler"], object_hook=decode), tree["scheduler"])
    groups = json.loads(about["optimizer"], object_hook=decode)["param_groups"]
    assert_same(groups, tree["optimizer"]["param_groups"])
    extra = json.loads(about["extra"], object_hook=decode)
    assert extra[3] == tree["extra"][3]
    assert extra["rng"].key == "extra.rng"


def test_a_model_alone_has_bare_names(tmp_path, step, tree):
    consolidate(step, tmp_path / "out.safetensors", format="safetensors", only="model")
    loaded = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert set(loaded) == set(tree["model"])


@pytest.mark.parametrize(("limit", "count"), [(160_500, 2), (1000, 3), (10**6, 1), (1, 5)])
def test_shards_and_index_are_as_hugging_face_has_them(tmp_path, step, tree, limit, count):
    out = tmp_path / "out" / "model.safetensors"
    out.parent.mkdir()
    consolidate(step, out, format="safetensors", only="model", max_shard_size=limit)
    written = sorted(path.name for path in out.parent.iterdir())
    if count == 1:
        assert written == ["model.safetensors"]
        return
    shards = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert written == [*shards, "model.safetensors.index.json"]
    index = json.loads((out.parent / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tree["model"].values())
    assert set(index["weight_map"]) == set(tree["model"])
    for name, file in index["weight_map"].items():
        held = safetensors.torch.load_file(out.parent / file)
        assert_tensor(held[name], tree["model"][name])
        assert sum(t.nbytes for t in held.values()) <= limit or len(held) == 1


@pytest.mark.parametrize("options", [{}, {"format": "safetensors"}])
def test_nothing_is_overwritten(tmp_path, step, options):
    out = tmp_path / "out"
    out.write_text("mine")
    told = []
    with pytest.raises(FileExistsError, match="expected a name that is not taken, got one that is"):
        consolidate(step, out, progress=lambda *where: told.append(where), **options)
    assert told == []  # it is refused at once
    out.unlink()
    with pytest.raises(FileExistsError, match="expected a name that is not taken, got one that is"):
        consolidate(step, out, progress=lambda *_: out.write_text("mine"), **options)
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "step-4"]


def test_no_shard_is_overwritten_and_none_stays(tmp_path, step):
    (tmp_path / "m-00002-of-00005.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="m-00002-of-00005"):
        consolidate(step, tmp_path / "m", format="safetensors", only="model", max_shard_size=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["m-00002-of-00005.safetensors", "step-4"]


@pytest.mark.parametrize("options", [{}, {"format": "safetensors", "max_shard_size": 1000}])
def test_damage_is_named_and_nothing_stays(tmp_path, step, options):
    (step / "rank-2.bin").write_bytes((step / "rank-2.bin").read_bytes())
    flip(step / "rank-2.bin", (step / "rank-2.bin").stat().st_size // 2)
    with pytest.raises(
        CorruptError, match=r"rank-2.bin: tensor '.*', .*, block at byte .*: expected"
    ):
        consolidate(step, tmp_path / "out", **options)
    (step / "rank-2.bin").unlink()
    with pytest.raises(IncompleteError, match=r"rank-2.bin: expected a file"):
        consolidate(step, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def test_a_part_that_is_not_there_and_options_that_make_no_sense_are_refused(tmp_path):
    write_checkpoint(tmp_path / "step-4", {"model": {"w": torch.ones(2)}})
    with pytest.raises(
        MismatchError, match=r"expected a checkpoint with 'optimizer', got .* model"
    ):
        consolidate(tmp_path / "step-4", tmp_path / "out", only="optimizer")
    for options in ({"format": "npz"}, {"keys": "id"}, {"only": "extra"}, {"max_shard_size": 5}):
        with pytest.raises(UnsupportedError, match="expected"):
            consolidate(tmp_path / "step-4", tmp_path / "out", **options)


PEAK = """
import sys, torch
def peak():  # MB
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
from shardopt.checkpoint.offline import consolidate
consolidate(sys.argv[1], sys.argv[2], format=sys.argv[3])
print(peak() - before)
"""


def peak_of_consolidate(source: Path, out: Path, format: str) -> float:  # MB
    """What it takes above the interpreter and torch, in a process of its own."""
    command = [sys.executable, "-c", PEAK, str(source), str(out), format]
    cwd = Path(__file__).parents[2]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd)
    assert out.stat().st_size > 300_000_000
    return float(ran.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize("shape", [(75_000_000,), (15_000, 5000)])
def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path, format, shape):
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    if len(shape) == 2:
        tensor = tensor.t()
    write_checkpoint(tmp_path / "step-4", {"model": {"w": tensor}})
    assert peak_of_consolidate(tmp_path / "step-4", tmp_path / "out", format) <= 64


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize("shape", [(75_000_000,), (15_000, 5000)])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_memory_is_bounded_whatever_the_size_of_a_tensor_that_torch_has_saved(
    tmp_path, format, shape, kind
):
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    if len(shape) == 2:
        tensor = tensor.t()
    source, state = tmp_path / kind, {"model": {"w": tensor}}
    if kind == "file":
        torch.save(state, source)
    else:
        dcp.save(state, checkpoint_id=source, no_dist=True)
    assert peak_of_consolidate(source, tmp_path / "out", format) <= 64


TRACED = """
import sys, tracemalloc
from shardopt.checkpoint.offline import consolidate
source, out, form = sys.argv[1:]
consolidate(source, out + "-imports", format=form)
tracemalloc.start()
consolidate(source, out, format=form)
print(tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("format", "most"), [("torch", 1800), ("safetensors", 2800)])
def test_memory_of_many_small_tensors_is_that_of_their_entries(tmp_path, format, most):
    tensors = {f"w{number}": torch.zeros(2048) for number in range(2000)}
    write_checkpoint(tmp_path / "step-4", {"model": tensors})
    command = [sys.executable, "-c", TRACED, str(tmp_path / "step-4"), str(tmp_path / "o"), format]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(ran.stdout) <= most * len(tensors)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_what_others_have_written_is_consolidated_and_compared(tmp_path, tree):
    written = {"model": tree["model"], "optimizer": by_index(tree["optimizer"])}
    torch.save(written, tmp_path / "file.pt")
    dcp.save(written, checkpoint_id=tmp_path / "directory")
    for source in ("file.pt", "directory"):
        consolidate(tmp_path / source, tmp_path / f"{source}.out")
        loaded = torch.load(tmp_path / f"{source}.out", weights_only=True)
        assert set(loaded) == {"model", "optimizer"}
        assert_state(loaded["optimizer"], written["optimizer"])
        for name, tensor in tree["model"].items():
            assert_tensor(loaded["model"][name], tensor)
    assert not diff(tmp_path / "file.pt", tmp_path / "directory")
    write_checkpoint(tmp_path / "step-4", {"model": tree["model"]})
    found = diff(tmp_path / "step-4", tmp_path / "file.pt")
    assert found.num_bit_equal == 5
    assert set(found.only.values()) == {1}
    assert not (found.kinds or found.values or found.plain)


def test_equal_checkpoints_of_other_layouts_do_not_differ(tmp_path, tree):
    write_checkpoint(tmp_path / "a", tree, world_size=1)
    write_checkpoint(tmp_path / "b", tree, world_size=4, run="other")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert not found
    assert found.num_bit_equal == 27
    assert list(found.lines(("a", "b"))) == ["27 tensors are equal bit by bit, 0 differ"]


def test_the_order_of_elements_in_memory_makes_no_difference(tmp_path):
    tensor = torch.randn(300, 70, 5)
    write_checkpoint(tmp_path / "a", {"model": {"w": tensor}}, world_size=3)
    turned = tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    write_checkpoint(tmp_path / "b", {"model": {"w": turned}}, world_size=2)
    assert diff(tmp_path / "a", tmp_path / "b").num_bit_equal == 1
    turned[299, 69, 4] += 1
    write_checkpoint(tmp_path / "c", {"model": {"w": turned}}, world_size=2)
    (found,) = diff(tmp_path / "a", tmp_path / "c").values.values()
    assert (found.num_different, found.numel) == (1, 105_000)


def test_what_differs_is_told_by_kind(tmp_path):
    nan, inf = float("nan"), float("inf")
    a = {"same": torch.ones(2), "nan": torch.tensor([nan, 0.0, 1.0]), "big": torch.zeros(600_000),
         "shape": torch.ones(2), "dtype": torch.ones(2), "mine": torch.ones(1),
         "int": torch.tensor([1 << 62, 5]), "inf": torch.tensor([inf, inf, 1.0]),
         "complex": torch.tensor([3j, 1]), "lost": torch.tensor([nan, 1.0])}  # fmt: skip
    b = {"same": torch.ones(2), "nan": torch.tensor([nan, -0.0, 1.0]), "big": torch.zeros(600_000),
         "shape": torch.ones(3), "dtype": torch.ones(2).half(), "theirs": torch.ones(1),
         "int": torch.tensor([(1 << 62) + 1, 5]), "inf": torch.tensor([inf, -inf, 1.0]),
         "complex": torch.tensor([-4 + 0j, 1]), "lost": torch.tensor([0.0, 1.0])}  # fmt: skip
    b["big"][::100_000] = torch.arange(6.0)
    plain = [{"lr": 0.1, "betas": (1, 2), "nan": nan}, {"lr": 0.2, "betas": (1, 3), "nan": nan}]
    write_checkpoint(tmp_path / "a", {"model": a, "scheduler": plain[0]}, step=4)
    write_checkpoint(tmp_path / "b", {"model": b, "scheduler": plain[1]}, step=5)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found
    assert list(found.lines(("A", "B"))) == [
        "model['mine']: only in A",
        "model['theirs']: only in B",
        "model['shape']: float32 (2,) and float32 (3,)",
        "model['dtype']: float32 (2,) and float16 (2,)",
        "model['big']: 5 of 600000 elements differ, by at most 5",
        "model['int']: 1 of 2 elements differ, by at most 1",
        "model['inf']: 1 of 3 elements differ, by at most inf",
        "model['complex']: 1 of 2 elements differ, by at most 5",
        "model['lost']: 1 of 2 elements differ, by at most inf",
        "step: 4 and 5",
        "scheduler['lr']: 0.1 and 0.2",
        "scheduler['betas'][1]: 2 and 3",
        "1 tensors are equal bit by bit, 1 equal but for the sign of zeros or NaN, 7 differ",
    ]


@pytest.mark.parametrize(("dtype", "largest"), [("uint64", 1 << 63), ("int64", 1 << 62)])
def test_integers_beyond_the_digits_of_double_are_compared(tmp_path, dtype, largest):
    one = torch.tensor([0, largest - 1, 5], dtype=getattr(torch, dtype))
    other = torch.tensor([largest, largest, 5], dtype=getattr(torch, dtype))
    for name, tensor in (("a", one), ("b", other)):
        write_checkpoint(tmp_path / name, {"model": {"w": tensor}})
    (found,) = diff(tmp_path / "a", tmp_path / "b").values.values()
    assert (found.num_different, found.largest) == (2, largest)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "complex32"])
def test_every_dtype_is_compared(tmp_path, dtype):
    one = torch.zeros(70, 3).to(getattr(torch, dtype)).t()
    other = one.clone()
    other[1, 5] = True
    for name, tensor in (("a", one), ("b", other)):
        write_checkpoint(tmp_path / name, {"model": {"w": tensor}}, world_size=2)
    assert not diff(tmp_path / "a", tmp_path / "a")
    (found,) = diff(tmp_path / "a", tmp_path / "b").values.values()
    assert (found.num_different, found.largest) == (1, 1)
    with pytest.raises(CorruptError, match="block at byte"):
        path = max((tmp_path / "b").glob("rank-*"), key=lambda path: path.stat().st_size)
        flip(path, path.stat().st_size - 1)
        diff(tmp_path / "a", tmp_path / "b")
