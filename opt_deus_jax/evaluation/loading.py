"""From a checkpoint to a model that can be asked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from opt_deus_jax.config import MeshConfig, TrainingConfig
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.distributed.sharding import num_shards
from opt_deus_jax.models.language_model import Params
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.training.placement import check_fits, param_shardings
from opt_deus_jax.training.segments import plan_segments
from opt_deus_jax.training.weights import load_params


class LoadedModel(NamedTuple):
    """A model ready to be asked.

    Attributes:
        params: Its param pytree, on the mesh.
        config: Its network.
        tokenizer: Its tokenizer.
        mesh: The mesh.
    """

    params: Params
    config: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh


def load_model(
    pretrained: str, *, mesh: MeshConfig | None = None, dtype: str = "float32"
) -> LoadedModel:
    """Loads a checkpoint for evaluation.

    Args:
        pretrained: A Hugging Face directory, a `.gguf` file or a hub id.
        mesh: How the devices are arranged; None spreads parameters over all of them.
        dtype: Type in which parameters are held.

    Returns:
        The model, all its layers in one scan.

    Raises:
        UserError: It cannot be read, its tokenizer does not belong to it, or it does not fit the
            mesh.
    """
    source = open_checkpoint(pretrained)
    config = read_model_config(source.hf_config, source.name)
    tokenizer = load_tokenizer(source.side_files, source.hf_config, source.name)
    devices = make_mesh(mesh or MeshConfig(), jax.devices())
    rows = TrainingConfig(batch_size=num_shards("batch", devices))
    check_fits(config, rows, devices)
    segments = plan_segments((frozenset(),) * config.num_layers, config.layer_kinds)
    shardings = param_shardings(config, segments, devices)
    params = load_params(source, config, segments, dtype=jnp.dtype(dtype), shardings=shardings)
    return LoadedModel(params, config, tokenizer, devices)
