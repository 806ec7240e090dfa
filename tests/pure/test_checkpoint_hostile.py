"""Manifests edited under a right checksum, and pickles that would run code: refused, never run."""

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from shardopt.checkpoint import latest, load
from shardopt.checkpoint.manifest import NAME
from shardopt.checkpoint.verify import verify
from shardopt.errors import CheckpointError
from tests.checkpoint_damage import METADATA, VALUES, begin, everything, write
from tests.twins import assert_same


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with two steps, and what each holds."""
    directory = tmp_path_factory.mktemp("written")
    return directory, write(directory)


@pytest.fixture
def run(written, tmp_path):
    return Path(shutil.copytree(written[0], tmp_path / "run"))


def edited(step, change):
    """The manifest changed, under a right checksum."""
    path = step / NAME
    body = json.loads(path.read_bytes())["manifest"]
    change(body)
    text = json.dumps(body, separators=(",", ":")).encode()
    path.write_bytes(b'{"crc32":"%08x","manifest":%s}\n' % (zlib.crc32(text), text))


WEIGHT = "model.0.weight"


def changed_weight(*words):
    def change(body):
        assert words[0] in body["tensors"][WEIGHT]
        body["tensors"][WEIGHT] = body["tensors"][WEIGHT].replace(*words)

    return change


def without_a_chunk(body):
    body["tensors"][WEIGHT] = body["tensors"][WEIGHT].rpartition("|")[0]


def swapped_tensors(body):
    tensors = body["tensors"]
    one, other = "optimizer.state.0.weight.exp_avg", WEIGHT
    tensors[one], tensors[other] = tensors[other], tensors[one]


EDITS = {
    "another world size": (lambda body: body.update(world_size=3), "ranks"),
    "another step": (lambda body: body.update(step=7), "step"),
    "another run": (lambda body: body.update(run="0" * 32), "run"),
    "a tensor less": (lambda body: body["tensors"].pop(WEIGHT), WEIGHT),
    "a chunk less": (without_a_chunk, WEIGHT),
    "another shape": (changed_weight(" 200,150", " 150,200"), WEIGHT),
    "another dtype": (changed_weight("float32", "float64"), WEIGHT),
    "a file elsewhere": (
        lambda body: body["files"].update({"../step-1/x": [1, 1, None]}),
        "../step-1/x",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest(edit, run, written):
    change, word = EDITS[edit]
    edited(run / "step-2", change)
    model, optimizer = begin(seed=5)
    before = everything(model, optimizer)
    with pytest.raises(CheckpointError, match=word):
        verify(run / "step-2")
        load(run, step=2, model=model, optimizer=optimizer)
    assert_same(everything(model, optimizer), before)


def test_an_edit_that_breaks_no_checksum_is_an_edit_of_the_manifest_alone(run, written):
    """Two tensors that change places, each under its own checksums: the manifest is the truth."""
    edited(run / "step-2", swapped_tensors)
    verify(run / "step-2")


class Malice:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", [METADATA, VALUES])
@pytest.mark.parametrize("covered", ["as it is", "under a right checksum", "without a manifest"])
def test_nothing_is_run(name, covered, run, written, tmp_path):
    proof, step = tmp_path / "proof", run / "step-2"
    if name == METADATA:
        data = pickle.dumps(Malice(proof))
        (step / METADATA).write_bytes(data)
    else:
        torch.save(Malice(proof), step / VALUES)
        data = (step / VALUES).read_bytes()
    if covered == "under a right checksum":
        edited(step, lambda body: body["files"].update({name: [len(data), zlib.crc32(data), None]}))
    if covered == "without a manifest":
        (step / NAME).unlink()
    for look in (lambda: verify(step), lambda: latest(run), lambda: load(run)):
        try:
            look()
        except CheckpointError as problem:
            assert covered != "under a right checksum"
            assert (name if covered == "as it is" else NAME) in str(problem)
    model, optimizer = begin(seed=5)
    try:
        load(step, model=model, optimizer=optimizer)
    except CheckpointError as problem:
        assert covered == "without a manifest" and NAME in str(problem)
    else:
        assert_same(everything(model, optimizer), written[1][2])
    assert not proof.exists()
    if name == METADATA:  # it is no dud
        pickle.loads(data)
    else:
        torch.load(step / VALUES, weights_only=False)
    assert proof.exists()
