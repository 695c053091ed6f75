import numpy as np
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from opt_deus_jax.reporting import tuning_plots as plots
from opt_deus_jax.reporting.plots import COLOURS


def test_learning_rates_are_lines_with_the_chosen_filled():
    rows = [
        {"contender": "a", "losses": {1e-3: 2.9, 2e-3: 2.8, 4e-3: 2.9}, "chosen": 2e-3},
        {"contender": "b", "losses": {1e-3: 2.7, 2e-3: 2.8}, "chosen": 1e-3},
    ]
    rows[0]["at_edge"], rows[1]["at_edge"] = False, True
    figure = plots.learning_rates(rows, ["a"])
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.001", "0.002", "0.004"]
    tried, chosen, *others = axis.lines
    assert np.asarray(tried.get_xdata()).tolist() == [1e-3, 2e-3, 4e-3]
    assert np.asarray(chosen.get_xdata()).tolist() == [2e-3]
    assert to_hex(chosen.get_markerfacecolor()) == COLOURS[0].lower()
    assert len(others) == 2
    assert "edge of what was tried for 1 of 2" in figure.get_suptitle()
    figure = plots.learning_rates(rows[:1], [])
    assert "inside of what was tried for all 1 contenders" in figure.get_suptitle()


def a_step(name, layout, times, flops):
    row = {"contender": name, "layout": layout, "held_against": "copy_next"}
    return row | {"times": times, "times_by_flops": flops}


def test_step_times_stand_beside_flops():
    rows = [
        a_step("base", "none", 1.7, 1.5),
        a_step("low", "bottom", 1.2, 1.15),
        a_step("mid", "middle", 1.1, 1.07),
    ]
    figure = plots.step_times(rows)
    (axis,) = figure.axes
    widths = [bar.get_width() for bar in axis.patches if isinstance(bar, Rectangle)]
    assert widths == [
        1.1,
        1.2,
        1.7,
        1.07,
        1.15,
        1.5,
    ]
    title = " ".join(figure.get_suptitle().split())
    assert "1.10 to 1.20 with new layers elsewhere, 1.70 to 1.70 with everything trained" in title


def test_diagnostics_are_ranked_against_the_loss():
    rows = [
        {
            "contender": str(i),
            "match_gain": 0.8 + i / 100,
            "effective_sources": -i,
            "norm_ratio_next": 0.5,
            "loss": 2.7 + i / 10,
            "loss_stderr": 0.01,
        }
        for i in range(3)
    ]
    figure = plots.diagnostics_against_outcome(rows)
    assert [len(axis.containers) for axis in figure.axes] == [3, 3, 3]
    title = " ".join(figure.get_suptitle().split())
    assert "+1.00 with matched cost / mean cost, -1.00 with sources a neuron (3 cont" in title
    assert len(figure.legends[0].get_texts()) == 3
    assert "Final loss by diagnostic" in plots.diagnostics_against_outcome(rows[:2]).get_suptitle()
