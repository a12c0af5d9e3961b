"""FID's InceptionV3 in torch, written from the published graph, as an independent reference.

    python -m tests.reference.fid_inception tests/golden/inception.npz

Writes features of random images with random weights. The weights are seeded by their names, so no
file stores the 24 million numbers.
"""

from __future__ import annotations

import sys
import zlib

import numpy as np

SMALL = 107  # Side of the golden images, pixels; odd, like the layers' sizes for 299.


def conv_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Convolution name -> (outputs, inputs, height, width)."""
    shapes: dict[str, tuple[int, int, int, int]] = {}

    def add(name, outputs, inputs, height, width):
        shapes[name] = (outputs, inputs, height, width)

    add("Conv2d_1a_3x3", 32, 3, 3, 3)
    add("Conv2d_2a_3x3", 32, 32, 3, 3)
    add("Conv2d_2b_3x3", 64, 32, 3, 3)
    add("Conv2d_3b_1x1", 80, 64, 1, 1)
    add("Conv2d_4a_3x3", 192, 80, 3, 3)
    for block, inputs, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        m = f"Mixed_{block}."
        add(m + "branch1x1", 64, inputs, 1, 1)
        add(m + "branch5x5_1", 48, inputs, 1, 1)
        add(m + "branch5x5_2", 64, 48, 5, 5)
        add(m + "branch3x3dbl_1", 64, inputs, 1, 1)
        add(m + "branch3x3dbl_2", 96, 64, 3, 3)
        add(m + "branch3x3dbl_3", 96, 96, 3, 3)
        add(m + "branch_pool", pool, inputs, 1, 1)
    add("Mixed_6a.branch3x3", 384, 288, 3, 3)
    add("Mixed_6a.branch3x3dbl_1", 64, 288, 1, 1)
    add("Mixed_6a.branch3x3dbl_2", 96, 64, 3, 3)
    add("Mixed_6a.branch3x3dbl_3", 96, 96, 3, 3)
    for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        m = f"Mixed_{block}."
        add(m + "branch1x1", 192, 768, 1, 1)
        add(m + "branch7x7_1", c, 768, 1, 1)
        add(m + "branch7x7_2", c, c, 1, 7)
        add(m + "branch7x7_3", 192, c, 7, 1)
        add(m + "branch7x7dbl_1", c, 768, 1, 1)
        add(m + "branch7x7dbl_2", c, c, 7, 1)
        add(m + "branch7x7dbl_3", c, c, 1, 7)
        add(m + "branch7x7dbl_4", c, c, 7, 1)
        add(m + "branch7x7dbl_5", 192, c, 1, 7)
        add(m + "branch_pool", 192, 768, 1, 1)
    add("Mixed_7a.branch3x3_1", 192, 768, 1, 1)
    add("Mixed_7a.branch3x3_2", 320, 192, 3, 3)
    add("Mixed_7a.branch7x7x3_1", 192, 768, 1, 1)
    add("Mixed_7a.branch7x7x3_2", 192, 192, 1, 7)
    add("Mixed_7a.branch7x7x3_3", 192, 192, 7, 1)
    add("Mixed_7a.branch7x7x3_4", 192, 192, 3, 3)
    for block, inputs in (("7b", 1280), ("7c", 2048)):
        m = f"Mixed_{block}."
        add(m + "branch1x1", 320, inputs, 1, 1)
        add(m + "branch3x3_1", 384, inputs, 1, 1)
        add(m + "branch3x3_2a", 384, 384, 1, 3)
        add(m + "branch3x3_2b", 384, 384, 3, 1)
        add(m + "branch3x3dbl_1", 448, inputs, 1, 1)
        add(m + "branch3x3dbl_2", 384, 448, 3, 3)
        add(m + "branch3x3dbl_3a", 384, 384, 1, 3)
        add(m + "branch3x3dbl_3b", 384, 384, 3, 1)
        add(m + "branch_pool", 192, inputs, 1, 1)
    return shapes


def random_weights() -> dict[str, np.ndarray]:
    """A state_dict with torch's names; activations keep their scale, and no value is 0."""
    arrays = {}

    def normal(name, shape):
        return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)

    for name, shape in conv_shapes().items():
        fan_in = np.prod(shape[1:])
        arrays[f"{name}.conv.weight"] = normal(f"{name}.conv", shape) * np.sqrt(2 / fan_in)
        outputs = shape[:1]
        arrays[f"{name}.bn.weight"] = 1 + 0.1 * normal(f"{name}.scale", outputs)
        arrays[f"{name}.bn.bias"] = 0.2 * normal(f"{name}.bias", outputs)
        arrays[f"{name}.bn.running_mean"] = 0.2 * normal(f"{name}.mean", outputs)
        arrays[f"{name}.bn.running_var"] = np.exp(0.1 * normal(f"{name}.variance", outputs))
    arrays["fc.weight"] = normal("fc.weight", (1008, 2048)) * 0.02
    arrays["fc.bias"] = normal("fc.bias", (1008,)) * 0.02
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def random_images(size: int, count: int = 2) -> np.ndarray:
    """Float32 images [N, H, W, C] in [-1, 1], a ramp plus noise."""
    rng = np.random.default_rng(size)
    ramps = np.linspace(-1, 1, size)[:, None, None] * rng.uniform(-0.5, 0.5, (count, 1, size, 3))
    return (ramps + rng.uniform(-0.5, 0.5, (count, size, size, 3))).astype(np.float32)


