r"""Grows a base checkpoint and proves what the grown model computes.

python -m experiments.expand --config=configs/smollm2_135m.py --workdir=runs/first
Writes WORKDIR/expanded: a Hugging Face folder with its manifest and a picture of the transport.
Killed at any moment and started again, it goes on, and ends in the same bytes.
"""

import tqdm

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.journal import is_finished
from opt_deus_jax.checkpoints.manifest import manifest_of
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.reporting.plots import PICTURE, plot_diagnostics
from opt_deus_jax.reporting.tables import (
    diagnostics_table,
    forecast_line,
    identity_line,
    predictor_table,
    show,
)
from opt_deus_jax.training.segments import select_trained
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.forecast import check_memory, forecast, measure_speed
from opt_deus_jax.upscaling.layout import LayerOrigin
from opt_deus_jax.upscaling.methods import layer_parents, plan_layers, resolve_method
from opt_deus_jax.upscaling.probe import probe_tokens

launch.define_flags()


def main() -> None:
    """Expands, proves, reports."""
    experiment, workdir = launch.start(("base", "upscale"))
    directory = workdir / "expanded"
    if is_finished(directory):
        show(f"{directory} exists and was made with this config; nothing to do")
        return
    source = open_checkpoint(experiment.base)
    model = read_model_config(source.hf_config)
    upscale = experiment.upscale
    grown_before = manifest_of(source) if upscale.method == "base" else None
    layers = plan_layers(upscale, model.num_layers, grown_before)
    # What cannot be trained is better known before the work than after it.
    method = resolve_method(upscale)
    grown = read_model_config(grown_hf_config(source.hf_config, layer_parents(method, layers)))
    select_trained(grown, [layer.is_new for layer in layers], method.trained)
    itemsize = max(info.dtype.itemsize for info in source.tensors.values())
    expected = forecast(model, upscale, method, layers, itemsize)
    show(forecast_line(expected, measure_speed(), experiment.max_shard_bytes))
    check_memory(expected, upscale)
    probe_BT = probe_tokens(source)
    with tqdm.tqdm(total=len(layers), desc="expand", unit="layer") as bar:

        def on_layer(origin: LayerOrigin) -> None:
            bar.set_postfix_str(f"depth {origin.depth}")
            bar.update()

        expansion = expand_checkpoint(
            source,
            upscale,
            directory,
            probe_BT=probe_BT,
            max_shard_bytes=experiment.max_shard_bytes,
            on_layer=on_layer,
            draw=plot_diagnostics,
            say=tqdm.tqdm.write,
        )
    if (directory / PICTURE).exists():
        show(diagnostics_table(expansion.reports), f"picture: {directory / PICTURE}")
    if expansion.predictors:
        show(predictor_table(expansion.predictors))
    show(identity_line(expansion.identity), f"grown model: {directory}")


if __name__ == "__main__":
    launch.run(main)
