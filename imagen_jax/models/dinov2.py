"""DINOv2's vision transformer (Oquab et al. 2023, arXiv:2304.07193): features of images.

The Frechet distance of its features (FD-DINOv2; Stein et al. 2023, arXiv:2306.04675) agrees better
with human judgement than that of Inception. The network is an image tower like CLIP's, without the
norm before the layers and with a learned scale on each residual branch.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.models.clip import ClipVisionConfig, Layer, layer_norm

_SMALL = nn.initializers.normal(0.02)


class ImageFeatures(nn.Module):
    """An image as one vector: the normalised output of the class token."""

    config: ClipVisionConfig

    @nn.compact
    def __call__(self, images: Float[Array | np.ndarray, "b s s 3"]) -> Float[Array, "b d"]:
        """Features of standardised images of side `image_size`."""
        cfg = self.config
        patch = (cfg.patch_size, cfg.patch_size)
        embed = nn.Conv(
            cfg.emb_dim, patch, strides=patch, padding="VALID", dtype=cfg.dtype, name="patches"
        )
        x = embed(images).reshape(len(images), -1, cfg.emb_dim)
        class_token = self.param("whole", _SMALL, (cfg.emb_dim,))
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, cfg.emb_dim)), x], 1)
        x = x + self.param("places", _SMALL, (x.shape[1], cfg.emb_dim))
        mask = np.ones((x.shape[1], x.shape[1]), bool)
        for i in range(cfg.num_layers):
            x = Layer(cfg, branch_scale=True, name=f"layers_{i}")(x, mask)
        return layer_norm(cfg, "final_norm")(x[:, 0]).astype(jnp.float32)