def features(state: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The 2048 features of the last pool, computed by torch."""
    import torch
    from torch.nn import functional as F

    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}

    def conv(x, name, stride=1, pad=None):
        kernel = tensors[f"{name}.conv.weight"]
        if pad is None:
            pad = (kernel.shape[2] // 2, kernel.shape[3] // 2)
        x = F.conv2d(x, kernel, stride=stride, padding=pad)
        norm = [
            tensors[f"{name}.bn.{p}"] for p in ("running_mean", "running_var", "weight", "bias")
        ]
        return F.relu(F.batch_norm(x, *norm, training=False, eps=0.001))

    def chain(x, name, count):
        for i in range(1, count + 1):
            x = conv(x, f"{name}_{i}")
        return x

    def average(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def a(x, m):
        return [
            conv(x, m + "branch1x1"),
            chain(x, m + "branch5x5", 2),
            chain(x, m + "branch3x3dbl", 3),
            conv(average(x), m + "branch_pool"),
        ]

    def b(x, m):
        double = conv(chain(x, m + "branch3x3dbl", 2), m + "branch3x3dbl_3", 2, 0)
        return [conv(x, m + "branch3x3", 2, 0), double, F.max_pool2d(x, 3, 2)]

    def c(x, m):
        return [
            conv(x, m + "branch1x1"),
            chain(x, m + "branch7x7", 3),
            chain(x, m + "branch7x7dbl", 5),
            conv(average(x), m + "branch_pool"),
        ]

    def d(x, m):
        single = conv(conv(x, m + "branch3x3_1"), m + "branch3x3_2", 2, 0)
        seven = conv(chain(x, m + "branch7x7x3", 3), m + "branch7x7x3_4", 2, 0)
        return [single, seven, F.max_pool2d(x, 3, 2)]

    def e(x, m, pool):
        single, double = conv(x, m + "branch3x3_1"), chain(x, m + "branch3x3dbl", 2)
        return [
            conv(x, m + "branch1x1"),
            *(conv(single, m + f"branch3x3_2{half}") for half in "ab"),
            *(conv(double, m + f"branch3x3dbl_3{half}") for half in "ab"),
            conv(pool(x), m + "branch_pool"),
        ]

    def maximum(x):
        return F.max_pool2d(x, 3, stride=1, padding=1)

    with torch.no_grad():
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        x = conv(x, "Conv2d_1a_3x3", 2, 0)
        x = conv(conv(x, "Conv2d_2a_3x3", 1, 0), "Conv2d_2b_3x3")
        x = conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
        x = F.max_pool2d(conv(x, "Conv2d_4a_3x3", 1, 0), 3, 2)
        for block in ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a"]:
            kind = {"5": a, "6": b if block == "6a" else c, "7": d}[block[0]]
            x = torch.cat(kind(x, f"Mixed_{block}."), 1)
        x = torch.cat(e(x, "Mixed_7b.", average), 1)
        x = torch.cat(e(x, "Mixed_7c.", maximum), 1)
        return x.mean((2, 3)).numpy()


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], features=features(random_weights(), random_images(SMALL)))
