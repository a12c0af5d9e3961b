"""Small U-Nets of DeepFloyd IF's two architectures, run by diffusers: tests/golden/if_unet.

    python -m tests.reference.if_unet tests/golden/if_unet    # needs torch and diffusers

The weights are not stored but seeded by their names and shapes (`make_weights`). None is zero or
one, so a dropped or transposed parameter changes the output.
"""

import json
import pathlib
import sys

import numpy as np

COMMON = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim_type": "text_proj",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
}
# What IF's own networks vary: depth per level, where and how pixels attend, widths, scales.
CASES = {
    "base": COMMON
    | {
        "sample_size": 8,
        "in_channels": 3,
        "block_out_channels": (32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "encoder_hid_dim": 24,
        "addition_embed_type_num_heads": 4,
    },
    "sr": COMMON
    | {
        "sample_size": 16,
        "in_channels": 6,
        "class_embed_type": "timestep",
        "block_out_channels": (16, 32, 48),
        "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 2,
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",),
        "layers_per_block": (1, 2, 1),
        "only_cross_attention": True,
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
        "encoder_hid_dim": 24,
        "addition_embed_type_num_heads": 3,
        "norm_num_groups": 8,
        "time_embedding_dim": 96,
        "time_embedding_act_fn": "gelu",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 1 / 0.7071,
        "mid_block_scale_factor": 1 / 0.7071,
    },
}


def make_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights of order 1 / sqrt(inputs), scales around 1, biases around 0."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name in sorted(shapes):
        values = rng.normal(size=shapes[name])
        if len(shapes[name]) > 1:
            values /= np.sqrt(np.prod(shapes[name][1:]))
        else:
            values = 0.2 * values + ("norm" in name and name.endswith("weight"))
        arrays[name] = values.astype(np.float32)
    return arrays


def main() -> None:
    import torch
    from diffusers import UNet2DConditionModel

    for case, fields in CASES.items():
        folder = pathlib.Path(sys.argv[1]) / case
        network = UNet2DConditionModel(**fields).eval()
        shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
        arrays = make_weights(shapes)
        network.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})
        network.save_config(folder)
        (folder / "shapes.json").write_text(json.dumps(shapes, indent=0) + "\n")

        rng = np.random.default_rng(1)
        side = fields["sample_size"]
        inputs = {
            "x": rng.normal(size=(3, fields["in_channels"], side, side)).astype(np.float32),
            "t": np.array([0, 440, 999]),
            "text": rng.normal(size=(3, 7, fields["encoder_hid_dim"])).astype(np.float32),
            "mask": np.arange(7) < np.array([[7], [3], [1]]),
        }
        if "class_embed_type" in fields:
            inputs["class_labels"] = np.array([5, 250, 800])
        x, t, text, mask = (torch.from_numpy(inputs[name]) for name in ("x", "t", "text", "mask"))
        labels = torch.from_numpy(inputs["class_labels"]) if "class_labels" in inputs else None
        with torch.no_grad():
            inputs["out"] = network(x, t, text, class_labels=labels).sample.numpy()
            # diffusers takes no mask where pixels attend to text alone.
            if "only_cross_attention" not in fields:
                inputs["out_masked"] = network(x, t, text, encoder_attention_mask=mask)[0].numpy()
        np.savez_compressed(folder / "golden.npz", **inputs)


if __name__ == "__main__":
    main()
