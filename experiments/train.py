r"""Trains a grown model: continual pre-training or fine-tuning, on one device or many.

python -m experiments.train --config=configs/smollm2_135m.py:demo --workdir=runs/first
Needs experiments.expand and experiments.prepare_data with the same flags. Run again after an
interruption, on any number of devices and processes, it goes on from the latest checkpoint. Writes
WORKDIR/checkpoints, metrics.jsonl, tensorboard, loss.png and, with --profile, profile. SIGTERM
saves a checkpoint first and exits with status 143.
"""

import hashlib

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.manifest import FILE_NAME, read_manifest
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.data.records import load_info, load_records
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.reporting.plots import plot_losses
from opt_deus_jax.reporting.tables import show
from opt_deus_jax.training.loop import train
from opt_deus_jax.training.metrics import read_metrics
from opt_deus_jax.training.segments import select_trained

launch.define_flags()


def main() -> None:
    """Trains and draws the losses."""
    experiment, workdir = launch.start(("base", "upscale", "data"), ("optimizer", "training"))
    expanded = workdir / "expanded"
    manifest = read_manifest(expanded)
    info = load_info(workdir / "records")
    source = open_checkpoint(str(expanded))
    config = read_model_config(source.hf_config, source.name)
    result = train(
        experiment,
        source,
        trained=select_trained(config, manifest.is_new, manifest.trained),
        train_records=load_records(workdir / "records", "train", verify=True),
        held_out_records=load_records(workdir / "records", "held_out", verify=True),
        workdir=workdir,
        fingerprints={
            "grown model": hashlib.sha256((expanded / FILE_NAME).read_bytes()).hexdigest(),
            "training text": info.splits["train"].sha256,
            "held-out text": info.splits["held_out"].sha256,
        },
    )
    metrics = [row for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]
    held_out_steps, held_out_losses = zip(*result.held_out_losses, strict=True)
    plot_losses(
        workdir / "loss.png",
        steps=[int(row["step"]) for row in metrics],
        losses=[row["loss"] for row in metrics],
        held_out_steps=held_out_steps,
        held_out_losses=held_out_losses,
    )
    show(
        f"held-out loss: {held_out_losses[0]:.4f} before, {held_out_losses[-1]:.4f} nats a token "
        f"after {result.last_step} steps ({held_out_losses[-1] - held_out_losses[0]:+.4f})",
        f"picture: {workdir / 'loss.png'}",
    )


if __name__ == "__main__":
    launch.run(main)
