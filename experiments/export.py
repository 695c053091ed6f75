r"""Writes the trained model as a Hugging Face folder that transformers and vLLM load.

python -m experiments.export --config=configs/smollm2_135m.py:demo --workdir=runs/first
Takes a checkpoint of WORKDIR/checkpoints and writes WORKDIR/exported.
"""

from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.reporting.tables import show
from opt_deus_jax.training.export import export_checkpoint

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "latest", "`latest`, `best` (the lowest held-out loss) or a step."
)
launch.define_flags()


def main() -> None:
    """Exports one checkpoint."""
    experiment, workdir = launch.start(("base", "upscale"))
    export = export_checkpoint(
        open_checkpoint(str(workdir / "expanded")),
        workdir / "expanded",
        workdir / "checkpoints",
        _CHECKPOINT.value,
        workdir / "exported",
        max_shard_bytes=experiment.max_shard_bytes,
    )
    show(f"trained model of step {export.step}: {export.directory}")


if __name__ == "__main__":
    launch.run(main)
