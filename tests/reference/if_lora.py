"""LoRAs of small U-Nets of IF, made by peft and run by diffusers: tests/golden/if_lora.

    python -m tests.reference.if_lora tests/golden/if_lora    # needs torch, diffusers and peft

The networks are those of `if_unet`. The values are seeded by their names; ranks and scales differ
between layers. `CASE/diffusers` and `CASE/peft` hold one LoRA in both formats.
"""

import json
import pathlib
import sys

import numpy as np

from tests.reference.if_unet import CASES, make_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "if_unet"
TARGETS = ["to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "to_out.0"]
RANK, ALPHA = 2, 3
PATTERNS = {"rank_pattern": {"to_q": 1}, "alpha_pattern": {"to_q": 4}}


def network(case: str):
    """The U-Net of a case as diffusers runs it."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**CASES[case]).eval()
    shapes = json.loads((GOLDEN / case / "shapes.json").read_text())
    arrays = make_weights(shapes)
    unet.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})
    return unet


def output(unet, case: str, dtype: str = "float32") -> np.ndarray:
    """Its output on the inputs of the golden file, [B, channels, h, w]."""
    import torch

    golden = np.load(GOLDEN / case / "golden.npz")
    x, text = (torch.from_numpy(golden[name].astype(dtype)) for name in ("x", "text"))
    t = torch.from_numpy(golden["t"])
    labels = torch.from_numpy(golden["class_labels"]) if "class_labels" in golden else None
    with torch.no_grad():
        return unet(x, t, text, class_labels=labels).sample.numpy()


def targets(case: str) -> list[str]:
    """The attention layers, and the convolutions of the base network's residual blocks."""
    return TARGETS + (["conv1"] if case == "base" else [])


def fill(unet, size: float = 0.3) -> None:
    """Seeds all factors, so that none is zero; an update is about size**2 of its kernel.

    Updates as large as their kernels amplify rounding in float32, `if_lora_precision`.
    """
    import torch

    factors = {n: p for n, p in unet.named_parameters() if ".lora_" in n}
    rng = np.random.default_rng(2)
    for name in sorted(factors):
        inputs = np.prod(factors[name].shape[1:])
        values = size * rng.normal(size=factors[name].shape) / inputs**0.5
        factors[name].data = torch.from_numpy(values.astype(np.float32))


def main() -> None:
    from peft import LoraConfig, get_peft_model

    for case in CASES:
        folder = pathlib.Path(sys.argv[1]) / case
        settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets(case), **PATTERNS)
        unet = network(case)
        unet.add_adapter(settings)
        fill(unet)
        unet.save_lora_adapter(folder / "diffusers")
        out = output(unet, case)
        wrapped = get_peft_model(network(case), settings)
        fill(wrapped)
        wrapped.save_pretrained(folder / "peft")
        assert np.abs(output(wrapped, case) - out).max() < 1e-5
        np.savez_compressed(folder / "golden.npz", out=out)
        for extra in [*folder.rglob("README.md")]:
            extra.unlink()


if __name__ == "__main__":
    main()
