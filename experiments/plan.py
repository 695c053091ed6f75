r"""Shows what an expansion would make, without touching weights.

python -m experiments.plan --config=configs/llama3.py:8b_shape
"""

from pathlib import Path

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.opening import read_config_only
from opt_deus_jax.models.accounting import count_costs
from opt_deus_jax.reporting.tables import costs_table, layer_table, show
from opt_deus_jax.upscaling.layout import plan_layout
from opt_deus_jax.upscaling.methods import resolve_method

launch.define_flags(needs_workdir=False)


def main() -> None:
    """Prints the depth layout and the costs."""
    experiment = launch.experiment_from_flags()
    _, model = read_config_only(experiment.base)
    method = resolve_method(experiment.upscale)
    upscale = experiment.upscale
    layers = plan_layout(method.layout, model.num_layers, upscale.num_new_layers, upscale.gaps)
    train_all = method.trained == "all"
    is_trained = [train_all or layer.is_new for layer in layers]
    costs = count_costs(
        model,
        is_trained,
        outer_trained=train_all,
        sequence_length=experiment.data.sequence_length,
        frozen_bytes=4 if experiment.training.frozen_dtype == "float32" else 2,
    )
    name = Path(experiment.base).stem if experiment.base.endswith(".json") else experiment.base
    show(
        layer_table(
            layers,
            is_trained,
            f"{name}: {model.num_layers} -> {len(layers)} layers, {upscale.method}, "
            f"layout {method.layout}",
        ),
        costs_table(costs, f"Costs at {experiment.data.sequence_length} tokens a sequence"),
    )


if __name__ == "__main__":
    launch.run(main)
