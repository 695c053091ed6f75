import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from opt_deus_jax.reporting.drawing import (
    OTHERS,
    Dot,
    draw_dots,
    label_ends,
    robust_limits,
    styles,
    write_title,
)


def test_a_highlighted_contender_looks_the_same_wherever_it_appears():
    everywhere = styles(["a", "b", "c"], ["a", "c"])
    assert styles(["c"], ["a", "c"])["c"] == everywhere["c"]
    assert everywhere["b"] == (OTHERS, "o", False)
    fronts = [look for look in everywhere.values() if look.front]
    assert len({look.colour for look in fronts}) == len({look.marker for look in fronts}) == 2
    many = [str(i) for i in range(9)]
    assert sum(look.front for look in styles(many, many).values()) == 7


def test_limits_leave_out_what_is_far():
    assert robust_limits([1.0, 2.0]) == pytest.approx((0.94, 2.06))
    values = [*np.linspace(2.6, 2.8, 9), 11.0, math.nan, math.inf]
    low, high = robust_limits(values)
    assert 2.5 < low < 2.6
    assert 2.8 < high < 2.9
    assert robust_limits([2.0, 2.0])[0] < 2 < robust_limits([2.0, 2.0])[1]
    assert robust_limits([math.nan]) == (0, 1)


def places(ends, inches=2.0):
    axis = Figure().subplots()
    axis.set_ylim(0, 1)
    label_ends(axis, {k: (1.0, y) for k, y in ends.items()}, styles(list(ends), []), inches=inches)
    return {text.get_text(): text.get_position()[1] for text in axis.texts}


def test_labels_that_have_room_stay_and_others_move_apart_in_order():
    assert places({"a": 0.2, "b": 0.8}) == pytest.approx({"a": 0.2, "b": 0.8})
    crowded = places({"c": 0.501, "a": 0.499, "b": 0.5, "far": 0.9, "gone": math.nan})
    assert list(crowded) == ["a", "b", "c", "far"]
    assert crowded["far"] == pytest.approx(0.9)
    assert np.diff([crowded[k] for k in "abc"]) == pytest.approx([0.155 / 2] * 2)
    assert crowded["b"] == pytest.approx(0.5)
    assert places({"a": math.nan}) == {}


def test_a_label_of_what_ends_out_of_view_has_its_value():
    assert list(places({"a": 0.5, "low": -0.25, "high": 3.02691})) == [
        "low: -0.25",
        "a",
        "high: 3.027",
    ]


def test_dots_far_out_are_arrows_with_their_value():
    dots = [Dot(str(i), 2.6 + i / 100, 0.01, 0.03, (2.6, 2.61)) for i in range(8)]
    axis = Figure().subplots()
    draw_dots(axis, [*dots, Dot("far", 11.0), Dot("lost", math.nan)], styles(["far"], []) | looks())
    assert [text.get_text() for text in axis.texts] == ["11", "diverged"]
    assert len(axis.containers) == len(dots)
    assert len(axis.collections) - len(axis.containers) == len(dots)
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == [*map(str, range(8)), "far", "lost"]
    top, bottom = axis.transData.transform([(2.6, 0), (2.6, 9)])[:, 1]
    assert top > bottom


def looks():
    return styles([*map(str, range(8)), "lost"], ["3"])


def test_a_long_title_takes_more_lines():
    figure = Figure(figsize=(4, 3))
    write_title(figure, "word " * 30)
    assert max(map(len, figure.get_suptitle().splitlines())) < 4 * 14
