"""A training step of a model of every family, against the gradients of torch."""

import copy
import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.config import (
    DataConfig,
    Experiment,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs, identity_values
from opt_deus_jax.training.placement import put_rows
from opt_deus_jax.training.program import Program, make_program
from opt_deus_jax.training.segments import invert_mask, select_trained
from opt_deus_jax.training.step import initial_state
from opt_deus_jax.training.weights import load_params
from tests.families import VARIANTS, base, oracle
from tests.llama_checkpoints import source_of, tokens
from tests.training.stacking import tensors_of

ROWS = 4
EXPERIMENT = Experiment(
    data=DataConfig(sequence_length=20),
    # Nothing is clipped, so the first moment is the gradient but for its factor.
    optimizer=OptimizerConfig(clip_norm=1e9, warmup_steps=0),
    training=TrainingConfig(steps=4, batch_size=ROWS),
)
ZEROED = {"output_kernel": 0.0, "down_kernel": 0.0}
TRAINED = [variant for variant in VARIANTS if " " not in variant]
# Of four layers, this one counts as new.
NEW = 3


@functools.cache
def program_of(variant, mesh=(1, 1, 1), experts="dense") -> Program:
    config = read_model_config(base(variant).hf_config)
    trained = select_trained(config, [depth == NEW for depth in range(4)], "new")
    training = dataclasses.replace(EXPERIMENT.training, experts=experts)
    experiment = dataclasses.replace(EXPERIMENT, mesh=MeshConfig(*mesh), training=training)
    return make_program(experiment, config, trained, jax.devices()[: np.prod(mesh)])


def one_step(program, source):
    """Loss, gradients, and trained tensors before and after, all by name."""
    place = functools.partial(
        load_params, source, program.config, program.segments, shardings=program.shardings
    )
    float32 = jnp.dtype("float32")
    trainable = place(dtype=float32, wanted=program.mask)
    frozen = place(dtype=float32, wanted=invert_mask(program.mask))
    by_name = functools.partial(tensors_of, config=program.config, segments=program.segments)
    before = by_name(trainable)
    state = initial_state(trainable, program.optimizer, program.placement)
    tokens_BL = tokens(ROWS, 21, vocabulary=64)
    with jax.set_mesh(program.mesh):
        batch = put_rows({"tokens": tokens_BL}, range(ROWS), ROWS, program.placement.rows)
        state, metrics = program.train_step(state, frozen, batch)
    first_moment = by_name(optax.tree.get(state.optimizer_state, "mu"))
    share = 1 - EXPERIMENT.optimizer.beta1
    gradients = {name: moment / share for name, moment in first_moment.items()}
    return float(metrics["loss"]), gradients, before, by_name(state.trainable)


def by_torch(variant):
    """Loss and gradients of the same model and tokens, by name."""
    model, tokens_BL = oracle(variant), tokens(ROWS, 21, vocabulary=64).astype(np.int64)
    model.zero_grad()
    outputs = model(torch.from_numpy(tokens_BL[:, :-1]))
    targets = torch.from_numpy(tokens_BL[:, 1:]).flatten()
    loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets)
    if getattr(model.config, "output_router_logits", False):
        loss = loss + model.router_aux_loss_coef * outputs.aux_loss
    loss.backward()
    return loss.item(), saved_gradients(model)


def saved_gradients(model):
    """The gradients of a model by the names that it is saved under."""
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, to in zip(model.parameters(), gradients.parameters(), strict=True):
            to.copy_(parameter.grad)
    with tempfile.TemporaryDirectory() as directory:
        gradients.save_pretrained(directory)
        source = open_checkpoint(directory)
        return source_of(source.hf_config, {name: source.read(name) for name in source.tensors})


def with_constants(source, values):
    """The same model, but parameters of its new layer all of one value."""
    specs = block_specs(read_model_config(source.hf_config).of_layer(NEW))
    tensors = {name: source.read(name) for name in source.tensors}
    for name, value in values.items():
        hf_name = specs[name].hf_name.format(layer=NEW)
        tensors[hf_name] = np.full_like(tensors[hf_name], value)
    return source_of(source.hf_config, tensors)


