import pytest
from matplotlib.patches import FancyBboxPatch

from opt_deus_jax.config import UpscaleConfig
from opt_deus_jax.reporting.layout_picture import draw_layout
from opt_deus_jax.upscaling.methods import METHODS, plan_layers, resolve_method


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"base"}))
def test_every_layer_is_drawn_with_the_parents_that_it_has(name: str):
    config = UpscaleConfig(method=name, num_new_layers=2)
    method, layers = resolve_method(config), plan_layers(config, 6, None)
    is_trained = [method.trained == "all" or layer.is_new for layer in layers]
    figure = draw_layout("base", layers, is_trained, method)
    left, right = figure.axes
    boxes = [patch for patch in left.patches if isinstance(patch, FancyBboxPatch)]
    assert len(boxes) == 6 + 8
    of_new = {"transport": 2, "average": 2, "predicted": 2, "random": 0}.get(method.weights, 1)
    spans = 1 if all(is_trained) else 2
    assert len(left.lines) == 6 + 2 * of_new + spans
    drawn = {text.get_text() for text in right.texts}
    assert ("0" in drawn) == method.zero_init
    assert f"{method.layout}" in figure.get_suptitle()
