"""Llama 3 grown as published (arXiv 2508.08011).

Variants:
    1b        Llama-3.2-1B, 16 -> 24 layers, 1,722,386,432 parameters
    8b        Llama-3.1-8B, 32 -> 48 layers, 11,520,053,248 parameters
    1b_shape  the same without weights: the config.json shipped here is all that `plan` needs
    8b_shape

The weights of `1b` and `8b` come from the hub (gated repositories: accept the licence there, then
log in with huggingface_hub), or from --config.base=FOLDER.

    python -m experiments.plan --config=configs/llama3.py:8b_shape
"""

from pathlib import Path

from opt_deus_jax.config import Experiment
from opt_deus_jax.errors import UserError

_HUB_IDS = {"1b": "meta-llama/Llama-3.2-1B", "8b": "meta-llama/Llama-3.1-8B"}
_SHAPES = {"1b": "llama3_2_1b.json", "8b": "llama3_1_8b.json"}
_NEW_LAYERS = {"1b": 8, "8b": 16}


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment of a variant."""
    size, _, suffix = variant.partition("_")
    if size not in _HUB_IDS or suffix not in ("", "shape"):
        raise UserError(
            f"configs/llama3.py: unknown variant {variant!r}; use 1b, 8b, 1b_shape or 8b_shape"
        )
    experiment = Experiment(base=_HUB_IDS[size])
    if suffix == "shape":
        experiment.base = str(Path(__file__).with_name(_SHAPES[size]))
    experiment.upscale.num_new_layers = _NEW_LAYERS[size]
    # 1.5B tokens in 12,100 steps of 64 x 2048; the authors did not publish the learning rate.
    experiment.training.steps = 12_100
    experiment.training.batch_size = 64
    experiment.training.compute_dtype = "bfloat16"
    experiment.training.frozen_dtype = "bfloat16"
    experiment.training.remat = "block"
    experiment.training.evaluate_every = 1_210
    experiment.training.checkpoint_every = 500
    experiment.optimizer.warmup_steps = 121
    return experiment
