"""The section `data` of the schema: sources of captioned images, and how batches are built."""

from __future__ import annotations

import dataclasses
import fractions
import math

from PIL import ImageColor

from imagen_jax.config import bounds, where
from imagen_jax.config.fields import ConfigError, check_choice, doc

FITS = ("center_crop", "random_crop", "pad")
IMAGE_FIELDS = ("width", "height", "bytes")  # Fields of `where` that every source has.
MAX_BLOCK = 10_000  # Examples within which a mixture's rates hold exactly.


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of captioned images."""

    kind: str = doc(
        "tfds",
        "Kind of source: tfds, folder, tfrecord, webdataset, parquet or synthetic.",
        compiled=False,
    )
    path: str = doc(
        "",
        "tfds: the data_dir that holds the builder's files; folder: the folder; tfrecord, "
        "webdataset, parquet: a file, a folder of them or a pattern with *; a mixture's source: "
        "empty for config.data.path.",
        learns=False,
        compiled=False,
    )
    name: str = doc(
        "",
        "tfds: BUILDER[/CONFIG][:VERSION]; BUILDER is a name of TFDS, an entry point of "
        "imagen_jax.tfds_builders, or package.module:ClassName. synthetic: NUMBERxSIDE.",
        compiled=False,
    )
    split: str = doc("train", "tfds: split to read.", compiled=False)
    image_key: str = doc(
        "image",
        "tfds, tfrecord, parquet: name of the encoded image; webdataset: part that is the image, "
        "such as output.jpg; its default: any image.",
        compiled=False,
    )
    caption_key: str = doc(
        "caption",
        "tfds, tfrecord, parquet: name of the text, nested ones as captions/text; webdataset: "
        "part (edit.txt) or field of the .json; folder: column of metadata.*. The default of the "
        "latter two: text files first, then text, caption, prompt. Of several captions of an "
        "image, each epoch samples one.",
        compiled=False,
    )
    caption_lines: bool = doc(
        False,
        "folder, webdataset: each line of a text file is a caption; False: the file is one. "
        "Configurations saved before the field existed have True.",
        learns=False,  # The fingerprint of the records covers it.
        compiled=False,
    )
    min_size: int = doc(0, "Images with a shorter side are quarantined, pixels.", compiled=False)
    max_quarantined: float = doc(
        0.05,
        "Share of unusable records above which a run stops, 0..1.",
        learns=False,
        compiled=False,
    )
    check: str = doc(
        "decode",
        "What the index pass does with every image: decode it, or read its header.",
        learns=False,
    )

    where: str = doc(
        "",
        "Condition on the metadata of a sample, such as 'width>=256 and aesthetic>5'; width, "
        "height (pixels) and bytes are those of the image; needs pyarrow.",
        compiled=False,
    )
    unique: str = doc(
        "",
        "Leave out records that repeat an earlier one by captions, bytes (of the image) or pixels "
        "(a perceptual hash); empty: keep all.",
        compiled=False,
    )
    # Excluded from __hash__, as a mixture is.
    captions: dict[str, float] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={
            "doc": "Weights of captions by the name of their field or part, such as "
            "{'recaption': 0.75, 'alt': 0.2, '': 0.05}; '' is the empty caption. Sampled for every "
            "example among those that its image has; {}: caption_key.",
            "compiled": False,
        },
    )
    shuffle: str = doc(
        "global",
        "Order of an epoch: global (any record after any other) or window (shards in random order, "
        "and records shuffled within windows of 65,536).",
        compiled=False,
    )

    def __post_init__(self) -> None:
        check_choice("data.check", self.check, ("decode", "header"))
        check_choice("data.shuffle", self.shuffle, ("global", "window"))

        check_choice("data.unique", self.unique, ("", "captions", "bytes", "pixels"))
        where.names(self.where)
        for name, weight in self.captions.items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"config.data.captions: {name!r}={weight} must be above 0")
        if self.captions and not self.caption_names():
            raise ConfigError("config.data.captions holds the empty caption alone; add a field")

    def fields(self) -> tuple[str, ...]:
        """Names of the metadata of a sample that the index has to hold, sorted."""
        return tuple(name for name in where.names(self.where) if name not in IMAGE_FIELDS)

    def caption_names(self) -> tuple[str, ...]:
        """Names of the fields in `captions`, sorted; a caption's kind is its number among them."""
        return tuple(sorted(name for name in self.captions if name))


