import numpy as np

from opt_deus_jax.reporting.published_plots import published_beside_ours

THEIRS = {
    "OpT-DeUS": [(10, 12.5, 0.5), (20, 12.2, 0.52)],
    "LESA": [(10, 12.6, 0.5), (20, 12.3, 0.515)],
    "Base": [(10, 15.0, 0.48), (20, 13.7, 0.485)],
}
COUNTERPARTS = {"base": "Base", "transported": "OpT-DeUS"}
LABELS = ("published: a large model", "ours: a small one")


def ours(name, perplexity, accuracy):
    row = {"contender": name, "word_perplexity": perplexity, "word_perplexity_stderr": 0.1}
    return row | {"accuracy": accuracy, "accuracy_binomial": None}


def test_theirs_and_ours_have_panels_of_their_own():
    rows = [ours("copy", 21.0, 0.4), ours("transported", 22.0, 0.41), ours("base", 21.5, 0.39)]
    figure = published_beside_ours(THEIRS, rows, COUNTERPARTS, LABELS)
    left, right = figure.subfigs
    assert (left.get_suptitle(), right.get_suptitle()) == LABELS
    assert [len(axis.lines) for axis in left.axes] == [3, 3]
    assert np.asarray(left.axes[1].lines[0].get_ydata()).tolist() == [50, 52]
    names = [[t.get_text() for t in axis.get_yticklabels()] for axis in right.axes]
    assert names == [["copy", "base", "transported"], ["transported", "copy", "base"]]
    title = " ".join(figure.get_suptitle().split())
    assert "published: OpT-DeUS < Base; ours, the same methods: base < transported" in title


def test_what_was_not_taken_is_said():
    figure = published_beside_ours(THEIRS, [ours("base", None, None)], COUNTERPARTS, LABELS)
    texts = [[text.get_text() for text in axis.texts] for axis in figure.subfigs[1].axes]
    assert texts == [["not taken"], ["not taken"]]
