"""The lowest layers of a checkpoint as a checkpoint: small and real, to try things out with."""

import dataclasses

from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.models.params import named_tensors


def keep_layers(source: CheckpointSource, num_layers: int) -> CheckpointSource:
    """Leaves out all but the lowest layers; what is left out is never read.

    Args:
        source: A checkpoint, from `open_checkpoint`.
        num_layers: How many layers are kept. Few of them write no sensible text.

    Returns:
        A checkpoint with the same embedding, final norm, head and tokenizer.

    Raises:
        UserError: The checkpoint has not that many layers.
    """
    there = read_model_config(source.hf_config, source.name).num_layers
    if not 0 < num_layers <= there:
        raise UserError(f"{source.name}: cannot keep {num_layers} of its {there} layers")
    hf_config = grown_hf_config(source.hf_config, range(num_layers))
    names = [name for name, _ in named_tensors(read_model_config(hf_config), num_layers)]
    tensors = {name: source.tensors[name] for name in names}
    return dataclasses.replace(source, hf_config=hf_config, tensors=tensors)
