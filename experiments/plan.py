r"""Shows what an expansion would make, without touching weights.

python -m experiments.plan --config=configs/llama3.py:8b_shape
--picture=FILE.png draws it.
"""

from pathlib import Path

from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.manifest import Manifest, manifest_of
from opt_deus_jax.checkpoints.opening import open_checkpoint, read_config_only
from opt_deus_jax.models.accounting import count_costs
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.reporting.layout_picture import draw_layout
from opt_deus_jax.reporting.plots import save
from opt_deus_jax.reporting.tables import costs_table, layer_table, show
from opt_deus_jax.training.segments import select_trained
from opt_deus_jax.upscaling.forecast import forecast, forecast_line, stored_itemsize
from opt_deus_jax.upscaling.methods import layer_parents, plan_layers, resolve_method

_PICTURE = flags.DEFINE_string("picture", "", "PNG to draw the layout to; empty draws none.")
launch.define_flags(needs_workdir=False, others=("picture",))


def _manifest_of_base(base: str) -> Manifest | None:
    path = Path(base).expanduser()
    has_no_weights = path.is_dir() and not list(path.glob("*.safetensors"))
    return None if path.suffix == ".json" or has_no_weights else manifest_of(open_checkpoint(base))


def main() -> None:
    """Prints the depth layout and the costs."""
    experiment = launch.experiment_from_flags()
    hf_config, model = read_config_only(experiment.base)
    method = resolve_method(experiment.upscale)
    upscale = experiment.upscale
    grown_before = _manifest_of_base(experiment.base) if upscale.method == "base" else None
    layers = plan_layers(upscale, model.num_layers, grown_before)
    grown = read_model_config(grown_hf_config(hf_config, layer_parents(method, layers)))
    trained = select_trained(grown, [layer.is_new for layer in layers], method.trained)
    costs = count_costs(
        grown,
        trained.outer,
        trained.blocks,
        sequence_length=experiment.data.sequence_length,
        frozen_bytes=4 if experiment.training.frozen_dtype == "float32" else 2,
        remat=experiment.training.remat,
        experts=experiment.training.experts,
    )
    name = Path(experiment.base).stem if experiment.base.endswith(".json") else experiment.base
    show(
        layer_table(
            layers,
            trained.blocks,
            grown.layer_kinds,
            f"{name}: {model.num_layers} -> {len(layers)} layers, {upscale.method}, "
            f"layout {method.layout}",
        ),
        costs_table(costs, f"Costs at {experiment.data.sequence_length} tokens a sequence"),
        forecast_line(
            forecast(model, upscale, method, layers, stored_itemsize(hf_config)),
            experiment.max_shard_bytes,
        ),
    )
    if _PICTURE.value:
        figure = draw_layout(
            Path(name).name.removesuffix(".gguf"), layers, list(map(bool, trained.blocks)), method
        )
        save(figure, Path(_PICTURE.value).expanduser())
        show(f"picture: {_PICTURE.value}")


if __name__ == "__main__":
    launch.run(main)
