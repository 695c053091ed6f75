"""Llama 3 grown as published (arXiv 2508.08011).

Variants are SIZE, SIZE_shape, SIZE_DEVICE or SIZE_shape_DEVICE:
    1b        Llama-3.2-1B, 16 -> 24 layers, 1,722,386,432 parameters
    8b        Llama-3.1-8B, 32 -> 48 layers, 11,520,053,248 parameters
    shape     the same without weights: the config.json shipped here is all that `plan` and
              `compile_ahead` need
    v5e, v5p, v6e, gpu    attention, rematerialisation and mesh for a TPU slice or 8 x H100 or H200;
              without one of them anything from one CPU up, slowly

The weights come from the hub (gated repositories: accept the licence there, then log in with
huggingface_hub), or from --config.base=FOLDER.

    python -m experiments.plan --config=configs/llama3.py:8b_shape
    python -m experiments.compile_ahead --config=configs/llama3.py:8b_shape_v5p --topology=v5p:2x4x4

What `compile_ahead` states of a chip for 64 x 2048 tokens a step (libtpu 0.0.42; the whole of it in
experiments/results/compile_ahead_*.json): memory, and the least time that products, memory traffic
and network allow a step.

    variant   slice      memory used       products   memory   network
    1b_v5e    v5e:4x4    10.2 of 16.9 GB   321 ms     141 ms    31 ms
    8b_v5p    v5p:2x4x4  17.3 of 102.8 GB  422 ms     103 ms    70 ms
    8b_v6e    v6e:8x8    18.9 of 33.6 GB   106 ms     114 ms    98 ms

On 8 x H100 or H200 nothing was run. From `opt_deus_jax.models.accounting`: parameters, gradients
and moments take 9.0 GB a GPU with 8b_gpu and 1.3 GB with 1b_gpu; what `block` keeps of 8 sequences
takes 2.1 GB and 0.5 GB, where `matmuls` would keep 49 GB and 13 GB; the products of a step take at
least 977 ms and 157 ms at 989.5 TFLOP/s.
"""

import dataclasses
from pathlib import Path

from opt_deus_jax.config import Experiment, MeshConfig
from opt_deus_jax.errors import UserError

_HUB_IDS = {"1b": "meta-llama/Llama-3.2-1B", "8b": "meta-llama/Llama-3.1-8B"}
_SHAPES = {"1b": "llama3_2_1b.json", "8b": "llama3_1_8b.json"}
_NEW_LAYERS = {"1b": 8, "8b": 16}
# Attention, remat and mesh. On a v6e slice of 8 x 8 a mesh of two axes lets XLA scatter the sums of
# gradients; over one axis of 64 it makes every chip receive them whole.
_DEVICES = {
    "v5e": ("splash", "matmuls", MeshConfig()),
    "v5p": ("splash", "matmuls", MeshConfig()),
    "v6e": ("splash", "matmuls", MeshConfig(data=-1, fsdp=8)),
    "gpu": ("cudnn", "block", MeshConfig()),
}


def get_config(variant: str = "") -> Experiment:
    """Returns the experiment of a variant."""
    size, *suffixes = variant.split("_")
    device = suffixes[-1] if suffixes and suffixes[-1] in _DEVICES else ""
    is_shape = suffixes[:1] == ["shape"]
    if size not in _HUB_IDS or suffixes != ["shape"] * is_shape + [device] * bool(device):
        raise UserError(
            f"configs/llama3.py: unknown variant {variant!r}; use 1b, 8b, 1b_shape or 8b_shape, "
            f"alone or followed by _{', _'.join(_DEVICES)}"
        )
    experiment = Experiment(base=_HUB_IDS[size])
    if is_shape:
        experiment.base = str(Path(__file__).with_name(_SHAPES[size]))
    experiment.upscale.num_new_layers = _NEW_LAYERS[size]
    # 1.5B tokens in 12,100 steps of 64 x 2048; the authors did not publish the learning rate.
    experiment.training.steps = 12_100
    experiment.training.batch_size = 64
    experiment.training.compute_dtype = "bfloat16"
    experiment.training.frozen_dtype = "bfloat16"
    experiment.training.remat = "block"
    experiment.training.evaluate_every = 1_210
    experiment.training.checkpoint_every = 500
    experiment.optimizer.warmup_steps = 121
    if device:
        training = experiment.training
        training.attention, training.remat, mesh = _DEVICES[device]
        experiment.mesh = dataclasses.replace(mesh)
    return experiment
