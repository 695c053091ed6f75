import numpy as np

from opt_deus_jax.reporting.plots import png, save, sorting_figure
from opt_deus_jax.transport.diagnostics import MatrixReport


def _report(name: str, order: tuple[int, ...]) -> MatrixReport:
    return MatrixReport(name, True, 0, 0.0, 1.0, 1.0, 1.0, 0.25, order)


def test_sorting_a_permutation_by_match_draws_its_diagonal() -> None:
    order = (2, 0, 3, 1)
    map_MN = np.zeros((4, 4), np.float32)
    map_MN[order, range(4)] = 1
    reports = {5: [_report("query", order), _report("key", order), _report("up", order)]}
    figure = sorting_figure({"query": map_MN, "key": map_MN, "up": map_MN}, reports)
    # Of the three the pictures leave out the keys; each has a colour bar.
    before, after = figure.axes[0], figure.axes[2]
    assert "query, layer 5" in before.get_title(loc="left")
    (unsorted,), (sorted_,) = before.images, after.images
    np.testing.assert_array_equal(np.asarray(unsorted.get_array()) == 1, map_MN == 1)
    np.testing.assert_array_equal(np.asarray(sorted_.get_array()) == 1, np.eye(4) == 1)
    assert "0.25 to 0.25 of the mean distance" in figure.get_suptitle()


def test_equal_figures_give_the_same_bytes_to_notebooks_and_files(tmp_path) -> None:
    map_MN, reports = np.eye(3, dtype=np.float32), {1: [_report("up", (0, 1, 2))]}
    # Each is drawn once: drawing moves what constrained layout has placed before.
    in_file, shown = (sorting_figure({"up": map_MN}, reports) for _ in range(2))
    save(in_file, tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes() == png(shown)
