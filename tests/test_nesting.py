"""Nested dicts as flat ones and back."""

from hypothesis import given
from hypothesis import strategies as st

from flow_policy_rl.nesting import flat, nested

NAMES = st.text("abc1", min_size=1, max_size=3)
TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(NAMES, inner, max_size=3))


@given(st.dictionaries(NAMES, TREES, max_size=3), st.sampled_from(["/", "|", "."]))
def test_a_round_trip_changes_nothing(tree, separator):
    entries = flat(tree, separator)
    assert nested(entries, separator) == tree
    assert not any(isinstance(value, dict) and value for value in entries.values())


def test_numbers_come_back_as_numbers():
    tree = {"state": {0: {"step": 1}, 1: {"step": 2}}}
    assert nested(flat(tree), key=lambda n: int(n) if n.isdigit() else n) == tree
