import math

import numpy as np
import pytest

from opt_deus_jax.reporting import comparison_plots as plots

TOKENS = np.array([0.0, 1e5, 2e5])


def curve(last: float, seeds=(0, 1, 2)):
    return TOKENS, {seed: np.array([3.2, 2.9, last + seed / 100]) for seed in seeds}


def lines(axis):
    return [line for line in axis.lines if np.size(line.get_xdata()) == len(TOKENS)]


def test_curves_are_drawn_beside_their_distance_from_the_reference():
    curves = {"best": curve(2.6), "copy_next": curve(2.7), "other_seed": curve(2.8, (7,))}
    figure = plots.loss_curves(curves, "copy_next", ["copy_next", "best"])
    left, right = figure.axes
    np.testing.assert_allclose(np.asarray(lines(left)[1].get_ydata()), [3.2, 2.9, 2.71])
    assert len(lines(left)) == 3
    # Bands of those highlighted, and no band over a single seed.
    assert len(left.collections) == 2
    assert {text.get_text() for text in left.texts} == {"best", "copy_next"}
    (difference,) = lines(right)
    np.testing.assert_allclose(np.asarray(difference.get_ydata()), [0, 0, -0.1], atol=1e-12)
    np.testing.assert_allclose(np.asarray(difference.get_xdata()), TOKENS / 1e3)
    assert right.get_xlabel() == "training tokens, thousands"
    # Where the others start, and what they are held against, stays in sight.
    assert right.get_ylim()[0] < 0 < right.get_ylim()[1]
    title = figure.get_suptitle()
    assert "After 200,000 tokens best has the lowest" in title
    assert "2.610" in title
    assert "copy_next 2.710" in title


def test_a_highlighted_curve_that_ends_far_below_is_in_sight_and_others_are_not():
    ends = {"best": 2.0, "copy_next": 2.7, "worst": 3.1} | {str(i): 2.7 + i / 1e3 for i in range(9)}
    curves = {name: curve(end) for name, end in ends.items()}
    for coloured, is_seen in ((["best", "copy_next", "worst"], True), (["copy_next"], False)):
        left, right = plots.loss_curves(curves, "copy_next", coloured).axes
        for axis in (left, right):
            end = np.asarray(lines(axis)[0].get_ydata())[-1]
            assert (axis.get_ylim()[0] < end) == is_seen
        assert right.get_ylim()[1] < 0.4


def test_without_the_reference_there_is_one_panel_and_all_have_names():
    figure = plots.loss_curves({"a": curve(2.6), "b": curve(2.7)}, "copy_next", ["a"])
    (axis,) = figure.axes
    assert {text.get_text() for text in axis.texts} == {"a", "b"}
    assert "bands: standard error" in figure.get_suptitle()


def test_a_single_seed_is_called_one_and_long_trainings_are_in_millions():
    curves = {name: (TOKENS * 100, {0: np.array([3.2, 2.9, 2.6])}) for name in ("a", "copy_next")}
    left, _ = (figure := plots.loss_curves(curves, "copy_next", ["a", "copy_next"])).axes
    assert "(one seed)" in figure.get_suptitle()
    assert left.get_xlabel() == "training tokens, millions"
    np.testing.assert_allclose(np.asarray(lines(left)[0].get_xdata()), TOKENS / 1e4)


def test_final_losses_show_seeds_means_and_the_reference():
    # By its own seed `single` lies below, by the seed that both have above.
    losses = {"best": [2.5, 2.6], "copy_next": [2.6, 2.7], "single": [2.64]}
    paired = [difference("best", -0.1, 0.0, 0.01), difference("single", 0.04, None, None, pairs=1)]
    rows = [
        {"contender": name, "loss_100": np.mean(of), "loss_stderr": error}
        for (name, of), error in zip(losses.items(), (0.05, 0.05, None), strict=True)
    ]
    figure = plots.final_losses(rows, losses, paired, "copy_next", ["copy_next"])
    (axis,) = figure.axes
    assert len(axis.containers) == 3
    (dashed,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert np.asarray(dashed.get_xdata())[0] == pytest.approx(2.65)
    assert "best ends lowest: 2.550" in figure.get_suptitle()
    assert "both have 1 of 2 others end below copy_next" in figure.get_suptitle()


def test_all_seeds_of_a_mean_that_is_shown_are_shown():
    losses = {str(i): [2.7 + i / 1000] * 2 for i in range(9)} | {"wide": [2.664, 2.736]}
    rows = [
        {"contender": name, "loss_100": np.mean(of), "loss_stderr": 0.0}
        for name, of in losses.items()
    ]
    (axis,) = plots.final_losses(rows, losses, [], "0", ["0"]).axes
    low, high = axis.get_xlim()
    assert low < 2.664
    assert high > 2.736


def difference(name, value, error, p, pairs=3):
    row = {"contender": name, "loss_difference": value, "loss_stderr": error}
    return row | {"loss_p": p, "loss_pairs": pairs}


def test_paired_differences_have_intervals_and_are_counted():
    rows = [
        difference("worse", 0.05, 0.004, 0.006),
        difference("better", -0.05, 0.004, 0.006),
        difference("unclear", 0.01, 0.01, 0.42),
        difference("one_pair", 0.02, None, None, 1),
        difference("lost", math.nan, math.nan, math.nan),
    ]
    figure = plots.paired_differences(rows, "copy_next", [])
    (axis,) = figure.axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["better", "unclear", "one_pair", "worse", "lost"]
    assert "Of 5 others 1 ends below copy_next and 1 above" in " ".join(
        figure.get_suptitle().split()
    )
    widths = [
        np.ptp(np.asarray(line.get_xdata()))
        for line in axis.lines
        if np.size(line.get_xdata()) == 2
    ]
    # Student's t at two degrees of freedom and 95 %: 4.3027.
    assert any(width == pytest.approx(2 * 4.30265 * 0.004, rel=1e-5) for width in widths)


def test_accuracies_have_a_panel_a_task_and_one_of_means():
    by_task = {
        "a": {"piqa": (0.6, 0.03), "boolq": (0.5, 0.04)},
        "b": {"piqa": (0.7, 0.03), "boolq": (0.6, 0.04)},
    }
    figure = plots.accuracies(by_task, ["a"])
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        "mean of tasks",
        "piqa",
        "boolq",
    ]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["b", "a"]
    assert all(len(axis.containers) == 2 for axis in figure.axes)
    title = " ".join(figure.get_suptitle().split())
    assert "b 65.0 %, all within 10.0 points; one standard error of a mean is 2.5" in title
