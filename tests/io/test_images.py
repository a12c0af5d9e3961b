"""images.py: the map to [-1, 1], decoding of difficult files, resizing, grids and PNG files."""

import io
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imagen_jax.io import images


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


LEVELS = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)


def test_every_level_survives_the_round_trip_with_the_same_bits_in_numpy_and_jax():
    floats = images.to_float(LEVELS)
    assert floats.dtype == np.float32
    assert floats[0, 0] == -1 and floats[255, 0] == 1
    np.testing.assert_array_equal(floats, -floats[::-1])
    np.testing.assert_array_equal(images.to_uint8(floats), LEVELS)
    in_jax = jax.jit(images.to_float)(jnp.asarray(LEVELS))
    np.testing.assert_array_equal(np.asarray(in_jax), floats)
    np.testing.assert_array_equal(np.asarray(images.to_uint8(in_jax)), LEVELS)


def test_values_beyond_the_range_are_clipped_and_halves_are_not_truncated():
    values = np.array([[-3.0, 1.7, 0.999]], np.float32)
    np.testing.assert_array_equal(images.to_uint8(values), [[0, 255, 255]])


def test_decode_turns_by_exif():
    image = np.zeros((10, 20, 3), np.uint8)
    image[:, :5] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # Shown turned by 90 degrees clockwise.
    turned = images.decode(encode(Image.fromarray(image), "png", exif=exif))
    assert turned.shape == (20, 10, 3)
    np.testing.assert_array_equal(turned, np.rot90(image, -1))


def test_decode_scales_sixteen_bits_instead_of_clipping_them():
    grey = np.array([[0, 128, 257, 32896, 65535]], np.uint16)
    decoded = images.decode(encode(Image.fromarray(grey), "png"))
    np.testing.assert_array_equal(decoded[0, :, 1], [0, 0, 1, 128, 255])


@pytest.mark.parametrize("white", [255, 65535, 2**31 - 1])
def test_decode_refuses_32_bits_whose_white_is_unknown(white):
    levels = np.array([[0, white]], np.int32)
    with pytest.raises(images.ImageError, match="more than 16 bits per channel"):
        images.decode(encode(Image.fromarray(levels), "tiff"))


def test_decode_lays_transparency_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 255, 51
    decoded = images.decode(encode(Image.fromarray(rgba), "png"))
    np.testing.assert_array_equal(decoded[0, :, 0], [255, 0, 204])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    decoded = images.decode(encode(palette, "png", transparency=0))
    np.testing.assert_array_equal(decoded[0], [[255, 255, 255], [40, 50, 60]])


def test_decode_converts_cmyk():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixel = images.decode(encode(red, "jpeg", quality=95))[8, 8].astype(int)
    assert np.abs(pixel - [255, 0, 0]).max() < 12


def test_decode_takes_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(images.decode(data)[4, 4], [255, 0, 0])


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif"])
def test_decode_refuses_truncated_files(kind):
    data = encode(Image.fromarray(noise(64, 64, 3)), kind)
    with pytest.raises(images.ImageError, match="unreadable"):
        images.decode(data[: len(data) // 2])


def test_decode_tells_empty_from_foreign_data():
    with pytest.raises(images.ImageError, match="empty"):
        images.decode(b"")
    with pytest.raises(images.ImageError, match="wrong type"):
        images.decode(b"<html>not found</html>")


def test_box_resize_by_a_whole_factor_is_the_mean_of_each_block():
    image = noise(64, 64, 3)
    blocks = image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    # Columns and rows are rounded one after the other: half a level each.
    assert np.abs(images.resize_host(image, 16, "box") - blocks).max() <= 1.0
    np.testing.assert_array_equal(images.resize_host(image, 64, "lanczos"), image)


@pytest.mark.parametrize("resize_filter", list(images.RESIZE_FILTERS))
def test_resizing_down_is_antialiased(resize_filter):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = images.resize_host(stripes, 8, resize_filter).astype(int)
    assert np.abs(small - 127.5).max() < 12


def test_the_crop_is_the_largest_centred_square():
    image = noise(10, 21, 3)
    np.testing.assert_array_equal(images.center_crop_resize(image, 10), image[:, 5:15])


def test_upsample_keeps_constants_and_straight_ramps():
    ramp = jnp.linspace(-1, 1, 8)[None, None, :, None] * jnp.ones((2, 8, 1, 3))
    large = np.asarray(images.upsample(ramp, 32))
    assert large.shape == (2, 32, 32, 3)
    steps = np.diff(large[0, 5, 2:-2, 0])
    np.testing.assert_allclose(steps, 2 / 7 / 4, rtol=1e-4)


def test_grid_has_images_in_reading_order_and_captions_below():
    pixels = noise(3, 16, 16, 3)
    plain = images.grid(pixels, 2, scale=2)
    captioned = images.grid(pixels, 2, ["a red circle", "b", "c"], scale=2)
    assert captioned.shape[0] > plain.shape[0] and captioned.shape[1] == plain.shape[1]
    found = {
        i
        for i, image in enumerate(pixels.repeat(2, 1).repeat(2, 2))
        for top in range(plain.shape[0] - 31)
        for left in range(plain.shape[1] - 31)
        if (plain[top : top + 32, left : left + 32] == image).all()
    }
    assert found == {0, 1, 2}
    assert (captioned[4 + 32 : 4 + 32 + 15] < 100).any(), "no text under the first row"


def test_png_carries_its_texts_and_leaves_no_other_file(tmp_path):
    image = noise(8, 8, 3)
    path = tmp_path / "new" / "a.png"
    images.save_png(path, image, {"prompt": "красный круг", "seed": "7"})
    with Image.open(path) as read:
        assert read.text == {"prompt": "красный круг", "seed": "7"}
        np.testing.assert_array_equal(np.asarray(read), image)
    assert os.listdir(path.parent) == ["a.png"]
