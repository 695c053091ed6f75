"""Takes optimizer steps for batches that come on the standard input; see benchmark_train.

Trains the new layers of WORKDIR/expanded with the experiment's optimizer and training settings.
"""

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.manifest import read_manifest
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.reporting.turns import serve_turns
from opt_deus_jax.training.segments import select_trained
from opt_deus_jax.training.timing import prepare_step

launch.define_flags()


def main() -> None:
    """Loads the model and serves."""
    experiment, workdir = launch.start(("base", "upscale", "data"))
    source = open_checkpoint(str(workdir / "expanded"))
    is_new = read_manifest(workdir / "expanded").is_new
    config = read_model_config(source.hf_config, source.name)
    serve_turns(prepare_step(experiment, source, select_trained(config, is_new, "new")))


if __name__ == "__main__":
    launch.run(main)
