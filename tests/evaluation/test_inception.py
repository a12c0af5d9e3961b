"""FID's Inception: parity with torch, its input filters, and files that are not it.

The golden features are those of torch (tests/reference/fid_inception.py); with the extra `peers`
the network is compared at its full size, through a file that torch wrote.
"""

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax.evaluation.features import fid, resizing
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.interop import inception, weights
from tests.reference import fid_inception


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    weights.write_safetensors(path, fid_inception.random_weights())
    return path


def features(params, inputs):
    with jax.default_matmul_precision("highest"):
        return np.asarray(fid._inception_features(params, inputs))


def test_features_equal_torch(weight_file, request):
    golden = np.load(request.config.rootpath / "tests" / "golden" / "inception.npz")["features"]
    params, _ = inception.read(weight_file)
    found = features(params, fid_inception.random_images(fid_inception.SMALL))
    assert golden.std() > 0.3
    assert np.abs(found - golden).max() < 1e-4


@pytest.mark.slow
def test_features_equal_torch_at_full_size_from_torchs_file(weight_file, tmp_path):
    torch = pytest.importorskip("torch")
    state = fid_inception.random_weights()
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    tensors["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save(tensors, tmp_path / "inception.pth")
    params, sha256 = inception.read(tmp_path / "inception.pth")
    assert sha256 == inception.read(weight_file)[1]
    inputs = fid_inception.random_images(299)
    expected = fid_inception.features(state, inputs)
    gap = np.abs(features(params, inputs) - expected).max()
    print(f"largest difference {gap:.1e}, features up to {np.abs(expected).max():.2f}")
    assert gap < 1e-4


def test_a_file_of_another_network_is_named(weight_file, tmp_path):
    arrays = dict(weights.read_safetensors(weight_file))
    arrays["fc.weight"] = np.zeros((1000, 2048), np.float32)  # torchvision's.
    arrays["AuxLogits.fc.bias"] = np.zeros(1000, np.float32)
    del arrays["Mixed_7c.branch_pool.bn.running_var"]
    weights.write_safetensors(tmp_path / "other.safetensors", arrays)
    with pytest.raises(weights.WeightsError) as caught:
        inception.read(tmp_path / "other.safetensors")
    for words in (
        "missing: Mixed_7c.branch_pool.bn.running_var",
        "extra: AuxLogits.fc.bias",
        "fc.weight is (1000, 2048), expected (1008, 2048)",
    ):
        assert words in str(caught.value)
    with pytest.raises(weights.WeightsError, match="no such file; download"):
        inception.read(tmp_path / "none.pth")
    with pytest.raises(EvaluationError, match="cleanfid"):
        fid.inception_network(str(weight_file), "cleen")


SIZES = [(64, 64), (256, 256), (299, 299), (480, 333)]


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def test_tf_equals_tensorflow(inputs):
    tf = pytest.importorskip("tensorflow")
    for image in inputs:
        pixels = tf.raw_ops.ResizeBilinear(
            images=image[None].astype(np.float32), size=(299, 299), half_pixel_centers=False
        )
        np.testing.assert_allclose(resizing.tf(image), (pixels[0].numpy() - 128) / 128, atol=1e-5)


def test_pytorch_equals_torch(inputs):
    torch = pytest.importorskip("torch")
    for image in inputs:
        x = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32) / 255)
        x = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        expected = 2 * x[0].numpy().transpose(1, 2, 0) - 1
        # Torch may fuse the multiplication and addition of a place, whose float32 rounding at 480
        # pixels is 3e-5 of a pixel, and neighbours differ by up to 2.
        np.testing.assert_allclose(resizing.pytorch(image), expected, atol=6e-5)


def test_filters_keep_an_image_of_inceptions_size_and_differ_otherwise(inputs):
    whole = inputs[2].astype(np.float32)
    for name, resize in resizing.FILTERS.items():
        made = resize(inputs[2])
        undone = (made + 1) * 127.5 if name == "pytorch" else made * 128 + 128
        np.testing.assert_allclose(undone, whole, atol=1e-3)
        assert made.dtype == np.float32
    large = [resizing.FILTERS[name](inputs[3]) for name in ("bicubic", "tf", "pytorch")]
    assert min(np.abs(large[i] - large[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01


def test_clean_averages_what_tf_skips():
    stripes = np.zeros((4 * 299, 4 * 299, 3), np.uint8)
    stripes[::2] = 255
    inner = slice(5, -5)
    assert np.abs(resizing.bicubic(stripes)[inner]).max() < 0.05  # Grey.
    assert resizing.tf(stripes).min() > 0.99  # White: every fourth row, from the first.


def test_cleanfid_is_that_of_clean_fids_own_code(tmp_path):
    """Files of any size and shape, read and resized once; within a hundredth of a level of 255."""
    resize = pytest.importorskip("cleanfid.resize")
    theirs, rng = resize.build_resizer("clean"), np.random.default_rng(0)
    shapes = [(64, 64, 3), (300, 500, 3), (37, 21, 3), (299, 299, 3), (700, 31, 3), (8, 900)]
    for number, shape in enumerate(shapes):
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        image.save(tmp_path / f"{number}.{('png', 'jpg')[number % 2]}")
    found, size = fid.load_images(str(tmp_path), filter="cleanfid")
    assert (found.count, size) == (len(shapes), 0)
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        expected = theirs(np.array(Image.open(path).convert("RGB")))
        ours = resizing.FILTERS["cleanfid"](found.load(number)) * 128 + 128
        assert np.abs(ours - expected).max() < 0.01


def test_cleanfid_gets_whole_images_and_the_old_name_stays(tmp_path):
    for name, size in (("a", (40, 24)), ("b", (32, 64))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    native, size = fid.load_images(str(tmp_path), filter="cleanfid")
    assert size == 0 and [native.load(i).shape for i in (0, 1)] == [(24, 40, 3), (64, 32, 3)]
    square, size = fid.load_images(str(tmp_path), filter="clean")
    assert size == 24 and square.load(1).shape == (24, 24, 3)
    assert resizing.filter_name("clean") == "bicubic"
    with pytest.raises(EvaluationError, match="--size=64 does not go with --filter=cleanfid"):
        fid.load_images(str(tmp_path), 64, "cleanfid")