@dataclasses.dataclass(frozen=True)
class ComponentConfig(SourceConfig):
    """One source of a mixture."""

    rate: float = doc(1.0, "Share of the examples, relative to the other sources' rates.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"config.data.mixture: rate={self.rate} must be above 0")


def mixture_block(rates: dict[str, float]) -> dict[str, int]:
    """Numbers of examples in the smallest block that has exactly these rates.

    Raises:
      ConfigError: no block of at most MAX_BLOCK examples has them.
    """
    exact = [fractions.Fraction(repr(rate)) for rate in rates.values()]
    common = math.lcm(*(rate.denominator for rate in exact))
    counts = [int(rate * common) for rate in exact]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    if sum(counts) > MAX_BLOCK:
        given = ", ".join(f"{name} {rate}" for name, rate in rates.items())
        raise ConfigError(
            f"config.data.mixture: the rates ({given}) hold exactly only in blocks of "
            f"{sum(counts)} examples, at most {MAX_BLOCK} are possible; try rounded ones such as "
            "7 and 3"
        )
    return dict(zip(rates, counts, strict=True))


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Which images and captions are read, and how a batch is built from them."""

    # Excluded from __hash__ (a dict is unhashable); jax.jit uses the hash of a static config.
    mixture: dict[str, ComponentConfig] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={
            "doc": "Sources by a name of your choice, read together at their rates; {}: the "
            "source that the fields above describe."
        },
    )
    image_size: int = doc(64, "Side of the images in a training batch, pixels.")
    lowres_size: int = doc(0, "Side of the low-resolution conditioning image, pixels; 0: none.")
    resize_filter: str = doc(
        "box", "Antialiased resize filter: box, bilinear, bicubic or lanczos.", compiled=False
    )
    held_out: float = doc(
        0.0,
        "Share of the records of every source that training does not read, 0..1, chosen by a hash "
        "of their names; evaluations in training read them.",
        compiled=False,
    )
    fit: str = doc(
        "center_crop",
        "How an image becomes square: center_crop, random_crop (the largest square, at a position "
        "sampled in each epoch) or pad (the whole image, with bars of data.background).",
    )
    background: str = doc(
        "white",
        "sRGB colour under transparent pixels and of the bars of fit=pad: a CSS name or #rrggbb.",
        compiled=False,
    )
    crop_from: int = doc(
        0,
        "Side to which images are resized, pixels, before a random crop of image_size; "
        "0: image_size, no crop.",
    )
    flip: bool = doc(
        False, "Mirror half of the examples, except those whose caption mentions left or right."
    )
    embeddings: str = doc(
        "", "Folder of the embedding store written by `embed`.", learns=False, compiled=False
    )
    fingerprint: str = doc(
        "", "Set by `train`: identifies the training records and their order.", compiled=False
    )
    records: str = doc(
        "",
        "Set by `train`: fingerprint of the images and captions, by which a later run says what "
        "changed.",
        learns=False,
        compiled=False,
    )
    batch_size: int = doc(32, "Images per step over all devices and hosts.")
    max_text_len: int = doc(32, "Text tokens per example, padded or truncated.")
    loader: str = doc(
        "seqio",
        "seqio (tf.data) or numpy (same batches without TensorFlow).",
        learns=False,
        compiled=False,
    )
    reads: int = doc(
        32,
        "Images of a batch that are read at the same time; more for stores that answer late.",
        learns=False,
        compiled=False,
    )
    prefetch: int = doc(
        2, "Batches prepared ahead of the step, in parallel.", learns=False, compiled=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        bounds.check(self, "data")
        check_choice("data.loader", self.loader, ("seqio", "numpy"))
        check_choice("data.fit", self.fit, FITS)
        self.background_rgb()
        check_choice(
            "data.resize_filter", self.resize_filter, ("box", "bilinear", "bicubic", "lanczos")
        )
        if self.lowres_size and self.image_size % self.lowres_size:
            raise ConfigError(
                f"config.data.lowres_size={self.lowres_size} must divide "
                f"config.data.image_size={self.image_size}"
            )
        if self.crop_from and self.crop_from % self.image_size:
            raise ConfigError(
                f"config.data.crop_from={self.crop_from} must be a multiple of "
                f"config.data.image_size={self.image_size}, or 0 for no crop"
            )
        if self.mixture:
            mixture_block({name: source.rate for name, source in self.mixture.items()})

    def background_rgb(self) -> tuple[int, int, int]:
        """`background` in 0..255. Raises ConfigError: it is no colour, or transparent."""
        try:
            red, green, blue = list(ImageColor.getrgb(self.background))
        except ValueError:
            raise ConfigError(
                f"config.data.background={self.background!r} must be a colour such as white, "
                "black or #808080"
            ) from None
        return red, green, blue

    def sources(self) -> dict[str, ComponentConfig]:
        """The sources of the mixture; an empty path of a source is replaced by `path`."""
        return {
            name: dataclasses.replace(source, path=source.path or self.path)
            for name, source in self.mixture.items()
        }

    def uncropped(self) -> DataConfig:
        """The same for whole images in place of crops: the sizes that a stage samples."""
        if not self.crop_from:
            return self
        lowres_size = self.lowres_size * self.crop_from // self.image_size
        return dataclasses.replace(
            self, image_size=self.crop_from, lowres_size=lowres_size, crop_from=0
        )
