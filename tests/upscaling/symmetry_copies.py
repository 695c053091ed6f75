"""Blocks drawn at random, and copies of them in other places and directions."""

import jax.numpy as jnp
import numpy as np

from opt_deus_jax.models.language_model import apply_block, causal_inputs
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs
from tests.llama_checkpoints import hf_config

SHAPES = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
    "mqa": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def config_of(shape):
    return read_model_config(hf_config(**SHAPES[shape]))


def random_block(config, seed, sigma=0.2):
    """Norms around 1, of both signs, one of them 0."""
    generator = np.random.default_rng(seed)
    block = {
        name: (sigma * generator.standard_normal(spec.shape) + (spec.init == "ones")).astype(
            np.float32
        )
        for name, spec in block_specs(config).items()
    }
    for name in ("input_norm", "post_attention_norm"):
        block[name][1] *= -1
    block["input_norm"][3] = 0
    return block


def run_block(config, block, kind=None, batch=2, length=12):
    """What the real DecoderBlock adds to a random residual stream, as a layer of a kind."""
    kind = config.layer_kinds[0] if kind is None else kind
    generator = np.random.default_rng(99)
    x_BTD = jnp.asarray(generator.standard_normal((batch, length, config.width)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    params = {name: jnp.asarray(array) for name, array in block.items()}
    out, _ = apply_block(config, kind, params, x_BTD, causal_inputs(config, positions))
    return np.asarray(out - x_BTD, np.float64)


def disguise(block, config, seed):
    """The same function: heads and neurons elsewhere, signs, phases and directions changed.

    Written in float64 with loops, one head at a time.
    """
    generator = np.random.default_rng(seed)
    block = {name: array.astype(np.float64) for name, array in block.items()}
    disguised = {name: array.copy() for name, array in block.items()}
    size, groups = config.head_dim, config.num_kv_heads
    heads, half = config.num_heads // groups, config.head_dim // 2

    def rows(name, head):
        return [name_ for name_ in (f"{name}_kernel", f"{name}_bias") if name_ in block], slice(
            head * size, (head + 1) * size
        )

    def put(name, source, target, turn):
        names, from_ = rows(name, source)
        _, to = rows(name, target)
        for parameter in names:
            if name == "output" and parameter.endswith("kernel"):
                disguised[parameter][:, to] = block[parameter][:, from_] @ turn.T
            elif name != "output":
                disguised[parameter][to] = turn @ block[parameter][from_]

    for target, source in enumerate(generator.permutation(groups)):
        angle = generator.uniform(0, 2 * np.pi, half)
        cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
        phases = np.block([[cos, -sin], [sin, cos]])
        rotation, _ = np.linalg.qr(generator.standard_normal((size, size)))
        put("key", source, target, phases)
        put("value", source, target, rotation)
        for place, head in enumerate(generator.permutation(heads)):
            put("query", heads * source + head, heads * target + place, phases)
            put("output", heads * source + head, heads * target + place, rotation)
    order = generator.permutation(config.mlp_width)
    sign = generator.choice([-1.0, 1.0], config.mlp_width)
    for name in ("gate", "up"):
        flip = sign if name == "up" else np.ones_like(sign)
        disguised[f"{name}_kernel"] = flip[:, None] * block[f"{name}_kernel"][order]
        if f"{name}_bias" in block:
            disguised[f"{name}_bias"] = flip * block[f"{name}_bias"][order]
    disguised["down_kernel"] = block["down_kernel"][:, order] * sign
    return {name: array.astype(np.float32) for name, array in disguised.items()}


def with_other_norms(block, seed):
    """The same function with other norm scales, taken back in the kernels behind them."""
    generator = np.random.default_rng(seed)
    block = dict(block)
    for norm, readers in (
        ("input_norm", ("query", "key", "value")),
        ("post_attention_norm", ("gate", "up")),
    ):
        factor = generator.uniform(0.5, 2, block[norm].shape).astype(np.float32)
        block[norm] = block[norm] * factor
        for name in readers:
            block[f"{name}_kernel"] = block[f"{name}_kernel"] / factor
    return block
