"""Peak FLOP/s of the devices that JAX names."""

import pytest

from imagen_jax.parallel.peaks import peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_datasheets(kind, peak):
    assert peak_flops(kind) == peak
