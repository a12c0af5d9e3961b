"""view.py and mixture.py: view and source of an example, the same with every loader."""

import collections
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.data import ComponentConfig, DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.batches import order, view
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.sources import registry
from imagen_jax.data.sources.mixture import Mixture
from imagen_jax.io import images
from tests.data.conftest import write_store


def photo(width: int, height: int, kind: str = "jpeg", seed: int = 0, **options) -> bytes:
    """An encoded image with structure at all scales."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = (pixels + rng.integers(-30, 30, pixels.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def augmentations(count: int, seed: int = 0) -> list[view.Augmentation]:
    return view.sample_augmentations(order.random_bits(np.arange(count), seed))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat left of a dog", True),
        ("Two RIGHT-hand gloves", True),
        ("the leftmost cup", True),
        ("a left_handed guitar", True),
        ("turned anti-clockwise", True),
        ("a counterclockwise spiral", True),
        ("walking rightwards.", True),
        ("a left-facing fish", True),
        ("bright copyright upright leftovers", False),
        ("a clock, wise men", False),
        ("alright, a cleft cliff", False),
        ("", False),
    ],
)
def test_words_that_prevent_mirroring(caption, expected):
    assert view.mentions_side(caption) == expected


def test_numbers_of_an_example_are_uniform_and_independent():
    draws = np.array([[d.square, d.left, d.top, d.flip] for d in augmentations(4000)])
    assert (draws[:, :3] >= 0).all() and (draws[:, :3] < 1).all()
    np.testing.assert_allclose(draws.mean(axis=0), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.05
    other = np.array([d.left for d in augmentations(4000, seed=1)])
    assert abs(np.corrcoef(other, draws[:, 1])[0, 1]) < 0.05


@pytest.mark.parametrize("resize_filter", ["box", "lanczos"])
@pytest.mark.parametrize("size", [(256, 256), (700, 300), (300, 500), (100, 90)])
def test_a_crop_equals_the_crop_of_the_whole_image(size, resize_filter):
    data = DataConfig(
        image_size=64, lowres_size=16, crop_from=256, resize_filter=resize_filter, fit="center_crop"
    )
    encoded = photo(*size)
    whole = images.center_crop_resize(images.decode(encoded), 256, resize_filter).astype(int)
    corners = set()
    for augmentation in augmentations(8):
        left, top = view.crop_corner(data, augmentation)
        corners.add((left, top))
        crop = view.decode_view(encoded, data, augmentation)
        # Rounding of fractional positions: a level at most.
        assert np.abs(crop - whole[top : top + 64, left : left + 64]).max() <= 1
        if min(size) == 256:
            np.testing.assert_array_equal(crop, whole[top : top + 64, left : left + 64])
    assert all(left % 4 == top % 4 == 0 for left, top in corners) and len(corners) > 6


def test_cropping_and_downsampling_commute():
    data = DataConfig(image_size=64, lowres_size=16, crop_from=256)
    encoded = photo(256, 256, "png")
    small = images.resize_host(images.decode(encoded), 64)
    for augmentation in augmentations(6):
        left, top = view.crop_corner(data, augmentation)
        lowres = images.resize_host(view.decode_view(encoded, data, augmentation), 16)
        left, top = left // 4, top // 4
        np.testing.assert_array_equal(lowres, small[top : top + 16, left : left + 16])


def test_crops_reach_both_edges():
    data = DataConfig(image_size=64, crop_from=128)
    corners = [view.crop_corner(data, augmentation) for augmentation in augmentations(2000)]
    assert {left for left, _ in corners} == {top for _, top in corners} == set(range(65))


def test_random_squares_cover_the_longer_side():
    data = DataConfig(image_size=10, fit="random_crop")
    wide = np.zeros((10, 14, 3), np.uint8) + np.arange(14, dtype=np.uint8)[:, None]
    for pixels, axis in ((wide, 1), (wide.transpose(1, 0, 2), 0)):
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png")
        seen = collections.Counter()
        for augmentation in augmentations(200):
            square = view.decode_view(buffer.getvalue(), data, augmentation)
            line = square[0, :, 0] if axis == 1 else square[:, 0, 0]
            np.testing.assert_array_equal(line, np.arange(10) + line[0])
            seen[int(line[0])] += 1
        assert set(seen) == {0, 1, 2, 3, 4}


def test_padding_keeps_the_whole_image_between_white_bars():
    data = DataConfig(image_size=16, fit="pad")
    square = view.decode_view(photo(64, 32, "png"), data, augmentations(1)[0])
    assert square.shape == (16, 16, 3)
    assert (square[:4] == 255).all() and (square[12:] == 255).all()
    whole = images.resize_box(images.decode(photo(64, 32, "png")), (16, 8), "box")
    np.testing.assert_array_equal(square[4:12], whole)
    cut = dataclasses.replace(data, image_size=8, crop_from=16)
    corner = view.crop_corner(cut, augmentations(1)[0])
    part = square[corner[1] : corner[1] + 8, corner[0] : corner[0] + 8]
    np.testing.assert_array_equal(
        view.decode_view(photo(64, 32, "png"), cut, augmentations(1)[0]), part
    )
    assert view.decode_view(photo(200, 1, "png"), data, augmentations(1)[0]).shape == (16, 16, 3)


@pytest.mark.parametrize(
    "options",
    [{"subsampling": 2}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}],
    ids=str,
)
def test_tensorflow_decodes_a_rectangle_to_the_same_pixels(options):
    tasks = pytest.importorskip("imagen_jax.data.batches.tasks")
    data = DataConfig(image_size=32, crop_from=64, lowres_size=8)
    turned = Image.Exif()
    turned[0x0112] = 8
    used = []

    def counted(encoded, box):
        used.append(box)
        return tasks.decode_jpeg_box(encoded, box)

    for seed, size in enumerate([(64, 64), (131, 90), (97, 203), (33, 48)]):
        encoded = photo(*size, seed=seed, quality=85, **options)
        for augmentation in augmentations(5, seed):
            expected = view.decode_view(encoded, data, augmentation)
            np.testing.assert_array_equal(
                view.decode_view(encoded, data, augmentation, counted), expected
            )
    assert len(used) == 20
    for encoded in (photo(90, 70, exif=turned), photo(90, 70, "png"), photo(90, 70)[:-500]):
        for augmentation in augmentations(2):
            try:
                expected = view.decode_view(encoded, data, augmentation)
            except images.ImageError:
                continue
            np.testing.assert_array_equal(
                view.decode_view(encoded, data, augmentation, counted), expected
            )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(mixture configuration, store): 5 red images at rate 3, 7 blue ones at rate 1."""
    root = tmp_path_factory.mktemp("mixture")
    texts = []
    for name, colour, count in (("red", (255, 0, 0), 5), ("blue", (0, 0, 255), 7)):
        (root / name).mkdir()
        for i in range(count):
            pixels = np.full((8, 8, 3), colour, np.uint8)
            pixels[:, :4] = 10 * i
            Image.fromarray(pixels).save(root / name / f"{i}.png")
            side = ["on the left of", "beside"][i % 2]
            texts.append(f"{name} {i} {side} grey")
            (root / name / f"{i}.txt").write_text(texts[-1])
    mixture = {
        "red": ComponentConfig(kind="folder", path=str(root / "red"), rate=0.75),
        "blue": ComponentConfig(kind="folder", path=str(root / "blue"), rate=0.25),
    }
    data = DataConfig(
        mixture=mixture, image_size=8, batch_size=4, max_text_len=4, embeddings=str(root / "store")
    )
    return data, write_store(root / "store", texts)


