"""A feature network with exact results, in place of Inception.

    python -m tests.reference.small_features FOLDER COUNT BATCH

Extracts the features of COUNT images with `patch_means` as one of the processes described by the
environment. The first process prints count, mean and summed scatter as JSON.
"""

import json
import sys

import jax
import numpy as np

from imagen_jax.evaluation.features.extract import LazyImages, Network


@jax.jit
def _means(params, image_batch):
    del params
    b, h, w, c = image_batch.shape
    return image_batch.reshape(b, h // 4, 4, w // 4, 4, c).mean((2, 4)).reshape(b, -1)


def patch_means() -> Network:
    """Means of 4x4 pixels: exact in float32 for every order of summation."""
    return Network("patch means", lambda image: image.astype(np.float32), _means, {})


def random_images(count: int, size: int = 16) -> LazyImages:
    """Noise images, seeded by their number."""

    def load(number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)

    return LazyImages(count, load)


def main() -> None:
    from imagen_jax.evaluation.features import extract
    from imagen_jax.parallel import distributed

    folder, count, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    extract.PARTS_AT_ONCE = 1  # Every batch is merged by itself.
    distributed.initialize(log=lambda line: None)
    parts = extract.extract(
        random_images(count), patch_means(), folder, batch_size=batch, log=lambda line: None
    )
    total = parts.statistics()
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "files": len(parts.files),
                "sha256": parts.sha256,
                "count": total.count,
                "mean": total.mean.tolist(),
                "scatter": total.scatter.tolist(),
            }
        )
    )


if __name__ == "__main__":
    main()
