"""Checkpoints of torch's distributed checkpoint and of ``torch.save``, opened and read."""

import contextlib
import io
import os
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import MetadataIndex

from shardopt.checkpoint.boxes import Box
from shardopt.checkpoint.foreign import unpickler
from shardopt.checkpoint.foreign.mapped import RESIDENT
from shardopt.checkpoint.opening import open_source
from shardopt.checkpoint.plain import TensorKey
from shardopt.errors import CorruptError, IncompleteError, UnsupportedError
from tests.foreign import Trap, filled, read_box, trapped
from tests.twins import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

TENSORS = {
    "fp32": torch.arange(60.0).view(3, 4, 5),
    "bf16": torch.arange(7, dtype=torch.bfloat16),
    "fp16": torch.arange(7, dtype=torch.float16),
    "fp64": torch.arange(7, dtype=torch.float64),
    "int64": torch.arange(6).view(2, 3),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "bool": torch.tensor([True, False, True]),
    "complex64": torch.randn(3, 2, dtype=torch.complex64),
    "float8": torch.arange(5.0).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "view": torch.arange(100)[10:20:2],
    "expanded": torch.ones(1).expand(4),
    "parameter": nn.Parameter(torch.ones(2)),
}


def saved(folder, state):
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    )
    model(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def metadata_of(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def rewrite(folder, metadata):
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def state_in_file(path, content, **options):
    torch.save(content, path, **options)
    return path


def forms(tmp_path, state):
    """The same saved in both ways."""
    yield saved(tmp_path / "dcp", state)
    yield state_in_file(tmp_path / "file.pt", state)


# ---- what is in them


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_tensor_of_any_kind_is_read(tmp_path, name, kind):
    state = {"model": {"w": TENSORS[name]}}
    path = saved(tmp_path / "d", state) if kind == "directory" else tmp_path / "f"
    if kind == "file":
        torch.save(state, path)
    with open_source(path) as source:
        read = read_box(source, "model.w")
        assert source.tree == {"model": {"w": TensorKey("model.w")}}
    assert read.dtype == TENSORS[name].dtype
    assert_same(read, TENSORS[name].detach())


@pytest.mark.parametrize("name", ["fp32", "channels_last", "transposed", "complex64"])
def test_any_part_of_a_tensor_is_read(tmp_path, name):
    tensor = TENSORS[name]
    for path in forms(tmp_path, {"model": {"w": tensor}}):
        with open_source(path) as source:
            for dim, size in enumerate(tensor.shape):
                for low in range(size):
                    offsets, sizes = [0] * tensor.ndim, list(tensor.shape)
                    offsets[dim], sizes[dim] = low, min(2, size - low)
                    box = Box(tuple(offsets), tuple(sizes))
                    expected = tensor.narrow(dim, low, sizes[dim])
                    assert_same(read_box(source, "model.w", box), expected)


def test_a_file_of_tensors_in_memory_order_keeps_it(tmp_path):
    path = state_in_file(tmp_path / "f", TENSORS)
    with open_source(path) as source:
        assert source.tensors["channels_last"].order == (0, 2, 3, 1)
        assert source.tensors["transposed"].order == (1, 0)
        assert source.tensors["fp32"].order is None


@pytest.mark.parametrize("order", ["little", "big"])
def test_what_is_let_go_after_it_was_read_comes_again(tmp_path, order):
    tensor = torch.arange(RESIDENT // 4 + 1, dtype=torch.int32)
    content = {"model": {"w": tensor}}
    (tmp_path / "f").write_bytes(archive_with(tmp_path, content, {"byteorder": order.encode()}))
    expected = tensor if order == sys.byteorder else torch.from_numpy(tensor.numpy().byteswap())
    with open_source(tmp_path / "f") as source:
        for _ in range(2):
            assert_same(read_box(source, "model.w"), expected)


def test_opening_reads_no_tensor(tmp_path):
    tensors = {f"w{i}": torch.zeros(1000) for i in range(20)}
    with open_source(saved(tmp_path / "d", tensors)) as source:
        assert source.reader.bytes_read == 0
        read_box(source, "w3", Box((10,), (20,)))
        assert 0 < source.reader.bytes_read < 10_000
        before = source.reader.bytes_read
        assert source.tensors["w3"].chunks[0].crcs is None
        assert source.reader.bytes_read == before


def test_a_file_is_mapped_not_copied(tmp_path):
    path = state_in_file(tmp_path / "f", {"model": {"w": torch.zeros(1 << 20)}})
    with open_source(path) as source:
        where = source.reader._held["model.w"].data_ptr()
        with open("/proc/self/maps") as maps:
            spans = [line.split() for line in maps if str(path) in line]
    assert any(
        int(low, 16) <= where < int(high, 16)
        for low, high in (span[0].split("-") for span in spans)
    )


# ---- what they are called


def usual(model, optimizer):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "epoch": 2}


def with_suffix(model, optimizer):
    return {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "global_step": 3,
        "epoch": 2,
    }


def short(model, optimizer):
    return {
        "state_dict": model.state_dict(), "optim": optimizer.state_dict(), "step": 3, "epoch": 2,
    }  # fmt: skip


@pytest.mark.parametrize("names", [usual, with_suffix, short])
def test_model_and_optimizer_are_found_by_their_usual_names(tmp_path, names):
    model, optimizer = training()
    for path in forms(tmp_path, names(model, optimizer)):
        with open_source(path) as source:
            assert set(source.tree) == {"model", "optimizer", "extra"}
            assert_same(filled(source.tree["model"], source), dict(model.state_dict()))
            assert_same(filled(source.tree["optimizer"], source), optimizer.state_dict())
            assert source.tree["extra"] == {"epoch": 2}
            assert source.step == 3


class App:
    """An application's state as DCP's tutorial has it."""

    def __init__(self, model, optimizer):
        self.parts = {"model": model.state_dict(), "optim": optimizer.state_dict()}

    def state_dict(self):
        return self.parts

    def load_state_dict(self, state_dict):
        raise NotImplementedError


def test_they_are_found_one_level_down(tmp_path):
    model, optimizer = training()
    path = saved(tmp_path / "d", {"app": App(model, optimizer), "seed": torch.tensor(5)})
    with open_source(path) as source:
        assert set(source.tree) == {"model", "optimizer", "extra"}
        assert_same(filled(source.tree["model"], source), dict(model.state_dict()))
        assert_same(filled(source.tree["optimizer"], source), optimizer.state_dict())
        assert filled(source.tree["extra"], source) == {"seed": torch.tensor(5)}


def test_a_model_alone_is_one(tmp_path):
    model, _ = training()
    for path in forms(tmp_path, model.state_dict()):
        with open_source(path) as source:
            assert set(source.tree) == {"model"}
            assert_same(filled(source.tree["model"], source), dict(model.state_dict()))


@pytest.mark.parametrize("steps", [0, 1])
def test_an_optimizer_alone_is_one(tmp_path, steps):
    _, optimizer = training()
    if not steps:
        optimizer.state.clear()
    for path in forms(tmp_path, optimizer.state_dict()):
        with open_source(path) as source:
            assert set(source.tree) == {"optimizer"}
            assert_same(filled(source.tree["optimizer"], source), optimizer.state_dict())


def flattened(model, optimizer):
    """As torchtitan saves: the model's tensors beside an optimizer of flat keys."""
    names = {param: name for name, param in model.named_parameters()}
    optim = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            for name, value in optimizer.state[param].items():
                optim[f"state.{names[param]}.{name}"] = value
            for option in group.keys() - {"params"}:
                optim[f"param_groups.{names[param]}.{option}"] = group[option]
    return {**model.state_dict(), "optimizer": optim, "lr_scheduler": {"last_epoch": 4}}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_flat_keys_become_groups_again(tmp_path, lr):
    model, optimizer = training()
    optimizer.param_groups[0]["lr"] = lr
    for path in forms(tmp_path, flattened(model, optimizer)):
        with open_source(path) as source:
            assert set(source.tree) == {"model", "optimizer", "scheduler"}
            found = filled(source.tree["optimizer"], source)
            assert_same(filled(source.tree["model"], source), dict(model.state_dict()))
        groups = found["param_groups"]
        assert [g["params"] for g in groups] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
        assert [float(g["lr"]) for g in groups] == [pytest.approx(0.1), 1e-3]
        state = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
        assert_same(found["state"], state)


def test_nested_state_is_found_under_a_name_with_dots(tmp_path):
    optim = {
        "state.a.b.factors.0": torch.ones(2),
        "state.a.b.step": 3,
        "param_groups.a.b.lr": 0.1,
    }
    path = saved(tmp_path / "d", {"a.b": torch.zeros(2), "optimizer": optim})
    with open_source(path) as source:
        assert source.tree["optimizer"]["state"] == {
            "a.b": {"factors": {"0": TensorKey("optimizer.state.a.b.factors.0")}, "step": 3}
        }
        assert source.tree["model"] == {"a.b": TensorKey("a.b")}


def test_values_and_containers_are_kept(tmp_path):
    values = {
        "list": [1, {"a": [torch.ones(2)]}, (2, "x")],
        "tuple": (torch.ones(2), 1.5),
        "empty": [],
        "none": None,
        "counter": Counter("aab"),
    }
    path = saved(tmp_path / "d", values)
    with open_source(path) as source:
        # Of what has no tensor in it, torch's distributed checkpoint flattens dicts of any kind.
        expected = {**values, "counter": {"a": 2, "b": 1}}
        assert_same(filled(source.tree["extra"], source), expected)
    numbered = {3: "a", "ordered": OrderedDict(b=torch.zeros(1))}
    path = state_in_file(tmp_path / "f", {**values, **numbered})
    with open_source(path) as source:
        extra = source.tree["extra"]
        assert type(extra["ordered"]) is OrderedDict
        assert type(extra["counter"]) is Counter
        assert_same(filled(extra, source), {**values, 3: "a", "ordered": {"b": torch.zeros(1)}})


def test_without_paths_nothing_is_nested(tmp_path):
    folder = saved(tmp_path / "d", {"model": {"w": torch.ones(2)}, "note": {"x": 1}})
    metadata = metadata_of(folder)
    metadata.planner_data = None
    rewrite(folder, metadata)
    with open_source(folder) as source:
        assert source.tree == {"extra": {"model.w": TensorKey("model.w"), "note.x": 1}}


def test_an_old_file_is_read(tmp_path):
    state = {"model": {"w": torch.arange(5.0)}}
    path = state_in_file(tmp_path / "f", state, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    with open_source(path) as source:
        assert_same(filled(source.tree, source), state)


def test_tensors_of_one_key_are_both_kept(tmp_path):
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    with open_source(state_in_file(tmp_path / "f", state)) as source:
        assert_same(filled(source.tree["extra"], source), state)


# ---- what must not run


def test_metadata_that_would_run_code_is_refused(tmp_path):
    folder = saved(tmp_path / "d", {"w": torch.ones(2)})
    metadata = metadata_of(folder)
    metadata.planner_data["w"] = Trap(tmp_path / "ran")
    rewrite(folder, metadata)
    with pytest.raises(CorruptError, match=r"\.metadata.*global posix\.mkdir.*would run code"):
        open_source(folder)
    assert not (tmp_path / "ran").exists()
    metadata_of(folder)
    assert (tmp_path / "ran").exists()  # so the trap was one


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__", "exec"])
def test_no_builtin_is_reached_through_metadata(tmp_path, name):
    (tmp_path / ".metadata").write_bytes(f"cbuiltins\n{name}\n(V1\ntR.".encode())
    with pytest.raises(CorruptError, match=rf"global builtins\.{name},"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch", "Size"),
    ],
)
def test_metadata_cannot_change_what_it_is_given(tmp_path, module, name):
    """BUILD sets attributes on whatever lies on the stack, functions and classes too."""
    folder = saved(tmp_path / "d", {"w": torch.ones(2)})
    good = (folder / ".metadata").read_bytes()
    change = f"c{module}\n{name}\n(N(dV__defaults__\n(I1\ntsV__qualname__\nVchanged\nstb0"
    (folder / ".metadata").write_bytes(change.encode() + good)
    with contextlib.suppress(CorruptError), open_source(folder) as source:
        assert_same(read_box(source, "w"), torch.ones(2))
    (folder / ".metadata").write_bytes(good)
    with open_source(folder) as source:
        assert_same(read_box(source, "w"), torch.ones(2))
    assert unpickler._the_first.__qualname__ == "_the_first"


def replaced(folder, key, data):
    """Puts other bytes in place of a value or tensor, at the end of its file."""
    metadata = metadata_of(folder)
    (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == key)
    path = folder / info.relative_path
    info.offset, info.length = path.stat().st_size, len(data)
    with path.open("ab") as file:
        file.write(data)
    rewrite(folder, metadata)


def archive_with(folder, content, changed):
    """What torch.save writes, with other records in it, by the ends of their names."""
    torch.save(content, folder / "archive")
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(folder / "archive") as old,
        zipfile.ZipFile(buffer, "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name, changed.get(name.partition("/")[2]) or old.read(name))
    return buffer.getvalue()


def test_a_value_that_would_run_code_is_refused(tmp_path):
    folder = saved(tmp_path / "d", {"w": torch.ones(2), "note": "x"})
    trap = pickle.dumps(Trap(tmp_path / "ran"), 2)
    data = archive_with(tmp_path, 5, {"data.pkl": trap})
    replaced(folder, "note", data)
    with pytest.raises(CorruptError, match=r"__0_0\.distcp: 'note'.*mkdir.*nothing was run"):
        open_source(folder)
    assert not (tmp_path / "ran").exists()
    torch.load(io.BytesIO(data), weights_only=False)
    assert (tmp_path / "ran").exists()  # so the trap was one


def test_a_tensor_that_would_run_code_is_refused(tmp_path):
    folder = saved(tmp_path / "d", {"w": torch.ones(2)})
    trap = pickle.dumps(Trap(tmp_path / "ran"), 2)
    replaced(folder, "w", archive_with(tmp_path, 5, {"data.pkl": trap}))
    with open_source(folder) as source, pytest.raises(CorruptError, match=r"'w'.*would run code"):
        read_box(source, "w")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused(tmp_path, zipped):
    path = state_in_file(
        tmp_path / "f", {"x": Trap(tmp_path / "ran")}, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CorruptError, match=r"/f: expected.*mkdir.*nothing was run"):
        open_source(path)
    assert not (tmp_path / "ran").exists()


# ---- damage


@pytest.mark.parametrize(
    "data", [b"", b"garbage", b"PK\3\4 garbage", trapped("/nowhere")[:20], pickle.dumps([1, 2])]
)
def test_what_is_no_checkpoint_is_named(tmp_path, data):
    path = tmp_path / "f"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="/f: expected"):
        open_source(path)
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(CorruptError, match=r"/\.metadata: expected"):
        open_source(tmp_path)


def test_a_file_cut_short_is_named(tmp_path):
    path = state_in_file(tmp_path / "f", {"model": {"w": torch.zeros(1000)}})
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CorruptError, match=r"/f: expected a file of torch\.save"):
        open_source(path)


def test_a_missing_file_is_named(tmp_path):
    folder = saved(tmp_path / "d", {"w": torch.ones(2)})
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(IncompleteError, match=r"__0_0\.distcp: expected a file with 'w'"):
        open_source(folder)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_cut_while_it_is_open_is_named(tmp_path, mapped):
    folder = saved(tmp_path / "d", {"w": TENSORS["transposed"]})
    with open_source(folder) as source:
        assert source.tensors["w"].chunks[0].order == (1, 0)
        if mapped:
            assert_same(read_box(source, "w"), TENSORS["transposed"])
        os.truncate(folder / "__0_0.distcp", 1)
        with pytest.raises(
            CorruptError, match=r"expected 24 bytes of tensor 'w' at byte .* the end"
        ):
            read_box(source, "w")


def test_a_short_file_is_named(tmp_path):
    folder = saved(tmp_path / "d", {"w": torch.ones(2)})
    path = folder / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptError, match=r"__0_0\.distcp: expected \d+ bytes.*'w', got \d+"):
        open_source(folder)


