"""What a device can do at most, by the name that JAX gives it."""

# FLOP/s of dense bfloat16 products of one JAX device; a longer name goes before its beginning.
# TPU: Google Cloud's pages of each version; a TPU7x chip is two devices. GPU: NVIDIA's data sheets,
# without sparsity.
_PEAK_FLOPS = (
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989.5e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989.5e12),
    ("NVIDIA B200", 2250e12),
)


def peak_flops(device_kind: str) -> float | None:
    """The most that a device can compute.

    Args:
        device_kind: As `jax.Device.device_kind`.

    Returns:
        FLOP/s of dense bfloat16 matrix products; None for a CPU or an unknown device.
    """
    return next((flops for kind, flops in _PEAK_FLOPS if device_kind.startswith(kind)), None)
