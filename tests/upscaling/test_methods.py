import pytest

from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling.methods import METHODS, Method, resolve_method


@pytest.mark.parametrize(
    ("name", "layout", "weights", "zero_init", "trained"),
    [
        ("opt_deus", "top", "transport", True, "new"),
        ("average", "top", "average", False, "new"),
        ("llama_pro", "uniform", "copy_previous", True, "new"),
        ("solar", "stack", "", False, "all"),
        ("copy_previous", "top", "copy_previous", True, "new"),
        ("copy_next", "top", "copy_next", True, "new"),
        ("half_next", "top", "half_next", True, "new"),
        ("random", "top", "random", True, "new"),
    ],
)
def test_each_preset_is_what_its_paper_says(name, layout, weights, zero_init, trained):
    method = resolve_method(UpscaleConfig(method=name, num_new_layers=2))
    assert method == Method(layout, weights, zero_init, trained)


def test_every_method_but_base_and_those_above_is_known():
    assert resolve_method(UpscaleConfig(method="base")) == Method("top", "", False, "all")
    assert set(METHODS) >= {"base", "opt_deus", "average", "llama_pro", "solar", "random"}


def test_each_choice_replaces_the_preset():
    config = UpscaleConfig(
        method="average", layout="middle", zero_init=True, trained="all", num_new_layers=1
    )
    assert resolve_method(config) == Method("middle", "average", zero_init=True, trained="all")
    config = UpscaleConfig(method="opt_deus", zero_init=False, num_new_layers=1)
    assert resolve_method(config).zero_init is False
    config = UpscaleConfig(method="llama_pro", layout="explicit", gaps=(1,))
    assert resolve_method(config).layout == "explicit"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "dus", "num_new_layers": 1}, "upscale.method='dus': use one of opt_deus,"),
        ({"method": "base", "num_new_layers": 1}, "num_new_layers=1: method 'base' adds no"),
        ({"method": "base", "layout": "explicit", "gaps": (1,)}, "method 'base' adds no layer"),
        (
            {"method": "base", "trained": "new"},
            "upscale.trained=.new.: method .base. adds no layer",
        ),
        ({"method": "opt_deus"}, "num_new_layers=0: method 'opt_deus' needs at least one"),
        ({"method": "opt_deus", "layout": "stack", "num_new_layers": 1}, "'solar' only"),
        ({"method": "solar", "layout": "top", "num_new_layers": 1}, "'solar' only"),
        ({"method": "solar", "zero_init": True, "num_new_layers": 1}, "zero_init=True"),
        ({"num_new_layers": 1, "epsilon": 0.0}, "upscale.epsilon=0.0: must be positive"),
        ({"num_new_layers": 1, "epsilon": -1.0}, "upscale.epsilon=-1.0: must be positive"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_method(UpscaleConfig(**fields))
    assert "\n" not in str(caught.value)
