"""Llama-3.1-8B grown from 32 to 48 layers as published (arXiv 2508.08011).

The grown model has 11,520,053,248 parameters.

Variants: none takes the weights from the hub (a gated repository: accept its licence there, then
`huggingface-cli login`; or set --config.base to a local folder). `shape` takes only the config.json
shipped beside this file, which is all that `plan` needs.

    python -m experiments.plan --config=configs/llama3_1_8b.py:shape
"""

from pathlib import Path

from opt_deus_jax.config import Experiment
from opt_deus_jax.errors import UserError


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment of a variant."""
    experiment = Experiment(base="meta-llama/Llama-3.1-8B")
    if variant == "shape":
        experiment.base = str(Path(__file__).with_suffix(".json"))
    elif variant:
        raise UserError(f"configs/llama3_1_8b.py: unknown variant {variant!r}; use shape or none")
    experiment.upscale.num_new_layers = 16
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
