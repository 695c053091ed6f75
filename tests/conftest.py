"""Eight fake CPU devices; implicit rank promotion is an error."""

import os

# transformers warns about a missing torchvision or accelerate only through logging.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile much and compute little.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