def test_rates_are_exact_and_every_source_has_its_own_epochs(two):
    data, store = two
    source = registry.open_source(data)
    records = source.order(np.arange(4 * 35), seed=1)
    red, blue = records[records < 5], records[records >= 5]
    assert (len(red), len(blue)) == (105, 35)
    for block in records.reshape(-1, 4):
        assert (block < 5).sum() == 3
    # 35 blocks are 21 epochs of the red ones and 5 of the blue ones; 5 blocks are 3 of the former.
    np.testing.assert_array_equal(np.bincount(records), [21] * 5 + [5] * 7)
    for part in red.reshape(-1, 15):
        np.testing.assert_array_equal(np.bincount(part, minlength=5), [3] * 5)
    assert len({tuple(part) for part in red.reshape(-1, 15)}) == 7
    places = {tuple(np.flatnonzero(block >= 5)) for block in records.reshape(-1, 4)}
    assert len(places) == 4, "the order within a block differs from block to block"
    far = np.arange(10**12, 10**12 + 8)
    np.testing.assert_array_equal(source.order(far, 1)[3:5], source.order(far[3:5], 1))


def test_records_of_a_mixture_are_those_of_its_sources(two):
    data, _ = two
    source = registry.open_source(data)
    assert len(source) == 12
    for i in range(12):
        name, number = ("red", i) if i < 5 else ("blue", i - 5)
        record = source.record(i)
        assert record.key == f"{name}:{number}.png"
        assert record.captions == source.captions(i)
        assert record.captions[0].startswith(f"{name} {number}")
        assert record.image[0, 7].tolist() == ([255, 0, 0] if name == "red" else [0, 0, 255])