def gradient_norm(variant, values):
    """That of the first step."""
    source = with_constants(base(variant), values)
    _, gradients, _, _ = one_step(program_of(variant), source)
    return np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))


@pytest.mark.parametrize("variant", TRAINED)
def test_loss_and_gradients_are_torchs_and_only_new_layers_move(variant):
    source, program = base(variant), program_of(variant)
    loss, gradients, before, after = one_step(program, source)
    expected_loss, expected = by_torch(variant)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    names = {name for name in source.tensors if f".layers.{NEW}." in name}
    assert before.keys() == after.keys() == gradients.keys() == names
    largest = max(np.abs(expected.read(name)).max() for name in names)
    for name in names:
        np.testing.assert_allclose(
            gradients[name], expected.read(name), rtol=1e-3, atol=1e-5 * largest, err_msg=name
        )
        assert not np.array_equal(before[name], after[name])
        assert np.array_equal(before[name], source.read(name))
    # The same program, begun at the identity: only what makes it one has a gradient.
    values = identity_values(program.config.of_layer(NEW))
    _, gradients, before, after = one_step(program, with_constants(source, values))
    specs = block_specs(program.config.of_layer(NEW))
    if program.config.experts and program.config.experts.balance:
        # The balance of the experts hangs on the choice, not on what is made of it.
        values |= dict.fromkeys(("router_kernel", "post_attention_norm"), 0.0)
    moving = {specs[name].hf_name.format(layer=NEW) for name in values}
    assert {name for name in names if np.any(gradients[name])} == moving
    assert {name for name in names if not np.array_equal(before[name], after[name])} == moving


@pytest.mark.parametrize("variant", ["olmo2", "gemma2", "gemma3_text"])
def test_first_gradients_through_a_norm_are_of_the_size_of_a_llamas(variant):
    of_llama = gradient_norm("llama", ZEROED)
    values = identity_values(program_of(variant).config)
    assert values.keys() == {"attention_output_norm", "mlp_output_norm"}
    assert 0.1 < gradient_norm(variant, values) / of_llama < 1
    # What zeroed kernels would give: a norm at zero multiplies by 1 / sqrt(epsilon), here 1000.
    kernels = ZEROED | {"output_bias": 0.0} if variant == "olmo2" else ZEROED
    assert gradient_norm(variant, kernels) / of_llama > 300


@pytest.mark.parametrize(("variant", "mesh"), [("mixtral", (2, 2, 2)), ("qwen3_moe", (1, 1, 1))])
def test_grouped_experts_have_the_loss_and_gradients_of_torch(variant, mesh):
    loss, gradients, _, _ = one_step(program_of(variant, mesh, "grouped"), base(variant))
    expected_loss, expected = by_torch(variant)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    largest = max(np.abs(expected.read(name)).max() for name in gradients)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient, expected.read(name), rtol=1e-3, atol=1e-5 * largest, err_msg=name
        )


def test_a_model_without_experts_is_not_trained_by_grouped_ones():
    with pytest.raises(UserError, match="training.experts='grouped': the model has no experts"):
        program_of("llama", experts="grouped")


def with_large_kernels(source):
    """Queries and keys that depend on the tokens more than on the biases drawn beside them.

    Else attention is about even, what their gradients are left with after cancelling is rounding.
    """
    tensors = {name: source.read(name) for name in source.tensors}
    for name in tensors:
        if name.startswith("model.layers.") and tensors[name].ndim > 1:
            tensors[name] = 2 * tensors[name]
    return source_of(source.hf_config, tensors)


# Norms over all heads, which the mesh cuts; experts, of which each device has some.
@pytest.mark.parametrize("variant", ["olmo2", "mixtral"])
def test_a_mesh_computes_what_one_device_does(variant):
    source = with_large_kernels(base(variant))
    loss, gradients, _, _ = one_step(program_of(variant), source)
    on_mesh, found, _, _ = one_step(program_of(variant, (2, 2, 2)), source)
    np.testing.assert_allclose(on_mesh, loss, rtol=1e-5)
    for name, gradient in gradients.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-5 * scale, err_msg=name)
