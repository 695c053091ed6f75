"""Instruction tuning of a grown model, loss on the answers only.

Variants:
    llama    the recipe of the paper (arXiv 2508.08011): Alpaca-GPT4, one epoch of 812 steps
    smollm2  the same made small: SmolLM2-135M-Instruct, or a model grown from it, on two cores

The base is a model that experiments.export wrote after continual pre-training: its layers that were
new stay known as such, so that --config.upscale.trained=new tunes only them; all are tuned
otherwise. The instructions are the 52,002 rows of alpaca_gpt4_data.json (github.com/
Instruction-Tuning-with-GPT-4/GPT-4-LLM, CC BY-NC 4.0), or any other rows of that form.

The authors published neither learning rate nor sequence length of this stage: 1e-5 is usual for
tuning all parameters of such models, 2048 is the length of their pre-training.

Weights, gradients and moments of all parameters take 16 bytes each: 28 GB for Llama 1B + 8, 184 GB
for 8B + 16, to be shared out by --config.mesh.

    C=(--config=configs/fine_tune.py:llama --config.base=runs/1b/exported --workdir=runs/1b_tuned
       --config.data.train=alpaca_gpt4_data.json)
    python -m experiments.expand "${C[@]}"
    python -m experiments.prepare_data "${C[@]}"
    python -m experiments.train "${C[@]}"
"""

from configs.smollm2_135m import smollm2_base
from opt_deus_jax.config import Experiment
from opt_deus_jax.errors import UserError


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment of a variant."""
    if variant not in ("llama", "smollm2"):
        raise UserError(f"configs/fine_tune.py: unknown variant {variant!r}; use llama or smollm2")
    experiment = Experiment()
    experiment.upscale.method = "base"
    experiment.data.train = "alpaca_gpt4_data.json"
    experiment.data.format = "alpaca"
    experiment.optimizer.schedule = "cosine"
    experiment.optimizer.learning_rate = 1e-5
    experiment.training.steps = 0
    experiment.training.epochs = 1
    if variant == "llama":
        # Llama's base models come without a chat template.
        experiment.data.template = "alpaca"
        # One example a sequence: 52,002 / 64 = 812 whole steps. So few are held out (about 16) that
        # it stays 812.
        experiment.data.packing = False
        experiment.data.held_out_fraction = 0.0003
        experiment.optimizer.warmup_steps = 24
        experiment.training.batch_size = 64
        experiment.training.compute_dtype = "bfloat16"
        experiment.training.frozen_dtype = "bfloat16"
        experiment.training.remat = "block"
        experiment.training.evaluate_every = 203
        experiment.training.checkpoint_every = 203
    else:
        experiment.base = smollm2_base()
        experiment.data.sequence_length = 256
        experiment.data.max_held_out_tokens = 8_192
        experiment.optimizer.learning_rate = 1e-4
        experiment.training.batch_size = 4
        experiment.training.evaluate_every = 50
    return experiment