def test_batches_of_a_mixture_and_their_fingerprint(two):
    data, store = two
    stream = Pipeline(registry.open_source(data), store, data, seed=2)
    for step in range(3):
        batch = stream.batch_at(step)
        assert (images.to_uint8(batch["image"])[:, 0, 7, 0] == 255).sum() == 3
    rates = {n: dataclasses.replace(c, rate=1.0) for n, c in data.mixture.items()}
    even = dataclasses.replace(data, mixture=rates)
    other = Pipeline(registry.open_source(even), store, even, seed=2)
    assert other.fingerprint() != stream.fingerprint()


def test_half_of_the_images_are_mirrored_except_captions_with_left(two):
    data, store = two
    data = dataclasses.replace(data, flip=True)
    source = registry.open_source(data)
    stream, plain = (
        Pipeline(source, store, d, seed=2) for d in (data, dataclasses.replace(data, flip=False))
    )
    mirrored, others = [], 0
    for step in range(40):
        records = stream.step_info(step)["records"]
        for i, a, b in zip(
            records, stream.batch_at(step)["image"], plain.batch_at(step)["image"], strict=True
        ):
            assert (a == b).all() or (a == b[:, ::-1]).all()
            if "left" in source.captions(i)[0]:
                assert (a == b).all()
            else:
                mirrored.append(bool((a != b).any()))
                others += 1
    assert 0.4 < np.mean(mirrored) < 0.6 and others > 50


@pytest.mark.parametrize("rates", [{"a": 1 / 3, "b": 1.0}, {"a": 0.00001, "b": 1.0}])
def test_inexact_rates_are_rejected(rates):
    with pytest.raises(ConfigError, match="hold exactly only in blocks of.*try"):
        DataConfig(mixture={n: ComponentConfig(rate=r) for n, r in rates.items()})
    with pytest.raises(ConfigError, match="rate=-1"):
        ComponentConfig(rate=-1.0)


def test_a_fault_in_a_mixture_names_the_source(two, tmp_path):
    data, _ = two
    wrong = {**data.mixture, "blue": dataclasses.replace(data.mixture["blue"], path="nowhere")}
    with pytest.raises(ConfigError, match="config.data.mixture.blue.path='nowhere'"):
        registry.open_source(dataclasses.replace(data, mixture=wrong))


def test_a_mixture_of_one_is_that_source(two):
    data, _ = two
    alone = dataclasses.replace(data, mixture={"red": data.mixture["red"]})
    plain = DataConfig(kind="folder", path=data.mixture["red"].path)
    mixed, source = registry.open_source(alone), registry.open_source(plain)
    assert isinstance(mixed, Mixture)
    g = np.arange(40)
    np.testing.assert_array_equal(mixed.order(g, 5), source.order(g, 5))