@pytest.mark.parametrize("part", ["directory at the end", "header", "all", "pickle"])
def test_a_damaged_archive_is_named(tmp_path, part):
    folder = saved(tmp_path / "d", {"w": torch.arange(100.0)})
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    places = {
        "directory at the end": slice(len(data) - 30, len(data)),
        "header": slice(data.index(b"archive/data/0") - 30, data.index(b"archive/data/0") - 26),
        "all": slice(0, len(data)),
        "pickle": slice(data.index(b"FloatStorage"), data.index(b"FloatStorage") + 5),
    }
    place = places[part]
    data[place] = bytes(place.stop - place.start)
    path.write_bytes(data)
    with open_source(folder) as source, pytest.raises(CorruptError, match=r"distcp: tensor 'w'"):
        read_box(source, "w")


def test_an_archive_of_another_tensor_is_refused(tmp_path):
    folder = saved(tmp_path / "d", {"w": torch.ones(2, 3), "v": torch.ones(3, 2)})
    metadata = metadata_of(folder)
    places = metadata.storage_data
    one, other = MetadataIndex("w", (0, 0)), MetadataIndex("v", (0, 0))
    places[one], places[other] = places[other], places[one]
    rewrite(folder, metadata)
    message = r"'w'.*expected float32 \(2, 3\), got float32 \(3, 2\)"
    with open_source(folder) as source, pytest.raises(CorruptError, match=message):
        read_box(source, "w")


