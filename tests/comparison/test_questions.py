import sys
from typing import Any, cast

import pytest

from opt_deus_jax.comparison.questions import ask, load_questions
from opt_deus_jax.config import Comparison, Experiment


def test_where_nothing_is_asked_lm_eval_is_not_needed(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("opt_deus_jax.evaluation.lm_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    comparison = Comparison(Experiment(base="none"), (), questions=0, perplexity_pages=0)
    questions = load_questions(comparison)
    trained = cast(Any, object())
    assert ask(trained, questions) == {"accuracies": {}, "word_perplexity": None}
