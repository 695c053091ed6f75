"""Layers that are made ahead: in order, no more than devices, each on its own."""

import threading

import jax
import jax.numpy as jnp
import pytest

from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling.layout import plan_layout
from opt_deus_jax.upscaling.lookahead import Lookahead, fusing_devices

LAYERS = [origin for origin in plan_layout("top", 12, 9) if origin.is_new]


def device_of_new_array(origin):
    [device] = (jnp.ones(3) + 1).devices()
    return origin.depth, device


@pytest.mark.parametrize("number", [1, 2, 8])
def test_each_layer_is_made_on_the_next_device(number):
    devices = jax.devices()[:number]
    ahead = Lookahead(device_of_new_array, LAYERS, devices)
    for place, origin in enumerate(LAYERS):
        assert ahead.take(origin) == (origin.depth, devices[place % number])
        ahead.let_go(origin)
    ahead.close()


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("lets_go", [True, False])
def test_there_are_never_more_layers_than_devices(number, lets_go):
    begun, all_begun = [], threading.Event()

    def make(origin):
        begun.append(origin.depth)
        if len(begun) == number:
            all_begun.set()
        # The first ones are made at the same time, or this would not end well.
        assert all_begun.wait(60)

    ahead = Lookahead(make, LAYERS, jax.devices()[:number])
    for place, origin in enumerate(LAYERS):
        ahead.take(origin)
        # What is taken, and let go of only when the next is asked for, and what is ahead of it.
        assert len(begun) <= place + number
        if lets_go:
            ahead.let_go(origin)
    ahead.close()
    assert sorted(begun) == [origin.depth for origin in LAYERS]


def test_an_error_comes_with_its_layer_and_nothing_is_begun_after_it():
    made = []

    def make(origin):
        if origin is LAYERS[1]:
            raise UserError("layer 1")
        made.append(origin)

    ahead = Lookahead(make, LAYERS, jax.devices()[:3])
    ahead.take(LAYERS[0])
    with pytest.raises(UserError, match="layer 1"):
        ahead.take(LAYERS[1])
    ahead.close()
    assert {origin.depth for origin in made} <= {LAYERS[i].depth for i in (0, 2, 3)}


def test_devices_are_chosen_by_number_and_refused_by_name():
    assert fusing_devices(0) == jax.devices()[:1]
    assert fusing_devices(5) == jax.devices()[:5]
    for number in (-1, 9):
        with pytest.raises(
            UserError, match=rf"--gaps_at_once={number}: .* has 8 \(cpu\); use 1 to"
        ):
            fusing_devices(number)