def test_a_view_of_a_larger_storage_is_read(tmp_path):
    folder = saved(tmp_path / "d", {"w": torch.ones(2)})
    replaced(folder, "w", archive_with(tmp_path, torch.arange(5.0)[2:4], {}))
    with open_source(folder) as source:
        assert_same(read_box(source, "w"), torch.tensor([2.0, 3.0]))


def test_an_archive_with_too_few_bytes_is_refused(tmp_path):
    folder = saved(tmp_path / "d", {"w": torch.ones(2)})
    replaced(folder, "w", archive_with(tmp_path, torch.ones(2), {"data/0": b"1234"}))
    message = r"'w'.*expected a record of 8 bytes at least, got 4"
    with open_source(folder) as source, pytest.raises(CorruptError, match=message):
        read_box(source, "w")


def cut(metadata, box_of_second):
    """Makes two parts of the (4, 3) tensor: rows 0 to 2, and the box given."""
    entry = metadata.state_dict_metadata["w"]
    first = entry.chunks[0]
    second = type(first)(torch.Size(box_of_second[0]), torch.Size(box_of_second[1]))
    first.sizes = torch.Size([2, 3])
    entry.chunks.append(second)
    places = metadata.storage_data
    places[MetadataIndex("w", second.offsets)] = next(iter(places.values()))


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        (((2, 0), (1, 3)), "12 elements in all, got 9"),
        (((1, 0), (2, 3)), "share no element"),
        (((3, 0), (2, 3)), "parts of shape"),
        (((2,), (6,)), "parts of shape"),
    ],
)
def test_parts_that_are_not_the_tensor_are_refused(tmp_path, box, problem):
    folder = saved(tmp_path / "d", {"w": torch.ones(4, 3)})
    metadata = metadata_of(folder)
    cut(metadata, box)
    rewrite(folder, metadata)
    with pytest.raises(CorruptError, match=f"tensor 'w'.*{problem}"):
        open_source(folder)


