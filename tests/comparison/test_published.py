import json

import pytest

from opt_deus_jax.comparison.published import published_curves, published_name, read_published
from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling.methods import METHODS
from tests.comparison.made_up_runs import method, transport


def an_evaluation(name: str, step: int, perplexity: float = 12.0, **changed):
    tasks = {"piqa": {"acc": 0.75, "acc_norm": 0.1}, "boolq": {"acc": 0.25}}
    results = tasks | {"wikitext": {"word_perplexity": perplexity}}
    entry = {"regime": "CPT", "size": "1.72B", "method": name, "step": step, "results": results}
    return entry | changed


def written(folder, content):
    path = folder / "official.json"
    path.write_text(json.dumps(content))
    return path


def test_curves_are_of_one_regime_and_size_the_best_first(tmp_path):
    entries = [
        an_evaluation("worse", 20, 13.0),
        an_evaluation("better", 20, 12.0),
        an_evaluation("better", 10, 14.0),
        an_evaluation("better", 30, 1.0, regime="SFT"),
        an_evaluation("better", 30, 1.0, size="11.5B"),
    ]
    results = read_published(written(tmp_path, entries))
    assert len(results) == 5
    assert results[0].mean_accuracy == 0.5
    curves = published_curves(results)
    found = {name: [(x.step, x.word_perplexity) for x in of] for name, of in curves.items()}
    assert found == {"better": [(10, 14.0), (20, 12.0)], "worse": [(20, 13.0)]}
    assert list(found) == ["better", "worse"]
    with pytest.raises(UserError, match="regime CPT and size 7B"):
        published_curves(results, size="7B")


def test_what_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json: cannot read"):
        read_published(tmp_path / "missing.json")
    with pytest.raises(UserError, match="must be a list"):
        read_published(written(tmp_path, {}))
    broken = an_evaluation("a", 1)
    del broken["results"]["wikitext"]
    with pytest.raises(UserError, match=r"official\.json: evaluation 1 .* lacks 'wikitext'"):
        read_published(written(tmp_path, [an_evaluation("a", 1), broken]))
    broken = an_evaluation("a", 1, results={"wikitext": {"word_perplexity": 1.0}})
    with pytest.raises(UserError, match="evaluation 0 has no accuracy"):
        read_published(written(tmp_path, [broken]))


def test_presets_have_their_published_names():
    names = {
        preset: published_name(
            method(m.layout, m.weights, zero_init=m.zero_init, transport="reference")
        )
        for preset, m in METHODS.items()
    }
    assert {preset: name for preset, name in names.items() if name} == {
        "opt_deus": "OpT-DeUS",
        "average": "Avg-DeUS",
        "llama_pro": "Llama-Pro",
        "solar": "SOLAR",
        "base": "Base",
        "lesa": "LESA",
    }
    assert published_name(transport("barycentric")) is None
    assert published_name(transport("assignment")) is None
    assert published_name(method(weights="average")) is None
