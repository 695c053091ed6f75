"""The predictor against torch: what it is shown, its loss, and what an epoch makes of it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from opt_deus_jax.upscaling.lesa_predictor import (
    HIDDEN,
    OPTIMIZER,
    gather_batches,
    initial_params,
    predict_rows,
    prediction_loss,
    train_on,
    train_predictor,
)

WIDTH = 6
LAYERS = ("first", "second", "third")
CONSECUTIVE = [(0, 1, 2), (1, 2, 3), (2, 3, 4)]


def drawn_coordinates(rows=50, seed=0):
    draw = np.random.default_rng(seed).standard_normal((5, rows, WIDTH))
    return (draw / math.sqrt(5 * WIDTH)).astype(np.float32)


def torch_network(params):
    """The authors' network with the given weights."""
    sizes = ((2 * WIDTH, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, WIDTH))
    linears = [torch.nn.Linear(*size) for size in sizes]
    for name, linear in zip(LAYERS, linears, strict=True):
        linear.weight.data = torch.from_numpy(np.array(params[f"{name}_kernel"]))
        linear.bias.data = torch.from_numpy(np.array(params[f"{name}_bias"]))
    relu = torch.nn.ReLU()
    return torch.nn.Sequential(linears[0], relu, linears[1], relu, linears[2])


def torch_loss(predicted, target, share=5e-4):
    criterion = torch.nn.MSELoss()
    norms = criterion(torch.norm(predicted, p=2), torch.norm(target, p=2))
    return (1 - share) * criterion(predicted, target) + share * norms


def torch_samples(coordinates):
    """Every row with the rows below and above it, window after window."""
    parts = [torch.from_numpy(layer.copy()) for layer in coordinates]
    inputs = [torch.cat([parts[i - 1], parts[i + 1]], dim=1) for i in range(1, 4)]
    return torch.cat(inputs), torch.cat(parts[1:4])


def test_samples_are_all_rows_of_all_windows_in_the_order_that_is_asked_for():
    coordinates = drawn_coordinates()
    inputs, targets = torch_samples(coordinates)
    order = np.random.default_rng(1).permutation(150)
    batches = gather_batches(coordinates, CONSECUTIVE, order)
    assert batches.weight_SB.shape == (3, 64)
    np.testing.assert_array_equal(batches.weight_SB.ravel(), np.arange(192) < 150)
    neighbours = batches.neighbours_SBE.reshape(192, 2 * WIDTH)[:150]
    np.testing.assert_array_equal(neighbours, inputs.numpy()[order])
    np.testing.assert_array_equal(batches.target_SBD.reshape(192, WIDTH)[:150], targets[order])


def test_loss_is_that_of_torch_whatever_the_padding():
    draw = np.random.default_rng(2).standard_normal((2, 64, WIDTH)).astype(np.float32)
    weight = (np.arange(64) < 23).astype(np.float32)
    ours = prediction_loss(*map(jnp.asarray, (*draw, weight)))
    predicted, target = (torch.from_numpy(x[:23]) for x in draw)
    theirs = torch_loss(predicted, target)
    np.testing.assert_allclose(float(ours), theirs.item(), rtol=1e-6)
    assert float(ours) > 1e-2


def test_loss_has_a_gradient_where_nothing_is_predicted():
    zeros, target = jnp.zeros((64, WIDTH)), jnp.ones((64, WIDTH))
    gradient = jax.grad(prediction_loss)(zeros, target, jnp.ones(64))
    np.testing.assert_allclose(gradient, -2 * (1 - 5e-4) / (64 * WIDTH), rtol=1e-5)


def test_an_epoch_makes_the_same_network_as_torch():
    coordinates = drawn_coordinates()
    params = initial_params(jax.random.key(0), WIDTH)
    network = torch_network(params)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.001)
    inputs, targets = torch_samples(coordinates)
    order = np.random.default_rng(1).permutation(150)
    for start in range(0, 150, 64):
        batch = order[start : start + 64]
        optimizer.zero_grad()
        torch_loss(network(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    trained, _ = train_on(
        params, OPTIMIZER.init(params), gather_batches(coordinates, CONSECUTIVE, order)
    )
    linears = [part for part in network if isinstance(part, torch.nn.Linear)]
    for name, linear in zip(LAYERS, linears, strict=True):
        for kind, theirs in (("kernel", linear.weight), ("bias", linear.bias)):
            before, after = (np.asarray(p[f"{name}_{kind}"]) for p in (params, trained))
            assert np.abs(after - before).max() > 1e-3
            # Three steps of 1e-3 were made.
            np.testing.assert_allclose(after, theirs.detach().numpy(), atol=2e-6)
    predicted = predict_rows(trained, jnp.asarray(inputs.numpy()))
    np.testing.assert_allclose(predicted, network(inputs).detach().numpy(), atol=1e-5)


def test_first_weights_are_spread_as_torch_spreads_them():
    params = initial_params(jax.random.key(3), WIDTH)
    for name, inputs in zip(LAYERS, (2 * WIDTH, HIDDEN, HIDDEN), strict=True):
        bound = 1 / math.sqrt(inputs)
        kernel = np.asarray(params[f"{name}_kernel"])
        assert kernel.shape[1] == inputs
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        assert abs(kernel.std() / (bound / math.sqrt(3)) - 1) < 0.05
        assert np.abs(np.asarray(params[f"{name}_bias"])).max() <= bound


def test_what_can_be_learned_is_learned_and_fits_are_what_they_say():
    coordinates = drawn_coordinates(rows=400)
    # What lies between is the difference of its neighbours, which their mean does not know.
    coordinates[1] = coordinates[0] - coordinates[2]
    windows = [(0, 1, 2)] * 4
    epochs = []
    params, fit, mean_fit = train_predictor(
        coordinates, windows, jax.random.key(0), on_epoch=lambda: epochs.append(1)
    )
    assert len(epochs) == 10
    assert fit.error < 0.3 * mean_fit.error
    assert fit.loss < 0.1 * mean_fit.loss
    x = np.concatenate([coordinates[0], coordinates[2]], axis=1)
    for guess, reported in (
        (np.asarray(predict_rows(params, jnp.asarray(x))), fit),
        ((coordinates[0] + coordinates[2]) / 2, mean_fit),
    ):
        true = coordinates[1]
        error = np.linalg.norm(guess - true) / np.linalg.norm(true)
        assert reported.error == pytest.approx(error, rel=1e-4)
        pairs = (np.concatenate([rows] * 4) for rows in (guess, true))
        parts = [torch.from_numpy(rows).split(64) for rows in pairs]
        losses = [torch_loss(*batch).item() for batch in zip(*parts, strict=True)]
        assert reported.loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_same_key_gives_the_same_network_and_another_another():
    coordinates = drawn_coordinates()
    first, again, other = (
        train_predictor(coordinates, CONSECUTIVE, jax.random.key(seed))[0] for seed in (0, 0, 1)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])
