import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from opt_deus_jax.comparison.finished import read_runs
from opt_deus_jax.comparison.report import (
    draw_figures,
    highlighted,
    summarize,
    summary_tables,
    write_report,
)
from opt_deus_jax.comparison.summary import finals_by_contender
from opt_deus_jax.errors import UserError
from tests.comparison.made_up_runs import a_comparison, a_run, contenders, write
from tests.comparison.test_published import an_evaluation, written

REFERENCES = ("copy_next", "llama_pro")
PICTURES = {
    "loss_curves",
    "final_losses",
    "paired_differences",
    "accuracies",
    "step_times",
    "learning_rates",
    "diagnostics",
    "published",
}


def test_a_comparison_becomes_tables_and_pictures(tmp_path):
    names = [*list(contenders())[:4], "llama_pro", "copy_next_middle"]
    runs = write(tmp_path / "runs", *a_comparison(names, seeds=2))
    output = tmp_path / "report"
    published = written(tmp_path, [an_evaluation("OpT-DeUS", step) for step in (10, 20)])
    paths = write_report(runs, output, REFERENCES, published)
    pictures = {path.stem for path in paths if path.suffix == ".png"}
    assert pictures == PICTURES
    assert {path.name for path in paths} == {path.name for path in output.iterdir()}
    for path in paths[2:]:
        with Image.open(path) as image:
            assert min(image.size) >= 240
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    summary = json.loads((output / "summary.json").read_text())
    assert {row["contender"] for row in summary["contenders"]} == set(names)
    assert len(summary["paired"]) == 2 * (len(names) - 1)
    best = min(summary["contenders"], key=lambda row: row["loss_100"])
    lines = (output / "summary.md").read_text().splitlines()
    assert lines[0].startswith("## Held-out loss")
    assert lines[4].startswith(f"| {best['contender']} |")
    assert f"| {best['loss_100']:.4f} |" in lines[4]
    assert "## Differences to llama_pro, over seeds that both have" in lines


def test_a_report_in_the_folder_of_the_runs_can_be_made_again(tmp_path):
    write(tmp_path, a_run(), a_run("other", seed=1))
    first = {p: p.read_bytes() for p in write_report(tmp_path, tmp_path, REFERENCES, None)}
    assert {p: p.read_bytes() for p in write_report(tmp_path, tmp_path, REFERENCES, None)} == first


def test_only_what_has_data_is_drawn_and_old_pictures_go(tmp_path):
    runs, old = write(tmp_path / "runs", a_run()), tmp_path / "accuracies.png"
    old.write_text("of a run that is gone")
    paths = write_report(runs, tmp_path, REFERENCES, None)
    assert {path.stem for path in paths if path.suffix == ".png"} == {"loss_curves", "final_losses"}
    assert not old.exists()
    text = (tmp_path / "summary.md").read_text()
    assert "| copy_next | top | 0.001 | 1 |" in text
    assert text.splitlines()[4].endswith("| - |")


@pytest.mark.parametrize(("rates", "drawn"), [((1e-3, 2e-3), {"learning_rates"}), ((1e-3,), set())])
def test_sweeps_alone_make_their_picture_if_there_was_a_choice(tmp_path, rates, drawn):
    tried = [a_run(kind="sweep", learning_rate=rate) for rate in rates]
    runs = read_runs(write(tmp_path, *tried))
    figures = draw_figures(runs, summarize(runs, REFERENCES), REFERENCES, None)
    assert {name for name, figure in figures.items() if figure} == drawn


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_run_that_diverged_is_reported(tmp_path, lost):
    sick = a_run("lost", final=2.0, word_perplexity=lost)
    sick["held_out"][-1]["loss"] = lost
    runs = [a_run(seed=1), a_run(), sick, a_run("lost", seed=1)]
    paths = write_report(write(tmp_path / "runs", *runs), tmp_path, ["copy_next"], None)
    assert {"final_losses", "paired_differences"} <= {path.stem for path in paths}
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["contenders"][-1]["loss_100"] == "nan"


def test_tables_fold_in_a_narrow_window_and_lose_nothing(tmp_path):
    runs = read_runs(write(tmp_path, *a_comparison(contenders(), seeds=2)))
    file = io.StringIO()
    console = Console(file=file, width=60)
    for table in summary_tables(summarize(runs, REFERENCES)):
        console.print(table)
    assert "…" not in file.getvalue()


def test_a_comparison_needs_a_reference(tmp_path):
    with pytest.raises(UserError, match="references"):
        write_report(write(tmp_path, a_run()), tmp_path, (), None)


def test_the_references_the_best_and_the_best_transport_get_colours(tmp_path):
    names = ["average", "half_next", "random", "opt_deus_reference", "opt_deus_assignment"]
    names += ["copy_next_middle", "copy_next", "llama_pro", "base"]
    methods = contenders()
    runs = [a_run(n, method=methods[n], final=2.5 + i / 10) for i, n in enumerate(names)]
    finals = finals_by_contender(read_runs(write(tmp_path, *runs)))
    assert highlighted(finals, REFERENCES) == [
        "copy_next",
        "llama_pro",
        "average",
        "opt_deus_reference",
        "half_next",
        "random",
    ]
