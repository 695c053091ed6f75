"""A model and a text so small that every launcher runs in seconds; `base` is set on the command."""

from opt_deus_jax.config import Experiment


def get_config() -> Experiment:
    experiment = Experiment()
    experiment.upscale.num_new_layers = 2
    experiment.data.sequence_length = 16
    experiment.data.num_workers = 1
    experiment.data.held_out_fraction = 0.3
    experiment.optimizer.warmup_steps = 2
    experiment.training.steps = 6
    experiment.training.batch_size = 2
    experiment.training.evaluate_every = 3
    experiment.training.checkpoint_every = 2
    experiment.training.loss_chunk_tokens = 16
    return experiment