def lost_place(metadata):
    metadata.storage_data.clear()


def outside(metadata):
    next(iter(metadata.storage_data.values())).relative_path = "../d/__0_0.distcp"


def no_size(metadata):
    metadata.state_dict_metadata["w"].size = "x"


def no_tensors(metadata):
    metadata.state_dict_metadata = None


def path_of_a_float(metadata):
    metadata.planner_data["w"] = (1.5,)


def two_at_one_place(metadata):
    metadata.planner_data["v"] = ("w",)


def within_a_tensor(metadata):
    metadata.planner_data["v"] = ("w", "v")


def far_position(metadata):
    metadata.planner_data["v"] = ("list", 1 << 40)


@pytest.mark.parametrize(
    "damage",
    [
        lost_place, outside, no_size, no_tensors, path_of_a_float, two_at_one_place,
        within_a_tensor, far_position,
    ],
)  # fmt: skip
def test_metadata_that_makes_no_sense_is_refused(tmp_path, damage):
    folder = saved(tmp_path / "d", {"w": torch.ones(4, 3), "v": torch.ones(2)})
    metadata = metadata_of(folder)
    damage(metadata)
    rewrite(folder, metadata)
    with pytest.raises(CorruptError, match=r"\.metadata: "):
        open_source(folder)


# ---- what is refused by name


