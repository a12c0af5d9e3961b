"""torch side of `side_by_side`: the U-Nets of diffusers and imagen-pytorch."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def versions() -> dict[str, str]:
    """Versions of the installed libraries."""
    found = {}
    for name in ("torch", "diffusers", "imagen-pytorch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def parameters(network: torch.nn.Module) -> int:
    """Number of parameters of a network."""
    return sum(p.numel() for p in network.parameters())


def diffusers_network(size: Any) -> UNet2DConditionModel:
    """A U-Net of IF's architecture: joint attention over pixels and text below the first level."""
    torch.manual_seed(0)
    below = len(size.channels) - 1
    network = UNet2DConditionModel(
        act_fn="gelu",
        addition_embed_type="text",
        addition_embed_type_num_heads=size.pooling_heads,
        attention_head_dim=size.head_dim,
        block_out_channels=size.channels,
        cross_attention_dim=size.channels[-1],
        cross_attention_norm="group_norm",
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * below),
        encoder_hid_dim=size.text_dim,
        encoder_hid_dim_type="text_proj",
        in_channels=3,
        layers_per_block=size.blocks,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        out_channels=6,
        resnet_time_scale_shift="scale_shift",
        sample_size=size.side,
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * below, "ResnetUpsampleBlock2D"),
    )
    return network.to(DEVICE, memory_format=torch.channels_last)


def lucidrains_network(size: Any, target: int) -> torch.nn.Module:
    """imagen-pytorch's U-Net of equal depth and heads with about `target` parameters."""
    from imagen_pytorch import Unet

    class TakesSteps(Unet):
        """The U-Net with the call signature of diffusers' U-Net."""

        def forward(self, z: Any, step: Any, text: Any) -> Any:
            return super().forward(z, step.float() / 1000.0, text_embeds=text)

    def build(dim: int) -> torch.nn.Module:
        first = size.channels[0]
        attends = (False, *(True,) * (len(size.channels) - 1))
        return TakesSteps(
            dim=dim,
            dim_mults=tuple(max(width // first, 1) for width in size.channels),
            num_resnet_blocks=size.blocks,
            attn_dim_head=size.head_dim,
            layer_attns=attends,
            layer_cross_attns=attends,
            text_embed_dim=size.text_dim,
            max_text_len=64,
        )

    with torch.device("meta"):
        widths = range(16, 2 * size.channels[0] + 1, 16)
        counts = {dim: parameters(build(dim)) for dim in widths}
    nearest = min(counts, key=lambda dim: abs(counts[dim] - target))
    torch.manual_seed(0)
    return build(nearest).to(DEVICE, memory_format=torch.channels_last)


def _tensors(inputs: Mapping[str, np.ndarray], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs of the torch networks: images [B, C, H, W], channels_last in memory."""

    def to_image(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).permute(0, 3, 1, 2).to(DEVICE)

    return {
        "z": to_image(inputs["z"]).to(dtype, memory_format=torch.channels_last),
        "step": torch.from_numpy(inputs["step"]).to(DEVICE),
        "text": torch.from_numpy(inputs["text"]).to(DEVICE, dtype),
        "target": to_image(inputs["target"]),
    }


def _output_image(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


def _autocast(dtype: str) -> Any:
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(DEVICE, dtype=DTYPES[dtype])


def _loss(run: Callable[..., Any], batch: Mapping[str, torch.Tensor], dtype: str) -> torch.Tensor:
    with _autocast(dtype):
        out = _output_image(run(batch["z"], batch["step"], batch["text"]))[:, :3]
    return torch.nn.functional.mse_loss(out.float(), batch["target"])


def output_and_loss(
    network: torch.nn.Module, inputs: Mapping[str, np.ndarray], dtype: str
) -> tuple[np.ndarray, float]:
    """Output [B, H, W, C] and loss of the network."""
    batch = _tensors(inputs, torch.float32)
    with torch.no_grad(), _autocast(dtype):
        out = _output_image(network(batch["z"], batch["step"], batch["text"]))
        loss = _loss(network, batch, dtype)
    return out.float().permute(0, 2, 3, 1).cpu().numpy(), float(loss)


def ways(
    what: str,
    network: torch.nn.Module,
    inputs: Mapping[str, np.ndarray],
    dtype: str,
    threads: Sequence[int],
    mode: str,
) -> dict[str, Callable[[], Any]]:
    """Functions that run `what` once and wait for its end, by number of threads; one on a GPU.

    They use a copy of the network, so that train steps do not change its weights.
    """
    network = copy.deepcopy(network)
    make = _forward if what == "forward" else _train
    once = make(network, inputs, dtype, mode)

    def with_threads(count: int) -> Callable[[], Any]:
        def call() -> None:
            torch.set_num_threads(count)
            once()
            if CUDA:
                torch.cuda.synchronize()

        return call

    if CUDA:
        return {mode: with_threads(threads[-1])}
    return {f"{n} threads": with_threads(n) for n in threads}


def _forward(
    network: torch.nn.Module, inputs: Mapping[str, np.ndarray], dtype: str, mode: str
) -> Callable[[], Any]:
    network = network.to(DTYPES[dtype]).eval()
    batch = _tensors(inputs, DTYPES[dtype])
    run = torch.compile(network) if mode == "compiled" else network

    def call() -> None:
        with torch.no_grad():
            run(batch["z"], batch["step"], batch["text"])

    return call


def _train(
    network: torch.nn.Module, inputs: Mapping[str, np.ndarray], dtype: str, mode: str
) -> Callable[[], Any]:
    network = network.train()
    batch = _tensors(inputs, torch.float32)
    run = torch.compile(network) if mode == "compiled" else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        _loss(run, batch, dtype).backward()
        optimizer.step()

    return call
