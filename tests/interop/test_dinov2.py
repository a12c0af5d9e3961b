"""DINOv2 from Hugging Face folders: against a plain NumPy form, and transformers if installed."""

import json

import jax
import numpy as np
import pytest
from scipy import special

from imagen_jax.evaluation.features import networks
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.interop import hf_dinov2, weights

WIDTH, HEADS, LAYERS, PATCH, EPS = 8, 2, 2, 4, 1e-6
OLD, NEW = 5, 3  # Patches along a side, in the file and when read.
CONFIG = {
    "model_type": "dinov2",
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "mlp_ratio": 2,
    "image_size": OLD * PATCH,
    "patch_size": PATCH,
    "layer_norm_eps": EPS,
}


def names() -> dict[str, tuple[int, ...]]:
    """All tensors of transformers' Dinov2Model of CONFIG."""
    found = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.position_embeddings": (1, OLD * OLD + 1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    linear = {f"attention.attention.{n}": (WIDTH, WIDTH) for n in ("query", "key", "value")}
    linear["attention.output.dense"] = (WIDTH, WIDTH)
    linear |= {"mlp.fc1": (2 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 2 * WIDTH)}
    for i in range(LAYERS):
        for part, shape in linear.items():
            found[f"encoder.layer.{i}.{part}.weight"] = shape
            found[f"encoder.layer.{i}.{part}.bias"] = shape[:1]
        for part in ("norm1", "norm2"):
            found |= {f"encoder.layer.{i}.{part}.{k}": (WIDTH,) for k in ("weight", "bias")}
        for part in ("layer_scale1", "layer_scale2"):
            found[f"encoder.layer.{i}.{part}.lambda1"] = (WIDTH,)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("dinov2"), np.random.default_rng(0)
    tensors = {
        name: (0.5 * rng.normal(size=shape)).astype(np.float32) for name, shape in names().items()
    }
    weights.write_safetensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def by_numpy(w, images):
    """The network in float64, place by place, as its paper and transformers have it."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def place(row, column):
        """A place of the new grid, from the sixteen around it in the old one."""
        grid = w["embeddings.position_embeddings"][0, 1:].reshape(OLD, OLD, WIDTH)
        y, x = ((n + 0.5) * OLD / NEW - 0.5 for n in (row, column))
        total = 0.0
        for i in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
            for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                factor = kernel(abs(y - i)) * kernel(abs(x - j))
                total = total + factor * grid[np.clip(i, 0, OLD - 1), np.clip(j, 0, OLD - 1)]
        return total

    def kernel(d, a=-0.75):
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        return near if d <= 1 else far

    found = []
    for image in images:
        tokens = [w["embeddings.cls_token"][0, 0] + w["embeddings.position_embeddings"][0, 0]]
        for row in range(NEW):
            for column in range(NEW):
                patch = image[row * PATCH :, column * PATCH :][:PATCH, :PATCH].transpose(2, 0, 1)
                kernel_weights = w["embeddings.patch_embeddings.projection.weight"]
                vector = (kernel_weights * patch).sum((1, 2, 3))
                vector = vector + w["embeddings.patch_embeddings.projection.bias"]
                tokens.append(vector + place(row, column))
        x = np.stack(tokens)
        for i in range(LAYERS):
            layer = f"encoder.layer.{i}"
            h, size = norm(x, f"{layer}.norm1"), WIDTH // HEADS
            q, k, v = (
                linear(h, f"{layer}.attention.attention.{n}") for n in ("query", "key", "value")
            )
            heads = []
            for head in range(HEADS):
                own = slice(head * size, (head + 1) * size)
                mixing = special.softmax(q[:, own] @ k[:, own].T / size**0.5, axis=-1)
                heads.append(mixing @ v[:, own])
            h = linear(np.concatenate(heads, -1), f"{layer}.attention.output.dense")
            x = x + h * w[f"{layer}.layer_scale1.lambda1"]
            h = linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1")
            h = linear(h * 0.5 * (1 + special.erf(h / 2**0.5)), f"{layer}.mlp.fc2")
            x = x + h * w[f"{layer}.layer_scale2.lambda1"]
        found.append(norm(x, "layernorm")[0])
    return np.stack(found)


def test_equals_the_plain_form_on_a_smaller_grid(folder):
    config, params, sha256 = hf_dinov2.read(folder, NEW * PATCH)
    assert (config.image_size, len(sha256)) == (NEW * PATCH, 64)
    images = np.random.default_rng(1).normal(size=(2, NEW * PATCH, NEW * PATCH, 3))
    tensors = {
        name: np.asarray(value, np.float64)
        for name, value in weights.read_safetensors(folder / "model.safetensors").items()
    }
    with jax.default_matmul_precision("highest"):
        ours = networks.dinov2_features(params, images.astype(np.float32), config=config)
    expected = by_numpy(tensors, images.astype(np.float32))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_interpolation_keeps_what_it_must():
    np.testing.assert_allclose(hf_dinov2.bicubic(7, 7), np.eye(7), atol=1e-12)
    matrix = hf_dinov2.bicubic(37, 16)
    np.testing.assert_allclose(matrix.sum(1), 1)
    # Symmetric: turned round, the grid is the same.
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)
    assert (np.count_nonzero(matrix, axis=1) <= 4).all()


def test_a_row_of_the_feature_networks(folder, monkeypatch):
    monkeypatch.setattr(hf_dinov2, "SIZE", NEW * PATCH)
    network, about = networks.load("dinov2", str(folder))
    assert about["features"] == "dinov2" and about["features_sha256"] in network.fingerprint
    inputs = network.prepare(np.full((NEW * PATCH, NEW * PATCH, 3), 255, np.uint8))
    np.testing.assert_allclose(inputs[0, 0], [2.2489, 2.4286, 2.64], atol=1e-4)
    assert network.apply(network.params, inputs[None]).shape == (1, WIDTH)
    with pytest.raises(EvaluationError, match="dinov2"):
        networks.load("dino")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "vit"}, "expected 'dinov2'"),
        ({"use_swiglu_ffn": True}, "use ViT-L/14"),
        ({"num_hidden_layers": 3}, "missing: encoder.layer.2.attention"),
        ({"mlp_ratio": 4}, "wrong shape: encoder.layer.0.mlp.fc1"),
    ],
)
def test_other_networks_are_rejected(folder, tmp_path, change, says):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(weights.WeightsError, match=says):
        hf_dinov2.read(tmp_path, 12)


@pytest.mark.slow
def test_equals_transformers(tmp_path):
    """ViT-L/14's widths and first layers, its position embeddings for 518 pixels, images of 224."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=3,
        num_attention_heads=16,
        image_size=518,
        patch_size=14,
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    network, _ = networks.load("dinov2", str(tmp_path))
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2))).pooler_output
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(network.apply(network.params, images))
    gap = np.abs(ours - theirs.numpy()).max()
    print(f"DINOv2: largest difference {gap:.1e}")
    assert gap < 1e-4
