"""Which tests a run draws."""

import pytest
from drawing import draw_names, left_out

NAMES = [f"test[{i}]" for i in range(41)]


@pytest.mark.parametrize(("share", "count"), [(0.5, 21), (0.01, 1), (1.0, 41)])
def test_a_share_is_drawn_and_again_by_its_seed(share, count):
    drawn = draw_names(NAMES, share, 3)
    assert len(drawn) == count
    assert drawn == draw_names(NAMES[::-1], share, 3) <= {*NAMES}


def test_over_some_seeds_everything_is_drawn():
    assert set().union(*(draw_names(NAMES, 0.5, seed) for seed in range(40))) == {*NAMES}


def test_each_family_keeps_its_share_and_what_is_no_family_all():
    tests = [(f"{family} {i}", family, 0.25) for family in "ab" for i in range(8)] + [("c", None, None)]
    left = left_out(tests, 7)
    assert {family: sum(name.startswith(family) for name in left) for family in "abc"} == {"a": 6, "b": 6, "c": 0}
