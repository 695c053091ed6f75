"""What layers compute on text, and copies in which that is of one size."""

import numpy as np
import pytest
import torch

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.upscaling.activations import base_moments, whiten_branches
from opt_deus_jax.upscaling.base_tensors import parent_block
from opt_deus_jax.upscaling.fusion import fuse_blocks
from tests.llama_checkpoints import load_directory, tokens
from tests.upscaling.test_expand import base, expand  # noqa: F401


def seen_by_transformers(directory, tokens_BT):
    """The values and neurons of every layer, by hooks on somebody else's model."""
    model = load_directory(directory)
    values, neurons, hooks = [], [], []
    for layer in model.model.layers:
        hooks += [
            layer.self_attn.v_proj.register_forward_hook(
                lambda module, given, made: values.append(made.detach().numpy())
            ),
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda module, given: neurons.append(given[0].detach().numpy())
            ),
        ]
    try:
        with torch.no_grad():
            model(torch.tensor(np.array(tokens_BT)))
    finally:
        for hook in hooks:
            hook.remove()
    return values, neurons


def test_moments_are_those_of_transformers_and_are_one_in_whitened_copies(base):  # noqa: F811
    config = read_model_config(base.hf_config, base.name)
    moments = base_moments(base, np.asarray(tokens()))
    for layer, (value, neuron) in enumerate(
        zip(*seen_by_transformers(base.name, tokens()), strict=True)
    ):
        heads = value.reshape(-1, config.num_kv_heads, config.head_dim)
        expected = np.einsum("mki,mkj->kij", heads, heads) / len(heads)
        np.testing.assert_allclose(moments[layer].value_KHH, expected, rtol=1e-3, atol=1e-6)
        neuron = neuron.reshape(-1, neuron.shape[-1])
        np.testing.assert_allclose(moments[layer].neuron_N, (neuron**2).mean(0), rtol=1e-3)
        block = parent_block(base.read, config, layer)
        zeroed = fuse_blocks(block, block, config=config, weights="copy_next", zero_init=True).block
        white = whiten_branches(zeroed, moments[layer], config)
        # A linear map of the values: the moments that it makes of those seen.
        before = block["value_kernel"].reshape(config.num_kv_heads, config.head_dim, -1)
        after = white["value_kernel"].reshape(before.shape)
        for head, moment in enumerate(expected):
            turn = np.linalg.lstsq(before[head].T, after[head].T, rcond=None)[0].T
            np.testing.assert_allclose(turn @ moment @ turn.T, np.eye(len(moment)), atol=1e-2)
        size = np.linalg.norm(white["up_kernel"], axis=1) / np.linalg.norm(
            block["up_kernel"], axis=1
        )
        np.testing.assert_allclose(size**2 * (neuron**2).mean(0), 1, rtol=1e-2)


def test_only_zeroed_blocks_are_whitened(base):  # noqa: F811
    config = read_model_config(base.hf_config, base.name)
    moments = base_moments(base, np.asarray(tokens()))
    with pytest.raises(ValueError, match="whose output and down are zero"):
        whiten_branches(parent_block(base.read, config, 0), moments[0], config)


def test_without_text_an_expansion_is_refused(tmp_path, base):  # noqa: F811
    with pytest.raises(UserError, match="no text here to measure on"):
        expand(
            base, tmp_path / "grown", method="copy_next", num_new_layers=1, balance="activations"
        )
