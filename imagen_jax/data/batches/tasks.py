"""The seqio loader: source, task, feature converter and batches of a pipeline.

The source is a stateless, endless stream that reads through `Pipeline.examples_at`, so the pipeline
determines order, sharding and start step. seqio does not shuffle, cache or repeat: its buffers
would make the order depend on the history of a process.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from imagen_jax.config import overrides
from imagen_jax.data.batches.pipeline import Batch, Pipeline
from imagen_jax.io import images

# Hides TensorFlow's start-up messages; its errors are raised as exceptions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discards stderr: TensorFlow prints before it reads its log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


with _silent_stderr():
    import seqio
    import tensorflow as tf

    from imagen_jax.data.batches.feature_converter import ImagenFeatureConverter

SPLIT = "train"


def _confine_tensorflow() -> None:
    """Reserves the accelerators for JAX and most host threads for training."""
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)


# Raises if TensorFlow is already initialised in this process; then its settings stay.
with _silent_stderr(), contextlib.suppress(RuntimeError):
    _confine_tensorflow()


def decode_jpeg_box(data: bytes, box: images.Box) -> np.ndarray:
    """Decodes a rectangle of a JPEG only; equals Pillow's pixels except at the border.

    Raises:
      images.ImageError: TensorFlow cannot decode it.
    """
    left, top, right, bottom = box
    window = [top, left, bottom - top, right - left]
    try:
        return tf.image.decode_and_crop_jpeg(
            data, window, channels=3, dct_method="INTEGER_ACCURATE"
        ).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise images.ImageError(f"unreadable ({error.message})") from None


class StreamSource(seqio.DataSource):
    """The examples of a pipeline from a start step, as a seqio data source."""

    def __init__(self, pipeline: Pipeline, start_step: int = 0) -> None:
        """Wraps `pipeline`; shards of the source are equal parts of its rows."""
        self._pipeline = pipeline
        self._start_step = start_step
        # Its threads end with this object: TensorFlow may still read after the last batch.
        workers = pipeline.data.reads * max(pipeline.data.prefetch, 1)
        self._reads = ThreadPoolExecutor(workers, thread_name_prefix="reads")
        self.error: Exception | None = None  # Of reading; TensorFlow only passes on its text.
        super().__init__(splits=(SPLIT,), caching_permitted=False, performs_internal_shuffling=True)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """True: any number of shards that divides the number of rows."""
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        """One nominal shard; the pipeline computes the examples of each part."""
        return [split]

    def get_dataset(
        self,
        split: str = SPLIT,
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        """The examples of one shard in the pipeline's order; ignores `shuffle` and `seed`."""
        del split, shuffle, seed, unused
        pipeline = self._pipeline
        if shard_info is not None:
            pipeline = pipeline.part(shard_info.index, shard_info.num_shards)
        pipeline.decode_jpeg_box = decode_jpeg_box
        specs = _stored_specs(pipeline)

        def read(step: np.int64) -> list[np.ndarray]:
            try:
                examples = pipeline.examples_at(int(step), self._reads)
            except Exception as error:
                self.error = error
                raise
            return [examples[name] for name in specs]

        def load(step: tf.Tensor) -> dict[str, tf.Tensor]:
            values = tf.numpy_function(read, [step], [s.dtype for s in specs.values()])
            shaped = zip(specs.items(), values, strict=True)
            return {name: tf.ensure_shape(value, spec.shape) for (name, spec), value in shaped}

        # One call per batch: a Python call per image costs more than reading the image.
        steps = tf.data.Dataset.counter(start=self._start_step)
        ahead = max(pipeline.data.prefetch, 1)
        return steps.map(load, num_parallel_calls=ahead, deterministic=True).unbatch()


def _stored_specs(pipeline: Pipeline) -> dict[str, tf.TensorSpec]:
    data, count = pipeline.data, len(pipeline.rows)
    specs = {"image": tf.TensorSpec((count, data.image_size, data.image_size, 3), tf.uint8)}
    if data.lowres_size:
        specs["lowres"] = tf.TensorSpec((count, data.lowres_size, data.lowres_size, 3), tf.uint8)
    shape, dtype = pipeline.store.spec(data.max_text_len)
    specs[pipeline.store.feature] = tf.TensorSpec((count, *shape), tf.as_dtype(dtype))
    specs["text_mask"] = tf.TensorSpec((count, shape[0]), tf.bool)
    return specs


def drop_padding(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Preprocessor: removes padding tokens and the mask."""

    def drop(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        count = tf.math.count_nonzero(example.pop("text_mask"))
        return {k: v[:count] if k.startswith("text") else v for k, v in example.items()}

    return dataset.map(drop)


def register(pipeline: Pipeline) -> str:
    """Registers the pipeline's task with seqio and returns its name."""
    name = f"imagen_{overrides.fingerprint([pipeline.fingerprint(), vars(pipeline.data)])}"
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    image_names = ("image", "lowres") if pipeline.data.lowres_size else ("image",)
    features = {name: seqio.ContinuousFeature(dtype=tf.uint8, rank=3) for name in image_names}
    shape, dtype = pipeline.store.spec(pipeline.data.max_text_len)
    features[pipeline.store.feature] = seqio.ContinuousFeature(
        dtype=tf.as_dtype(dtype), rank=len(shape)
    )
    seqio.TaskRegistry.add(
        name,
        source=StreamSource(pipeline),  # pyright: ignore[reportArgumentType]
        preprocessors=[drop_padding],
        output_features=features,
        shuffle_buffer_size=None,
    )
    return name


def imagen_batches(pipeline: Pipeline, start_step: int = 0) -> Iterator[Batch]:
    """Batches of the pipeline's rows from a step on, without end; bit for bit `batch_at`.

    Args:
      pipeline: makes the examples.
      start_step: first step; starting late costs nothing.

    Returns:
      An iterator of image, lowres (SR stages), text_emb (or text_ids) and text_mask as NumPy
      arrays.
    """
    data = pipeline.data
    task = seqio.TaskRegistry.get(register(pipeline))
    feature = pipeline.store.feature
    lengths = {"image": data.image_size, feature: pipeline.store.spec(data.max_text_len)[0][0]}
    if data.lowres_size:
        lengths["lowres"] = data.lowres_size
    source = StreamSource(pipeline, start_step)
    dataset = seqio.get_dataset(
        task.replace(source=source),
        task_feature_lengths=lengths,
        feature_converter=ImagenFeatureConverter(bool(data.lowres_size), feature),
        dataset_split=SPLIT,
        shuffle=False,
        shard_info=seqio.ShardInfo(0, 1),
        batch_size=len(pipeline.rows),
        verbose=False,
    )
    options = tf.data.Options()
    options.threading.private_threadpool_size = max(data.prefetch, 1)
    options.threading.max_intra_op_parallelism = 1
    ahead = dataset.prefetch(max(data.prefetch, 1)).with_options(options)
    held = [ahead.as_numpy_iterator()]
    batches = _with_own_errors(held, source)
    # TensorFlow's threads read ahead. If they do so while the interpreter ends, they wait for it
    # and it for them; finalizers run before that.
    weakref.finalize(batches, held.clear)
    return batches


def _with_own_errors(held: list[Iterator[Batch]], source: StreamSource) -> Iterator[Batch]:
    """The batches of the iterator `held[0]`; an error of reading is raised as itself."""
    failed = tf.errors.OpError  # Modules may be gone when an unfinished generator ends.
    try:
        while held:
            yield next(held[0])
    except failed:
        if source.error is None:
            raise
        raise source.error from None
    finally:
        held.clear()
