"""LESA: new layers guessed by small networks that learned what lies between two layers.

Source: Yang et al. 2025, *LESA: Learnable LLM Layer Scaling-Up*, arXiv 2502.13794. What the paper
leaves open (AdamW's decay, the norms in the loss, the order of samples, the first weights) is taken
from the authors' notebooks train_LESA.ipynb and load_LESA.ipynb. Not theirs: the factorisation with
one layer in memory, the seeds, and the mean of the parents' vectors.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import ParamSpec, block_specs, identity_values
from opt_deus_jax.upscaling.lesa_factors import (
    Factors,
    coordinates_of,
    factor_kernels,
    kernel_of,
)
from opt_deus_jax.upscaling.lesa_predictor import (
    EPOCHS,
    Params,
    Window,
    predict_rows,
    train_predictor,
)
from opt_deus_jax.upscaling.new_block import Block

MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
_FIELD = "config field upscale.method='lesa'"
ReadKernel = Callable[[int], np.ndarray]
_predict = jax.jit(predict_rows)


@dataclasses.dataclass(frozen=True)
class PredictorReport:
    """What was learned of one matrix, on the rows that it was learned from.

    Attributes:
        name: Of the matrix.
        rank: Singular directions.
        condition: The strongest over the weakest of them.
        samples: Rows learned from.
        loss: Of the network after training, a mean over batches.
        mean_loss: The same of the mean of the neighbours as prediction.
        error: Norm of what the network misses over that of the rows; 1 would be to predict zeros.
        mean_error: The same of the mean of the neighbours.
    """

    name: str
    rank: int
    condition: float
    samples: int
    loss: float
    mean_loss: float
    error: float
    mean_error: float


@dataclasses.dataclass(frozen=True)
class LearnedMatrix:
    """What predicts one matrix.

    Attributes:
        factors: The coordinates in which it is predicted.
        params: The network.
        report: How well it fits.
    """

    factors: Factors
    params: Params
    report: PredictorReport


@dataclasses.dataclass(frozen=True)
class Lesa:
    """What predicts a block.

    Attributes:
        matrices: By the names of `MATRICES`; those that will be zeros are not there.
        vectors: Norms and biases of every new layer, by name; empty for the parents' mean.
    """

    matrices: Mapping[str, LearnedMatrix]
    vectors: Block

    @property
    def reports(self) -> tuple[PredictorReport, ...]:
        """One a matrix."""
        return tuple(matrix.report for matrix in self.matrices.values())


def check_predictable(specs: Mapping[str, ParamSpec], num_layers: int) -> None:
    """Refuses a base whose layers cannot be learned from.

    Args:
        specs: The parameters of one of its blocks.
        num_layers: Its depth.

    Raises:
        UserError: A kernel is none of `MATRICES`, or there is no layer between two others.
    """
    known = {f"{name}_kernel" for name in MATRICES}
    unknown = [name for name, spec in specs.items() if len(spec.shape) > 1 and name not in known]
    if unknown:
        raise UserError(
            f"{_FIELD}: predicts {', '.join(MATRICES)}, this base also has {unknown[0]} (a mixture "
            "of experts?); use another method"
        )
    if num_layers < 3:
        raise UserError(
            f"{_FIELD}: learns from layers between two others, this base has {num_layers} layers; "
            "use another method"
        )


def _windows(num_layers: int, left_out: int | None) -> list[Window]:
    """Three consecutive layers, without the one left out; as places among those that are left."""
    places = {layer: i for i, layer in enumerate(k for k in range(num_layers) if k != left_out)}
    consecutive = ((i - 1, i, i + 1) for i in range(1, num_layers - 1))
    kept = [window for window in consecutive if left_out not in window]
    return [(places[below], places[middle], places[above]) for below, middle, above in kept]


def _spill(
    path: Path, read: ReadKernel, layers: Sequence[int], factors: Factors
) -> Float[np.ndarray, "l k i"]:
    """Writes the coordinates of all layers to a file, and maps it: they are as large as the base's.

    Written by calls that fail on a full disk; through a map that would be a signal.
    """
    width = 0
    try:
        with path.open("wb") as file:
            for layer in layers:
                coordinates_KI = coordinates_of(factors, read(layer))
                width = coordinates_KI.shape[1]
                file.write(np.ascontiguousarray(coordinates_KI).data)
    except OSError as error:
        raise UserError(
            f"{_FIELD}: {path.parent} cannot hold the coordinates of {len(layers)} layers "
            f"({error.strerror}); set TMPDIR to a folder with more room"
        ) from None
    shape = (len(layers), len(factors.singular_values_K), width)
    return np.memmap(path, np.float32, "r", shape=shape)


def learn_matrix(
    read: ReadKernel,
    num_layers: int,
    *,
    name: str,
    seed: int,
    left_out: int | None = None,
    on_epoch: Callable[[], object] = lambda: None,
) -> LearnedMatrix:
    """Factors one matrix over all layers and trains its predictor.

    In memory are one layer's kernel, the Gram matrix, the factors and some batches; coordinates lie
    in a temporary file, as large as the matrix over all layers in float32. Depends on nothing but
    its arguments: the same again gives the same, whatever else was learned before.

    Args:
        read: Gives the kernel [out, in] of a layer.
        num_layers: Depth of the base.
        name: Of `MATRICES`.
        seed: Of first weights and order; each matrix makes its own of it.
        left_out: A layer that neither the factors nor the predictor may see.
        on_epoch: Called after each epoch of training.

    Returns:
        What predicts the matrix.

    Raises:
        UserError: The kernels are zero throughout, no three layers are left, or the disk is full.
    """
    windows = _windows(num_layers, left_out)
    if not windows:
        raise UserError(
            f"{_FIELD}: without layer {left_out} no three consecutive layers of {num_layers} are "
            "left to learn from; leave out another"
        )
    layers = [layer for layer in range(num_layers) if layer != left_out]
    factors = factor_kernels(read, layers, name)
    key = jax.random.fold_in(jax.random.key(seed), MATRICES.index(name))
    with tempfile.TemporaryDirectory(prefix="lesa_") as folder:
        coordinates_LKI = _spill(Path(folder) / name, read, layers, factors)
        params, fit, mean_fit = train_predictor(coordinates_LKI, windows, key, on_epoch)
        del coordinates_LKI
    values = factors.singular_values_K
    report = PredictorReport(
        name=name,
        rank=len(values),
        condition=float(values[0] / values[-1]),
        samples=len(windows) * len(values),
        loss=fit.loss,
        mean_loss=mean_fit.loss,
        error=fit.error,
        mean_error=mean_fit.error,
    )
    return LearnedMatrix(factors, params, report)


def learn_block(
    read: Callable[[str], np.ndarray],
    config: ModelConfig,
    *,
    zero_init: bool,
    norms: str,
    seed: int,
) -> Lesa:
    """Trains a predictor for every matrix of a block, with a progress bar that names it.

    Args:
        read: Gives a tensor of the base by its Hugging Face name.
        config: The base.
        zero_init: Leaves out matrices that will be zeros.
        norms: `mean` or `reference`, as `upscale.lesa_norms`.
        seed: As for `learn_matrix`.

    Returns:
        What `predict_block` takes.

    Raises:
        UserError: As `check_predictable` and `learn_matrix`.
    """
    specs = block_specs(config)
    check_predictable(specs, config.num_layers)
    zeroed = identity_values(config) if zero_init else {}
    matrices: dict[str, LearnedMatrix] = {}
    with tqdm(unit="epoch", disable=None, leave=False) as bar:
        names = [name for name in MATRICES if f"{name}_kernel" not in zeroed]
        bar.reset(EPOCHS * len(names))
        for name in names:
            bar.set_description(f"learn {name}")
            hf_name = specs[f"{name}_kernel"].hf_name

            def read_layer(layer: int, hf_name: str = hf_name) -> np.ndarray:
                return read(hf_name.format(layer=layer))

            matrices[name] = learn_matrix(
                read_layer, config.num_layers, name=name, seed=seed, on_epoch=bar.update
            )
    vectors: dict[str, np.ndarray] = {}
    if norms == "reference":
        vectors = {
            name: read(spec.hf_name.format(layer=0)).astype(np.float32)
            for name, spec in specs.items()
            if len(spec.shape) == 1
        }
    return Lesa(matrices, vectors)


def predict_matrix(
    learned: LearnedMatrix,
    previous_OI: Float[np.ndarray, "o i"],
    next_OI: Float[np.ndarray, "o i"],
) -> Float[np.ndarray, "o i"]:
    """The kernel between two: U S MLP([V_A, V_B]).

    Args:
        learned: From `learn_matrix`.
        previous_OI: A's kernel.
        next_OI: B's kernel.

    Returns:
        float32.
    """
    neighbours = map(functools.partial(coordinates_of, learned.factors), (previous_OI, next_OI))
    predicted_KI = _predict(learned.params, jnp.asarray(np.concatenate([*neighbours], axis=1)))
    return kernel_of(learned.factors, np.asarray(predicted_KI))


def predict_block(lesa: Lesa, previous: Block, next_: Block) -> dict[str, np.ndarray]:
    """Predicts every matrix; norms and biases are the parents' mean, or as the authors leave them.

    Their notebook puts the predicted matrices into copies of layer 0, which keep its norms.

    Args:
        lesa: From `learn_block`.
        previous: Parent A, float32 arrays by the names of `block_specs`.
        next_: Parent B, likewise; A again after the last layer.

    Returns:
        The new block, without matrices that will be zeros.
    """
    block: dict[str, np.ndarray] = {}
    for name in previous:
        matrix = name.removesuffix("_kernel")
        if matrix in lesa.matrices:
            block[name] = predict_matrix(lesa.matrices[matrix], previous[name], next_[name])
        elif name in lesa.vectors:
            block[name] = lesa.vectors[name]
        elif previous[name].ndim == 1:
            block[name] = (previous[name] + next_[name]) / 2
    return block
