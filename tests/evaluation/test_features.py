"""Features in parts on disk: interrupted, changed, damaged, over devices and processes.

The distance of a set is zero to itself and grows with degradation. The
network is a small one with random weights: Frechet's distance is the same for all.
"""

import itertools
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter

from imagen_jax.evaluation.features import extract, frechet, networks
from imagen_jax.evaluation.features.extract import LazyImages
from imagen_jax.evaluation.features.frechet import Statistics
from imagen_jax.worlds.shapes import scenes
from tests.reference import small_features


def quiet(line):
    del line


def test_extraction_resumes(tmp_path):
    network, lazy_images = small_features.patch_means(), small_features.random_images(20)
    lines, seen = [], []

    def run(lazy_images, network=network):
        lines.clear()
        return extract.extract(lazy_images, network, tmp_path, batch_size=6, log=lines.append)

    def interrupted(number):
        seen.append(number)
        if number == 15:
            raise KeyboardInterrupt
        return lazy_images.load(number)

    with pytest.raises(KeyboardInterrupt):
        run(LazyImages(20, interrupted))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0000000_6.npz", "0000006_6.npz"]
    times = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    parts = run(lazy_images)
    assert len(parts.files) == 4
    for name, time in times.items():
        assert (tmp_path / name).stat().st_mtime_ns == time
    own = np.stack([lazy_images.load(i) for i in range(20)]).astype(np.float64)
    expected = own.reshape(20, 4, 4, 4, 4, 3).mean((2, 4)).reshape(20, -1)
    np.testing.assert_array_equal(parts.features(), expected)

    again = run(lazy_images)
    assert again == parts and not lines
    # Another image, a damaged part, another network.
    changed = run(LazyImages(20, lambda i: lazy_images.load(99 if i == 7 else i)))
    assert changed.sha256 != parts.sha256 and not np.array_equal(changed.features()[7], expected[7])
    (tmp_path / "0000012_6.npz").write_bytes(b"PK")
    assert run(lazy_images) == parts
    np.testing.assert_array_equal(run(lazy_images).features(), expected)
    other = run(lazy_images, networks.random_convolutions())
    assert other.features().shape == (20, 56) and lines


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_with_eight_devices_give_the_same_features(tmp_path):
    """87 images in 7 batches of 13, the last of 9: four for one process, three for the other."""
    started = []
    address = f"127.0.0.1:{free_port()}"
    for index in range(2):
        environment = {
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-m", "tests.reference.small_features"]
        started.append(
            subprocess.Popen(
                [*command, str(tmp_path), "87", "13"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in said)
    assert first == second
    assert (first["devices"], first["files"], first["count"]) == (8, 7, 87)

    lazy_images = small_features.random_images(87)
    own = np.stack([lazy_images.load(i) for i in range(87)]).astype(np.float64)
    features = own.reshape(87, 4, 4, 4, 4, 3).mean((2, 4)).reshape(87, -1)
    np.testing.assert_allclose(first["mean"], features.mean(0), rtol=1e-12)
    covariance = np.array(first["scatter"]) / 86
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)
    merged = Statistics(87, np.array(first["mean"]), np.array(first["scatter"])).gaussian()
    other = Statistics.of(features + np.linspace(0, 9, features.shape[1])).gaussian()
    whole = frechet.distance(Statistics.of(features).gaussian(), other)
    assert frechet.distance(merged, other) == pytest.approx(whole, rel=1e-9)


@pytest.fixture(scope="module")
def singles():
    """Images of single objects by shape, 60 circles and 60 crosses."""
    found = {"circle": [], "cross": []}
    index = 0
    while min(map(len, found.values())) < 60:
        scene = scenes.scene("train", index)
        index += 1
        shape = scene.objects[0].shape
        if len(scene.objects) == 1 and shape in found and len(found[shape]) < 60:
            found[shape].append(scenes.render(scene))
    return found


def statistics_of(lazy_images, folder):
    degraded = LazyImages(len(lazy_images), lazy_images.__getitem__)
    network = networks.random_convolutions()
    return extract.extract(degraded, network, folder, batch_size=20, log=quiet).statistics()


def noisy(image, level):
    noise = np.random.default_rng(int(image.sum())).normal(size=image.shape)
    return np.clip(image + 255 * level * noise, 0, 255).astype(np.uint8)


def blurred(image, radius):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def test_the_distance_is_none_to_itself_and_grows_with_noise_blur_and_a_swap_of_classes(
    singles, tmp_path
):
    circles, crosses = singles["circle"], singles["cross"]
    own = circles[:30] + crosses[:30]
    reference = statistics_of(own, tmp_path / "reference").gaussian()
    for name, series in {
        "noise": [[noisy(p, level) for p in own] for level in (0, 0.02, 0.05, 0.1, 0.2)],
        "blur": [[blurred(p, radius) for p in own] for radius in (0, 0.5, 1, 2, 4)],
        "swap": [circles[: 30 + n] + crosses[: 30 - n] for n in (0, 10, 20, 30)],
    }.items():
        found = [
            frechet.distance(statistics_of(degraded, tmp_path / f"{name}{i}").gaussian(), reference)
            for i, degraded in enumerate(series)
        ]
        print(name, " ".join(f"{value:.3g}" for value in found))
        assert found[0] < 1e-3
        assert all(worse > better for better, worse in itertools.pairwise(found))
        # Not rounding: even the least is far above a cloud's distance to itself.
        assert found[1] > 1e-5 > 1e3 * found[0]
