"""lm_eval's own `hf` backend; torch and transformers come with the extra `test`."""

from typing import Any

import jax
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from opt_deus_jax.errors import UserError
from opt_deus_jax.evaluation.tasks import is_rolling


def load_hf_backend(pretrained: str, dtype: str, threads: int) -> Any:
    """Loads a model on the CPU.

    Args:
        pretrained: A Hugging Face directory or a hub id.
        dtype: Type of parameters and activations.
        threads: Cores that it may use.

    Raises:
        UserError: JAX computes on something else than the CPU.
    """
    if jax.default_backend() != "cpu":
        raise UserError(
            f"JAX computes on {jax.default_backend()}, which torch on the CPU cannot be timed "
            "against; set JAX_PLATFORMS=cpu"
        )
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    # Typed for its users' command line.
    backend: Any = HFLM
    return backend(pretrained, device="cpu", dtype=dtype)


def set_batch_size(backend: Any, task: Any, batch_size: int) -> int:
    """Sets how many texts make a batch.

    Args:
        backend: From `load_hf_backend`.
        task: The task to come. Whole texts, of up to the model's context, always come alone: the
            backend makes all their logits at once, 1.6 GB for 8192 tokens of 49152 kinds.
        batch_size: For the other tasks.

    Returns:
        The size that was set.
    """
    backend.batch_size_per_gpu = 1 if is_rolling(task) else batch_size
    return backend.batch_size_per_gpu
