"""Nested dicts by path."""

from itjax.base import tree

NESTED = {"embed": {"kernel": 1}, "layers": {"norm": {"scale": 2}, "q": {"kernel": 3}}}


def test_flatten_and_unflatten_are_inverse():
    flat = {"embed/kernel": 1, "layers/norm/scale": 2, "layers/q/kernel": 3}
    assert tree.flatten(NESTED) == flat
    assert tree.unflatten(flat) == NESTED


def test_select_marks_every_leaf_once():
    assert tree.flatten(tree.select(NESTED, ["*norm*", "embed*"])) == {
        "embed/kernel": True,
        "layers/norm/scale": True,
        "layers/q/kernel": False,
    }
