import dataclasses

import pytest

from opt_deus_jax.checkpoints.manifest import Manifest
from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling.layout import plan_layout
from opt_deus_jax.upscaling.methods import METHODS, Method, plan_layers, resolve_method


@pytest.mark.parametrize(
    ("name", "layout", "weights", "zero_init", "trained"),
    [
        ("opt_deus", "top", "transport", True, "new"),
        ("average", "top", "average", False, "new"),
        ("llama_pro", "uniform", "copy_previous", True, "new"),
        ("lesa", "top", "predicted", False, "new"),
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
    config = UpscaleConfig(method="copy_next", output_scale=0.1, num_new_layers=1)
    scaled = Method("top", "copy_next", zero_init=False, trained="new", output_scale=0.1)
    assert resolve_method(config) == scaled
    config = UpscaleConfig(method="average", output_scale=0.0, num_new_layers=1)
    assert resolve_method(config) == Method("top", "average", zero_init=True, trained="new")
    config = UpscaleConfig(method="llama_pro", layout="explicit", gaps=(1,))
    assert resolve_method(config).layout == "explicit"
    config = UpscaleConfig(method="solar", trained="mlp", num_new_layers=1)
    assert resolve_method(config).trained == "mlp"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "dus", "num_new_layers": 1}, "upscale.method='dus': use one of opt_deus,"),
        ({"method": "base", "num_new_layers": 1}, "num_new_layers=1: method 'base' adds no"),
        ({"method": "base", "layout": "explicit", "gaps": (1,)}, "method 'base' adds no layer"),
        ({"method": "opt_deus"}, "num_new_layers=0: method 'opt_deus' needs at least one"),
        ({"method": "opt_deus", "layout": "stack", "num_new_layers": 1}, "'solar' only"),
        ({"method": "solar", "layout": "top", "num_new_layers": 1}, "'solar' only"),
        ({"method": "solar", "zero_init": True, "num_new_layers": 1}, "zero_init=True"),
        ({"num_new_layers": 1, "epsilon": 0.0}, "upscale.epsilon=0.0: must be positive"),
        ({"num_new_layers": 1, "epsilon": -1.0}, "upscale.epsilon=-1.0: must be positive"),
        (
            {"num_new_layers": 1, "transport": "symmetric", "fusion": "select", "epsilon": 0.1},
            "fusion='select': takes whole neurons, upscale.epsilon=0.1 averages",
        ),
        ({"num_new_layers": 1, "fusion": "select"}, "fusion='select': needs .*transport=symmetric"),
        ({"num_new_layers": 1, "fusion": "matched"}, "fusion='matched': needs method 'opt_deus'"),
        (
            {"num_new_layers": 1, "method": "copy_next", "fusion": "rescaled"},
            "fusion='rescaled': method 'copy_next' fuses nothing; use mean",
        ),
        (
            {"num_new_layers": 1, "zero_init": True, "output_scale": 0.1},
            "output_scale=0.1: says what upscale.zero_init=True says; give one",
        ),
        ({"num_new_layers": 1, "output_scale": -0.5}, "output_scale=-0.5: must be 0 or a positive"),
        ({"num_new_layers": 1, "output_scale": float("nan")}, "output_scale=nan: must be 0 or"),
        ({"num_new_layers": 1, "method": "solar", "output_scale": 0.1}, "'solar' makes no new"),
        ({"num_new_layers": 1, "method": "lesa", "layout": "stack"}, "'stack' goes with .*'solar'"),
        ({"num_new_layers": 1, "method": "lesa", "fusion": "rescaled"}, "'lesa' fuses nothing"),
        ({"num_new_layers": 1, "lesa_norms": "reference"}, "'lesa', not 'opt_deus'; leave it at"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_method(UpscaleConfig(**fields))
    assert "\n" not in str(caught.value)


def manifest_of_grown(num_layers: int, num_new: int) -> Manifest:
    layers = plan_layout("top", num_layers, num_new)
    entries = tuple(dataclasses.asdict(origin) for origin in layers)
    return Manifest("opt_deus", {}, "new", entries, {}, {}, (), {})


def test_method_base_keeps_as_new_what_was_new_in_a_grown_base():
    grown = manifest_of_grown(3, 2)
    layers = plan_layers(UpscaleConfig(method="base", trained="new"), 5, grown)
    assert [layer.is_new for layer in layers] == [False, True, False, True, False]
    assert [layer.base_layer for layer in layers] == [0, 1, 2, 3, 4]
    assert plan_layers(UpscaleConfig(method="base"), 5, None) == plan_layout("top", 5, 0)


def test_a_grown_base_that_grows_again_has_only_the_later_layers_new():
    config = UpscaleConfig(method="opt_deus", num_new_layers=1)
    assert plan_layers(config, 5, manifest_of_grown(3, 2)) == plan_layout("top", 5, 1)


@pytest.mark.parametrize(
    ("trained", "manifest", "message"),
    [
        ("new", None, "upscale.trained='new': method 'base' adds no layer; use all"),
        ("new", manifest_of_grown(5, 0), "upscale.trained='new': method 'base' adds no layer"),
        ("all", manifest_of_grown(3, 1), "manifest lists 4 layers, its config.json 5"),
    ],
)
def test_a_base_without_new_layers_cannot_train_them(trained, manifest, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_layers(UpscaleConfig(method="base", trained=trained), 5, manifest)
    assert "\n" not in str(caught.value)
