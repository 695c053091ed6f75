"""Two contenders and two seeds on the tiny model; base, text and questions come by flags.

With a folder for a variant: all parameters of the model there, trained on.
"""

from opt_deus_jax.config import Comparison, Contender, UpscaleConfig
from tests.entry import tiny_config


def get_config(trained_model: str = "") -> Comparison:
    shared = tiny_config.get_config()
    shared.training.steps = 10
    shared.evaluation.tasks = ("piqa", "wikitext")
    contenders = tuple(
        Contender(method, UpscaleConfig(method=method, num_new_layers=2))
        for method in ("copy_next", "opt_deus")
    )
    if trained_model:
        contenders = (Contender("on", UpscaleConfig(method="base"), base=trained_model),)
    return Comparison(
        shared,
        contenders,
        seeds=(0, 1),
        max_rate_steps=0,
        questions=3,
        perplexity_pages=1,
        references=(contenders[0].name,),
        exported=("copy_next",) if not trained_model else (),
    )
