"""Converts the examples of the seqio task to the inputs of the model.

Task: uint8 images and the embeddings (or ids) of the real tokens. Model: images in [-1, 1], text
padded with zeros to a fixed length, and the mask of real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

Spec = seqio.FeatureConverter.FeatureSpec


class ImagenFeatureConverter(seqio.FeatureConverter):
    """{image, (lowres), text_emb|text_ids, text_mask}, bit for bit as `Pipeline.batch_at`."""

    TASK_FEATURES: Mapping[str, Spec] = {}
    MODEL_FEATURES: Mapping[str, Spec] = {}
    PACKING_FEATURE_DTYPES = None  # pyright: ignore[reportAssignmentType] # Nothing is packed.

    def __init__(self, lowres: bool, text: str = "text_emb") -> None:
        """Sets the features of the examples.

        Args:
          lowres: whether there is a low-resolution image (SR stages).
          text: text_emb (embeddings) or text_ids (token ids, encoded later).
        """
        stored, read, rank = {
            "text_emb": (tf.bfloat16, tf.bfloat16, 2),
            "text_ids": (tf.int32, tf.int32, 1),
        }[text]
        self._text, self._text_dtype = text, read
        self._image_features = ("image", "lowres") if lowres else ("image",)
        self.TASK_FEATURES = {
            **{name: Spec(dtype=tf.uint8, rank=3) for name in self._image_features},
            text: Spec(dtype=stored, rank=rank),
        }
        self.MODEL_FEATURES = {
            **{name: Spec(dtype=tf.float32, rank=3) for name in self._image_features},
            text: Spec(dtype=read, rank=rank),
            "text_mask": Spec(dtype=tf.bool),
        }
        # Shapes are static and checked at the source; seqio's checks would halve the throughput.
        super().__init__(pack=False, apply_length_check=False)

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Lengths of the features of the model; the mask has the length of the text."""
        return {**task_feature_lengths, "text_mask": task_feature_lengths[self._text]}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        length = task_feature_lengths[self._text]

        def convert(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            text = tf.cast(example[self._text], self._text_dtype)
            count = tf.shape(text)[0]
            paddings: Any = [(0, length - count)] + [(0, 0)] * (len(text.shape) - 1)
            padded = tf.pad(text, paddings)
            return {
                **{name: _to_float(example[name]) for name in self._image_features},
                self._text: tf.ensure_shape(padded, (length, *text.shape[1:])),
                "text_mask": tf.range(length) < count,
            }

        return ds.map(convert)


def _to_float(image: tf.Tensor) -> tf.Tensor:
    """`images.to_float` in TensorFlow: the same exact numerator and the same single rounding."""
    return tf.cast(tf.cast(image, tf.int32) * 2 - 255, tf.float32) * (1 / 255)
