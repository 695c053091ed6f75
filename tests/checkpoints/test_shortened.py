import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_deus_jax.checkpoints.shortened import keep_layers
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.language_model import logits
from opt_deus_jax.models.model_config import read_model_config
from tests.llama_checkpoints import (
    hf_config,
    oracle_logits,
    oracle_model,
    params_of,
    random_tensors,
    source_of,
    tokens,
)


def test_what_is_kept_computes_what_transformers_computes_with_as_many_layers() -> None:
    tensors = random_tensors(hf_config())
    kept = keep_layers(source_of(hf_config(), tensors), 2)
    assert kept.hf_config == hf_config(num_hidden_layers=2)
    left = {name: array for name, array in tensors.items() if name in kept.tensors}
    assert len(left) < len(tensors)
    oracle = oracle_model(hf_config(num_hidden_layers=2), left)
    compiled = jax.jit(logits, static_argnames=("config", "dtype"))
    config = read_model_config(kept.hf_config)
    ours = compiled(params_of(kept), tokens(), config=config, dtype=jnp.float32)
    np.testing.assert_allclose(ours, oracle_logits(oracle, tokens()), atol=2e-5)


@pytest.mark.parametrize("num_layers", [0, 7])
def test_other_numbers_of_layers_are_refused(num_layers: int) -> None:
    source = source_of(hf_config(), random_tensors(hf_config()))
    with pytest.raises(UserError, match=f"cannot keep {num_layers} of its 6 layers"):
        keep_layers(source, num_layers)