def test_compressed_bytes_are_refused(tmp_path):
    folder = saved(tmp_path / "d", {"w": torch.ones(2)})
    metadata = metadata_of(folder)
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]
    rewrite(folder, metadata)
    with pytest.raises(UnsupportedError, match=r"'w'.*zstd"):
        open_source(folder)


def test_conjugated_tensors_are_refused_in_a_directory_and_read_from_a_file(tmp_path):
    tensor = torch.randn(3, dtype=torch.complex64).conj()
    with (
        open_source(saved(tmp_path / "d", {"w": tensor})) as source,
        pytest.raises(UnsupportedError, match=r"'w'.*conj"),
    ):
        read_box(source, "w")
    with open_source(state_in_file(tmp_path / "f", {"w": tensor})) as source:
        assert_same(read_box(source, "w"), tensor.resolve_conj())


def test_sparse_tensors_are_refused_by_name(tmp_path):
    state = {"model": {"w": torch.eye(3).to_sparse()}}
    with pytest.raises(UnsupportedError, match=r"'model\.w'.*sparse"):
        open_source(state_in_file(tmp_path / "f", state))


def test_bytes_in_another_order_are_refused(tmp_path):
    folder = saved(tmp_path / "d", {"w": torch.ones(2)})
    replaced(folder, "w", archive_with(tmp_path, torch.ones(2), {"byteorder": b"big"}))
    with (
        open_source(folder) as source,
        pytest.raises(UnsupportedError, match=r"'w'.*little-endian"),
    ):
        read_box(source, "w")
