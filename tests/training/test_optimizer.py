import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_deus_jax.config import OptimizerConfig
from opt_deus_jax.errors import UserError
from opt_deus_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer


def rates(optimizer: OptimizerConfig, steps: int) -> np.ndarray:
    schedule = learning_rate_schedule(optimizer, steps)
    return np.array([schedule(step) for step in range(steps)])


def test_wsd_rises_stays_and_falls():
    actual = rates(OptimizerConfig(learning_rate=2.0, warmup_steps=4, decay_fraction=0.4), 10)
    np.testing.assert_allclose(actual, [0.5, 1, 1.5, 2, 2, 2, 2, 1.5, 1, 0.5], rtol=1e-6)


def test_cosine_ends_at_a_tenth():
    actual = rates(OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=2), 7)
    np.testing.assert_allclose(actual[[0, 1, 2, 4, 6]], [0.5, 1, 1, 0.55, 0.1], rtol=1e-6)
    assert np.all(np.diff(actual[2:]) < 0)


def test_no_warmup_starts_at_the_peak():
    actual = rates(OptimizerConfig(learning_rate=1.0, warmup_steps=0, decay_fraction=0.0), 3)
    np.testing.assert_allclose(actual, [1, 1, 1])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"warmup_steps": 9}, "optimizer.warmup_steps"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps"),
        ({"decay_fraction": 1.5}, "optimizer.decay_fraction"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate"),
        ({"clip_norm": float("nan")}, "optimizer.clip_norm"),
        ({"beta2": 1.0}, "optimizer.beta2"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict, field: str):
    optimizer = dataclasses.replace(OptimizerConfig(warmup_steps=1), **changes)
    with pytest.raises(UserError, match=field):
        make_optimizer(optimizer, learning_rate_schedule(optimizer, 10))


def test_only_kernels_decay():
    names = {
        "query_kernel": True,
        "query_bias": False,
        "input_norm": False,
        "post_attention_norm": False,
    }
    params: dict[str, Any] = {
        "embedding": jnp.ones((3, 2)),
        "head": None,
        "final_norm": jnp.ones(2),
        "segments": [[dict.fromkeys(names, jnp.ones((4, 2)))]],
    }
    expected = {"embedding": True, "head": None, "final_norm": False, "segments": [[names]]}
    assert decay_mask(params) == expected

    settings = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    optimizer = make_optimizer(settings, learning_rate_schedule(settings, 5))
    zeros = params | {
        "embedding": jnp.zeros((3, 2)),
        "final_norm": jnp.zeros(2),
        "segments": [[dict.fromkeys(names, jnp.zeros((4, 2)))]],
    }
    updates: Any
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["embedding"], -0.05, rtol=1e-6)
    for name, decays in names.items():
        block = updates["segments"][0][0]
        np.testing.assert_allclose(block[name], -0.05 if decays else 0.0, rtol=1e-6)
    assert not np.any(updates["final_norm"])
    assert updates["head"] is None
