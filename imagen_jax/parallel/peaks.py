"""Peak FLOP/s of accelerators by JAX's name of the device, for MFU (training, planning)."""

# Dense bfloat16 peak of one device by `device_kind`, FLOP/s, from the makers' datasheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # A device is one of the chip's two TensorCores.
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device, FLOP/s; None for an unknown device.

    JAX names GPUs by their full product name, so the longest matching prefix decides.
    """
    known = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None
