"""Qwen3-235B-A22B grown by twelve layers: 94 -> 106, the newest at the top.

Variants: `235b` with the weights of the hub id Qwen/Qwen3-235B-A22B (or --config.base=FOLDER);
`235b_shape` without weights: the config.json shipped here is all that `plan` needs.

    python -m experiments.plan --config=configs/qwen3_moe.py:235b_shape

Nothing of this size has been run.
"""

from pathlib import Path

from opt_deus_jax.config import Experiment
from opt_deus_jax.errors import UserError


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment of a variant."""
    if variant not in ("235b", "235b_shape"):
        raise UserError(
            f"configs/qwen3_moe.py: unknown variant {variant!r}; use 235b or 235b_shape"
        )
    experiment = Experiment(base="Qwen/Qwen3-235B-A22B")
    if variant == "235b_shape":
        experiment.base = str(Path(__file__).with_name("qwen3_235b_a22b.json"))
    experiment.upscale.num_new_layers = 12
    experiment.training.compute_dtype = "bfloat16"
    experiment.training.frozen_dtype = "bfloat16"
    experiment.training.remat = "block"
    return experiment
