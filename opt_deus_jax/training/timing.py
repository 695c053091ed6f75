"""One optimizer step as a plain function, to be timed."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.config import Experiment
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import named_tensors
from opt_deus_jax.training.placement import put_rows
from opt_deus_jax.training.program import make_program
from opt_deus_jax.training.segments import TrainedNames, invert_mask
from opt_deus_jax.training.step import initial_state
from opt_deus_jax.training.weights import load_params

Step = Callable[[Int[np.ndarray, "b l"]], float]


def prepare_step(experiment: Experiment, source: CheckpointSource, trained: TrainedNames) -> Step:
    """Loads a model and makes the step that `train` makes, on one device.

    Args:
        experiment: Its data, optimizer, mesh and training are used.
        source: The model.
        trained: Its parameters that are trained.

    Returns:
        A function from tokens [B, T + 1] to the loss before the update, which keeps the state and
        returns when the update is done. The first call with a shape compiles.
    """
    config = read_model_config(source.hf_config, source.name)
    program = make_program(experiment, config, trained, jax.devices()[:1])
    load = functools.partial(
        load_params, source, config, program.segments, shardings=program.shardings
    )
    trainable = load(dtype=jnp.dtype("float32"), wanted=program.mask)
    state = initial_state(trainable, program.optimizer, program.placement)
    frozen = load(
        dtype=jnp.dtype(experiment.training.frozen_dtype), wanted=invert_mask(program.mask)
    )
    del trainable

    def step(tokens_BL: Int[np.ndarray, "b l"]) -> float:
        nonlocal state
        rows = len(tokens_BL)
        with jax.set_mesh(program.mesh):
            batch = put_rows({"tokens": tokens_BL}, range(rows), rows, program.placement.rows)
            state, metrics = program.train_step(state, frozen, batch)
            jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def random_source(hf_config: dict[str, Any]) -> CheckpointSource:
    """A checkpoint with drawn weights, for what does not depend on them.

    Args:
        hf_config: The content of its `config.json`.

    Returns:
        A source of float32 tensors, each drawn when it is read.
    """
    config = read_model_config(hf_config)
    specs = dict(named_tensors(config, config.num_layers))
    draw = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        scale = np.float32(config.initializer_range)
        return draw.standard_normal(specs[name].shape, np.float32) * scale

    infos = {name: TensorInfo(spec.shape, np.dtype(np.float32)) for name, spec in specs.items()}
    return CheckpointSource("drawn weights", hf_config, infos, read, {})


def time_in_turns(
    steps: Mapping[str, Step], tokens_BL: Int[np.ndarray, "b l"], rounds: int
) -> dict[str, list[float]]:
    """Times steps in turn, so that what else the machine does meets all alike.

    Args:
        steps: From `prepare_step`, by name.
        tokens_BL: Tokens [B, T + 1], in every round the same.
        rounds: Timed rounds, after one that is not.

    Returns:
        Seconds of each round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(tokens_BL)
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}
