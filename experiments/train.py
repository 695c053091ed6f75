r"""Trains a grown model: continual pre-training or fine-tuning, on one device or many.

python -m experiments.train --config=configs/smollm2_135m.py:demo --workdir=runs/first
Needs experiments.expand and experiments.prepare_data with the same flags. Run again after an
interruption, on any devices and processes, it goes on from the latest checkpoint. SIGTERM saves one
and exits with status 143. Writes WORKDIR/checkpoints, metrics.jsonl, tensorboard and loss.png.
"""

import hashlib
from pathlib import Path

import jax
from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.manifest import FILE_NAME, read_manifest
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.data.records import load_info, load_records
from opt_deus_jax.distributed import processes
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.reporting.plots import plot_losses
from opt_deus_jax.reporting.tables import show
from opt_deus_jax.training.loop import TrainingResult, train
from opt_deus_jax.training.metrics import read_metrics
from opt_deus_jax.training.segments import select_trained

_PROFILE = flags.DEFINE_integer(
    "profile", 0, "Step from which on 3 steps are traced for xprof, into WORKDIR/profile; 0: none."
)
launch.define_flags(others=(_PROFILE.name, *processes.key_flags()))


def main() -> None:
    """Trains and draws the losses."""
    processes.start_processes()
    is_writer = jax.process_index() == 0
    changing = ("optimizer", "mesh", "training")
    experiment, workdir = launch.start(("base", "upscale", "data"), changing, is_writer=is_writer)
    manifest = read_manifest(expanded := workdir / "expanded")
    splits = load_info(workdir / "records").splits
    records = {name: load_records(workdir / "records", name, verify=True) for name in splits}
    source = open_checkpoint(str(expanded))
    config = read_model_config(source.hf_config, source.name)
    fingerprints = {f"{name} records": split.sha256 for name, split in splits.items()}
    fingerprints["grown model"] = hashlib.sha256((expanded / FILE_NAME).read_bytes()).hexdigest()
    result = train(
        experiment,
        source,
        trained=select_trained(config, manifest.is_new, manifest.trained),
        train_records=records["train"],
        held_out_records=records["held_out"],
        workdir=workdir,
        fingerprints=fingerprints,
        devices=jax.devices(),
        profiled_steps=range(_PROFILE.value, _PROFILE.value + 3 * bool(_PROFILE.value)),
    )
    if is_writer:
        report(workdir, result)


def report(workdir: Path, result: TrainingResult) -> None:
    """Draws the losses and says what they did."""
    picture = workdir / "loss.png"
    plot_losses(picture, read_metrics(workdir / "metrics.jsonl"), result.held_out_losses)
    (_, before), *_, (_, after) = result.held_out_losses
    show(
        f"held-out loss: {before:.4f} before, {after:.4f} nats a token after {result.last_step} "
        f"steps ({after - before:+.4f}); picture: {picture}",
    )


if __name__ == "__main__":
    launch.run(main)
