"""Features in parts on disk: interrupted, changed, damaged, over devices and processes.

And what is said of FID on them: nothing for a folder against itself, more for worse pictures. The
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


def test_parts_go_on_where_they_were(tmp_path):
    network, pictures = small_features.patch_means(), small_features.random_pictures(20)
    lines, seen = [], []

    def run(pictures, network=network):
        lines.clear()
        return extract.extract(pictures, network, tmp_path, batch_size=6, log=lines.append)

    def interrupted(number):
        seen.append(number)
        if number == 15:
            raise KeyboardInterrupt
        return pictures.load(number)

    with pytest.raises(KeyboardInterrupt):
        run(LazyImages(20, interrupted))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0000000_6.npz", "0000006_6.npz"]
    times = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    parts = run(pictures)
    assert len(parts.files) == 4
    for name, time in times.items():
        assert (tmp_path / name).stat().st_mtime_ns == time
    own = np.stack([pictures.load(i) for i in range(20)]).astype(np.float64)
    expected = own.reshape(20, 4, 4, 4, 4, 3).mean((2, 4)).reshape(20, -1)
    np.testing.assert_array_equal(parts.features(), expected)

    again = run(pictures)
    assert again == parts and not lines
    # Another picture, a damaged part, another network.
    changed = run(LazyImages(20, lambda i: pictures.load(99 if i == 7 else i)))
    assert changed.sha256 != parts.sha256 and not np.array_equal(changed.features()[7], expected[7])
    (tmp_path / "0000012_6.npz").write_bytes(b"PK")
    assert run(pictures) == parts
    np.testing.assert_array_equal(run(pictures).features(), expected)
    other = run(pictures, networks.random_convolutions())
    assert other.features().shape == (20, 56) and lines


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_with_eight_devices_are_one_cloud(tmp_path):
    """87 pictures in 7 batches of 13, the last of 9: four for one process, three for the other."""
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

    pictures = small_features.random_pictures(87)
    own = np.stack([pictures.load(i) for i in range(87)]).astype(np.float64)
    cloud = own.reshape(87, 4, 4, 4, 4, 3).mean((2, 4)).reshape(87, -1)
    np.testing.assert_allclose(first["mean"], cloud.mean(0), rtol=1e-12)
    covariance = np.array(first["scatter"]) / 86
    np.testing.assert_allclose(covariance, np.cov(cloud, rowvar=False), rtol=1e-9, atol=1e-9)
    merged = Statistics(87, np.array(first["mean"]), np.array(first["scatter"])).gaussian()
    other = Statistics.of(cloud + np.linspace(0, 9, cloud.shape[1])).gaussian()
    whole = frechet.distance(Statistics.of(cloud).gaussian(), other)
    assert frechet.distance(merged, other) == pytest.approx(whole, rel=1e-9)


@pytest.fixture(scope="module")
def singles():
    """Pictures of one object by its shape, 60 of circles and of crosses."""
    found = {"circle": [], "cross": []}
    index = 0
    while min(map(len, found.values())) < 60:
        scene = scenes.scene("train", index)
        index += 1
        shape = scene.objects[0].shape
        if len(scene.objects) == 1 and shape in found and len(found[shape]) < 60:
            found[shape].append(scenes.render(scene))
    return found


def cloud(pictures, folder):
    shown = LazyImages(len(pictures), pictures.__getitem__)
    network = networks.random_convolutions()
    return extract.extract(shown, network, folder, batch_size=20, log=quiet).statistics()


def noisy(picture, level):
    noise = np.random.default_rng(int(picture.sum())).normal(size=picture.shape)
    return np.clip(picture + 255 * level * noise, 0, 255).astype(np.uint8)


def blurred(picture, radius):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def test_the_distance_is_none_to_itself_and_grows_with_noise_blur_and_a_swap_of_classes(
    singles, tmp_path
):
    circles, crosses = singles["circle"], singles["cross"]
    own = circles[:30] + crosses[:30]
    reference = cloud(own, tmp_path / "reference").gaussian()
    for name, series in {
        "noise": [[noisy(p, level) for p in own] for level in (0, 0.02, 0.05, 0.1, 0.2)],
        "blur": [[blurred(p, radius) for p in own] for radius in (0, 0.5, 1, 2, 4)],
        "swap": [circles[: 30 + n] + crosses[: 30 - n] for n in (0, 10, 20, 30)],
    }.items():
        found = [
            frechet.distance(cloud(shown, tmp_path / f"{name}{i}").gaussian(), reference)
            for i, shown in enumerate(series)
        ]
        print(name, " ".join(f"{value:.3g}" for value in found))
        assert found[0] < 1e-3
        assert all(worse > better for better, worse in itertools.pairwise(found))
        # Not rounding: even the least is far above a cloud's distance to itself.
        assert found[1] > 1e-5 > 1e3 * found[0]
