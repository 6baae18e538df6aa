"""The NamedTuple that starts without the typing module is what typing's would be."""

from __future__ import annotations

import pickle
import typing

import pytest

from bnport._lazy import NamedTuple

pytestmark = pytest.mark.core


class Ours(NamedTuple):
    """Two fields."""

    name: str
    count: int = 3

    @property
    def double(self) -> int:
        return 2 * self.count


class Theirs(typing.NamedTuple):
    """Two fields."""

    name: str
    count: int = 3

    @property
    def double(self) -> int:
        return 2 * self.count


def test_it_is_made_printed_unpacked_replaced_and_pickled_as_typings_is():
    one, other = Ours("a"), Theirs("a")
    assert one == other == ("a", 3)
    assert repr(one) == repr(other).replace("Theirs", "Ours")
    assert one._replace(count=4).double == other._replace(count=4).double == 8
    assert pickle.loads(pickle.dumps(one)) == one
    assert type(pickle.loads(pickle.dumps(one))) is Ours
    with pytest.raises(AttributeError):
        one.name = "b"
    with pytest.raises(TypeError, match="name"):
        Ours()


def test_its_class_says_of_itself_what_typings_does():
    for name in ("__doc__", "__module__", "_fields", "_field_defaults"):
        assert getattr(Ours, name) == getattr(Theirs, name)
    assert Ours.__annotations__.keys() == Theirs.__annotations__.keys()
    assert Ours.__qualname__ == Ours.__name__ == "Ours"
