r"""Continues prompts with any checkpoint.

python -m experiments.sample --model=runs/first/exported --prompt="Return the"
--model takes a Hugging Face folder, a .gguf file or a hub id; repeat it to compare.
"""

import jax
import jax.numpy as jnp
from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.checkpoints.tokenizer import load_tokenizer
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.generation import generate
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.reporting.tables import show
from opt_deus_jax.training.segments import plan_segments
from opt_deus_jax.training.weights import load_params

_MODEL = flags.DEFINE_multi_string("model", None, "Checkpoint; may be repeated.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text; may be repeated.", required=True)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 60, "Tokens to add.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.", lower_bound=0.0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus sampling.", lower_bound=0.0, upper_bound=1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")


def main() -> None:
    """Prints each model's continuation of each prompt."""
    for name in _MODEL.value:
        source = open_checkpoint(name)
        config = read_model_config(source.hf_config, name)
        tokenizer = load_tokenizer(source.side_files, source.hf_config, name)
        prompts = [tokenizer.encode(prompt) for prompt in _PROMPT.value]
        if not all(prompts):
            raise UserError("--prompt is empty; give some text")
        segments = plan_segments((frozenset(),) * config.num_layers, config.layer_kinds)
        params = load_params(
            source,
            config,
            segments,
            dtype=jnp.dtype("float32"),
            shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        )
        continuations = generate(
            params,
            prompts,
            config=config,
            max_new_tokens=_TOKENS.value,
            eos_ids=tokenizer.eos_ids,
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            seed=_SEED.value,
        )
        for prompt, continuation in zip(_PROMPT.value, continuations, strict=True):
            show(f"[{name}]\n{prompt}{tokenizer.decode(continuation)}\n")


if __name__ == "__main__":
    launch.run(main)
