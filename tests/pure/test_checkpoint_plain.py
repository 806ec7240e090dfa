"""Plain values keep their types in JSON, and what cannot be kept is named by its place."""

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import pytest
import torch

from shardopt.checkpoint.plain import MARK, TensorKey, decode, encode, map_tensors
from shardopt.errors import UnsupportedError

VALUES = [
    None, True, False, 0, -7, 1 << 200, 1.5, 1e-320, float("inf"), -float("inf"), "", "ü\n\ud800",
    b"", b"\x00\xff", 1 - 2j, complex(float("inf"), -0.0),
    [], [1, [2, []]], (), (1,), (1, (2, 3)), set(), {1, "a", (2, 3)}, frozenset({4}), deque([1, 2]),
    deque([1, 2], maxlen=2), {}, {"a": 1}, {3: "three", "3": 3, None: 0, (1, 2): [], True: 1.0},
    {MARK: "tuple", "of": [1]}, {"b": {MARK: 1}}, Counter("aab"), Counter({2: -1}),
    OrderedDict([("z", 1), ("a", (2,))]), {1.5: {2: {"x": (1, [2, {3}])}}},
]  # fmt: skip


def no_tensor(value, name):
    return None


def through_json(value, refer=no_tensor):
    text = json.dumps(encode(value, ("extra",), refer), allow_nan=False)
    return json.loads(text, object_hook=decode)


def assert_same(one, other):
    """Equal, and of the same types all through."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for mine, theirs in zip(one.items(), other.items(), strict=True):
            assert_same(mine, theirs)
    elif isinstance(one, list | tuple | deque):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
        assert getattr(one, "maxlen", None) == getattr(other, "maxlen", None)
    else:
        assert one == other
        assert repr(one) == repr(other) or isinstance(one, set | frozenset)


@pytest.mark.parametrize("value", VALUES)
def test_a_value_comes_back_with_its_types(value):
    assert_same(through_json(value), value)
    assert_same(through_json({"in": [(value,)]}), {"in": [(value,)]})


def test_nan_and_minus_zero_come_back():
    nan, zero = through_json([float("nan"), -0.0])
    assert math.isnan(nan)
    assert math.copysign(1, zero) == -1


Point = namedtuple("Point", "x y")


class Number(int):
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "builtins.object"),
        (lambda: 0, "builtins.function"),
        (Point(1, 2), "Point"),
        (Number(3), "Number"),
        (defaultdict(list), "collections.defaultdict"),
        (bytearray(b"x"), "bytearray"),
        (range(3), "range"),
    ],
    ids=["object", "function", "namedtuple", "int", "defaultdict", "bytearray", "range"],
)
def test_what_cannot_be_kept_is_refused_by_its_place(value, kind):
    with pytest.raises(UnsupportedError, match=kind) as refused:
        encode({"seeds": [0, {7: value}]}, ("extra",), no_tensor)
    assert str(refused.value).startswith("extra['seeds'][1][7]: expected plain Python values")


def test_a_key_that_cannot_be_kept_is_refused_too():
    with pytest.raises(UnsupportedError, match=r"extra\['a key'\]: .*builtins.object"):
        encode({object(): 1}, ("extra",), no_tensor)


def test_tensors_are_kept_under_a_key_and_given_back_in_their_place():
    kept = {}

    def refer(value, name):
        if isinstance(value, torch.Tensor):
            kept[name] = value
            return TensorKey(name)
        return None

    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    value = {"a": a, "list": [(b,)], "window": deque([c], maxlen=3), 5: Counter({"n": c})}
    decoded = through_json(value, refer)
    assert set(kept) == {"extra.a", "extra.list.0.0", "extra.window.0", "extra.5.n"}
    assert decoded["list"] == [(TensorKey("extra.list.0.0"),)]
    back = map_tensors(decoded, lambda key: kept[key.key])
    assert back["a"] is a
    assert back["list"][0][0] is b
    assert back["window"][0] is c and back["window"].maxlen == 3
    assert back[5]["n"] is c and type(back[5]) is Counter
    assert map_tensors({TensorKey("x")}, lambda key: key.key) == {"x"}
    assert_same(through_json(decoded), decoded)


@pytest.mark.parametrize(
    "text",
    [{MARK: "os.system", "of": ["ls"]}, {MARK: "tuple"}, {MARK: "dict", "of": [1]}, {MARK: None},
     {MARK: "deque", "of": []}, {MARK: "float", "of": "x"}],
)  # fmt: skip
def test_an_unknown_kind_is_refused(text):
    with pytest.raises((ValueError, TypeError, KeyError)):
        decode(text)
