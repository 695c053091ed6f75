r"""Measures whether LESA's predictor finds a layer again that it has not seen.

python -m experiments.benchmark_lesa --config=configs/smollm2_135m.py \
    --result=experiments/results/benchmark_lesa.json
For each of --layers, factors and predictors are learned from the base without that layer, and the
layer is predicted from its two neighbours. The table holds, per matrix, the norm of what is missed
over the norm of the true matrix (0: found, 1: no better than zeros) for the prediction, for the
mean of the neighbours and for a copy of the next layer, and the cosine of prediction and truth.
--result is written after every matrix.
"""

import shlex
import sys
from pathlib import Path

import numpy as np
import tqdm
from absl import flags

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.manifest import software_versions
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import block_specs
from opt_deus_jax.reporting.tables import records_table, show
from opt_deus_jax.upscaling import lesa
from opt_deus_jax.whole_files import write_json

launch.define_flags(needs_workdir=False)
_LAYERS = flags.DEFINE_list("layers", ["7", "15", "23"], "Base layers to leave out, one by one.")
_RESULT = flags.DEFINE_string("result", None, "The JSON file to write.", required=True)


def _leave_out(read: lesa.ReadKernel, num_layers: int, name: str, layer: int, seed: int) -> dict:
    learned = lesa.learn_matrix(read, num_layers, name=name, seed=seed, left_out=layer)
    below, true, above = (read(layer + i).astype(np.float32) for i in (-1, 0, 1))
    guesses = {"predicted": lesa.predict_matrix(learned, below, above)}
    guesses |= {"mean": (below + above) / 2, "copy_next": above}
    size = np.linalg.norm(true)
    errors = {key: float(np.linalg.norm(guess - true) / size) for key, guess in guesses.items()}
    predicted = guesses["predicted"]
    cosine = float(np.vdot(predicted, true) / (np.linalg.norm(predicted) * size))
    row = {"layer": layer, "matrix": name, **errors, "cosine": cosine}
    return {**row, "training_error": learned.report.error}


def main() -> None:
    """Leaves out one layer after another."""
    experiment = launch.experiment_from_flags()
    source = open_checkpoint(experiment.base)
    config = read_model_config(source.hf_config)
    specs = block_specs(config)
    lesa.check_predictable(specs, config.num_layers)
    try:
        layers = [int(text) for text in _LAYERS.value]
    except ValueError:
        layers = []
    if not layers or min(layers) < 1 or max(layers) > config.num_layers - 2:
        raise UserError(f"--layers: give numbers from 1 to {config.num_layers - 2}")
    rows = []
    result = {"command": shlex.join(["python", "-m", "experiments.benchmark_lesa", *sys.argv[1:]])}
    pairs = [(name, layer) for name in lesa.MATRICES for layer in layers]
    for name, layer in tqdm.tqdm(pairs, disable=None):
        hf_name = specs[f"{name}_kernel"].hf_name
        rows.append(
            _leave_out(
                lambda i, hf_name=hf_name: source.read(hf_name.format(layer=i)),
                *(config.num_layers, name, layer, experiment.upscale.seed),
            )
        )
        content = {**result, "matrices": rows, "versions": software_versions()}
        write_json(Path(_RESULT.value).expanduser(), content)
    show(records_table(rows, "Relative error of a layer that was left out"))


if __name__ == "__main__":
    launch.run(main)
