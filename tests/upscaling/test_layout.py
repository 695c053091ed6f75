import pytest

from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling.layout import LayerOrigin, plan_layout


def new_depths(layers):
    return [layer.depth for layer in layers if layer.is_new]


def gaps_of(layers):
    return [layer.previous for layer in layers if layer.is_new]


def test_top_of_32_to_48_puts_new_layers_at_16_18_to_46():
    layers = plan_layout("top", 32, 16)
    assert new_depths(layers) == list(range(16, 47, 2))
    assert gaps_of(layers) == list(range(15, 31))
    assert layers[16] == LayerOrigin(16, None, 15, 16, is_new=True)
    assert layers[17] == LayerOrigin(17, 16, None, None, is_new=False)
    assert layers[47] == LayerOrigin(47, 31, None, None, is_new=False)


@pytest.mark.parametrize(
    ("layout", "num_new", "gaps"),
    [
        ("top", 3, [4, 5, 6]),
        ("bottom", 3, [0, 1, 2]),
        ("middle", 3, [2, 3, 4]),
        ("middle", 4, [1, 2, 3, 4]),
        ("top_and_bottom", 4, [0, 1, 5, 6]),
        ("top_and_bottom", 3, [0, 5, 6]),
        *[(layout, 7, list(range(7))) for layout in ("top", "bottom", "middle", "top_and_bottom")],
        ("uniform", 8, list(range(8))),
        ("uniform", 1, [7]),
    ],
)
def test_gaps_of_eight_layers(layout, num_new, gaps):
    layers = plan_layout(layout, 8, num_new)
    assert gaps_of(layers) == gaps
    assert [layer.depth for layer in layers] == list(range(8 + num_new))
    assert [layer.base_layer for layer in layers if not layer.is_new] == list(range(8))
    for layer in layers:
        if layer.is_new:
            assert layers[layer.depth - 1].base_layer == layer.previous
            above = layers[layer.depth + 1].base_layer if layer.depth + 1 < len(layers) else None
            assert layer.next == above


def test_uniform_of_32_to_48_is_llama_pro():
    layers = plan_layout("uniform", 32, 16)
    assert new_depths(layers) == list(range(2, 48, 3))
    assert gaps_of(layers) == list(range(1, 32, 2))
    assert layers[47] == LayerOrigin(47, None, 31, None, is_new=True)


def test_stack_of_32_to_48_is_solar():
    layers = plan_layout("stack", 32, 16)
    assert [layer.base_layer for layer in layers] == [*range(24), *range(8, 32)]
    # The second copies of layers 8..23 are what a base does not have.
    assert new_depths(layers) == list(range(24, 40))
    assert all(layer.previous is None and layer.next is None for layer in layers)


def test_stack_to_an_odd_depth_keeps_every_base_layer():
    layers = plan_layout("stack", 5, 2)
    assert [layer.base_layer for layer in layers] == [0, 1, 2, 3, 2, 3, 4]
    assert new_depths(layers) == [4, 5]
    assert [layer.base_layer for layer in plan_layout("stack", 3, 3)] == [0, 1, 2, 0, 1, 2]


def test_explicit_gaps_come_in_depth_order_and_may_lie_above_the_last_layer():
    layers = plan_layout("explicit", 4, 0, (3, 0))
    assert [layer.base_layer for layer in layers] == [0, None, 1, 2, 3, None]
    assert gaps_of(layers) == [0, 3]
    assert layers[-1].next is None
    assert plan_layout("explicit", 4, 2, (3, 0)) == layers


def test_no_new_layer_is_the_base():
    layers = plan_layout("top", 3, 0)
    assert layers == tuple(LayerOrigin(i, i, None, None, is_new=False) for i in range(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("top", 4, 4), r"num_new_layers=4: layout 'top' has only 3 gaps .* at most 3"),
        (("bottom", 4, 9), "num_new_layers=9.*at most 3"),
        (("middle", 4, 4), "num_new_layers=4.*at most 3"),
        (("top_and_bottom", 4, 4), "num_new_layers=4.*at most 3"),
        (("top", 4, -1), "num_new_layers=-1: give 0 or more"),
        (("uniform", 6, 4), "num_new_layers=4: layout 'uniform' needs a divisor of .* 6 layers"),
        (("uniform", 6, 12), "num_new_layers=12.*divisor"),
        (("stack", 4, 5), "num_new_layers=5: layout 'stack' adds at most the base's 4"),
        (("top", 4, 1, (1,)), r"upscale.gaps=\(1,\): goes with upscale.layout=explicit"),
        (("explicit", 4, 2), r"upscale.gaps=\(\): goes with upscale.layout=explicit"),
        (("explicit", 4, 0, (4,)), r"upscale.gaps=\(4,\): give distinct numbers from 0 to 3"),
        (("explicit", 4, 0, (-1,)), "distinct numbers from 0 to 3"),
        (("explicit", 4, 0, (1, 1)), "distinct numbers from 0 to 3"),
        (("explicit", 4, 3, (1, 2)), "num_new_layers=3: upscale.gaps names 2; leave it at 0"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_layout(*arguments)
    assert "\n" not in str(caught.value)
