"""LoRAs of IF's U-Nets in float64 and float32, here and in diffusers: the same function.

    python -m tests.reference.if_lora_precision  # needs torch, diffusers and peft

For updates of two sizes relative to their kernels: the largest difference of the outputs in
float64, in float32, and of diffusers from itself in the two.
"""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from tests.reference.if_precision import DTYPES, use_float64

SIZES = (0.3, 1.0)
# Powers of two: the scale is then exact in float32.
RANK, ALPHA = 2, 4


def outputs(case: str, size: float, dtype: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The outputs of both sides with one LoRA."""
    import jax
    import jax.numpy as jnp
    import torch
    from peft import LoraConfig

    from imagen_jax.diffusion.process import cosine_steps
    from imagen_jax.interop import if_lora, if_unet
    from imagen_jax.models.unet import UNet
    from imagen_jax.stages.lora import Factors, with_adapters
    from tests.interop.test_if_unet import GOLDEN, write
    from tests.reference import if_lora as reference

    unet = reference.network(case)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": reference.targets(case)}
    unet.add_adapter(LoraConfig(**settings))
    reference.fill(unet, size)
    unet.save_lora_adapter(folder / "lora")
    theirs = reference.output(unet.to(getattr(torch, dtype)), case, dtype)

    config, params = if_unet.load(write(case, folder / "unet"))
    cast = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)  # noqa: E731
    adapter = if_lora.read(folder / "lora", config)
    adapter = {path: Factors(*cast(pair)) for path, pair in adapter.items()}
    params = with_adapters(cast(params), [(adapter, 1.0)])
    golden = np.load(GOLDEN / case / "golden.npz")
    logsnr = cosine_steps().astype(dtype)
    lowres = {"lowres_logsnr": logsnr[golden["class_labels"]]} if config.lowres else {}
    inputs = [golden["x"].transpose(0, 2, 3, 1).astype(dtype), logsnr[golden["t"]]]
    inputs += [golden["text"].astype(dtype), np.ones_like(golden["mask"])]
    apply = jax.jit(UNet(dataclasses.replace(config, dtype=dtype)).apply)
    with jax.default_matmul_precision("highest"):
        ours = apply({"params": params}, *inputs, **lowres)
    return {"ours": np.asarray(ours).transpose(0, 3, 1, 2), "theirs": theirs}


def generate(dtype: str, out: str) -> None:
    """Writes the outputs of one precision, SIDE/CASE/SIZE."""
    if dtype == "float64":
        use_float64()
    from tests.reference.if_unet import CASES

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            for size in SIZES:
                own = pathlib.Path(folder) / f"{case}_{size}"
                for side, output in outputs(case, size, dtype, own).items():
                    assert output.dtype == dtype
                    found[f"{side}/{case}/{size:g}"] = output
    np.savez(out, **found)


def compare() -> dict[str, dict[str, float]]:
    """CASE/SIZE -> largest differences: float64, float32, theirs (diffusers from itself)."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            command = [sys.executable, "-m", "tests.reference.if_lora_precision", dtype]
            out = f"{folder}/{dtype}.npz"
            subprocess.run([*command, out], check=True, cwd=pathlib.Path(__file__).parents[2])
            with np.load(out) as file:
                found[dtype] = dict(file)
    double, single = (found[dtype] for dtype in DTYPES)
    names = [name.removeprefix("ours/") for name in double if name.startswith("ours/")]
    pairs = {
        name: {
            "float64": double[f"ours/{name}"] - double[f"theirs/{name}"],
            "float32": single[f"ours/{name}"] - single[f"theirs/{name}"],
            "theirs": single[f"theirs/{name}"] - double[f"theirs/{name}"],
        }
        for name in names
    }
    return {
        name: {kind: float(np.abs(array).max()) for kind, array in row.items()}
        for name, row in pairs.items()
    }


def main() -> None:
    if sys.argv[1:]:
        generate(*sys.argv[1:])
        return
    print("| network, size of the updates | float64 | float32 | diffusers, float32 - float64 |")
    print("|---|---|---|---|")
    for name, row in compare().items():
        print(f"| {name} |", " | ".join(f"{value:.1e}" for value in row.values()), "|")


if __name__ == "__main__":
    main()
