"""Every device gets the rows that are its own, whatever the processes, mesh and device order."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax.config.schema import CheckpointConfig, TrainConfig
from imagen_jax.data.embeddings.store import describe_unit, unit_name, write_manifest, write_unit
from tests.conftest import CONFIG_FILE, DIM, LENGTH, SIZE
from tests.reference.processes import finish, start

ROOT = pathlib.Path(__file__).parents[2]
PROBE = ROOT / "tests" / "reference" / "placement_probe.py"
RECORDS, BATCH = 300, 8
# Largest relative difference of losses and parameters after 20 float32 steps, by order of sums.
TOLERANCE = 2e-4

# Processes, devices of each, mesh.
LAYOUTS = {
    "1x4": (1, 4, {}),
    "2x2": (2, 2, {}),
    "2x2 tensor2 within": (2, 2, {"tensor": 2, "data": 2}),
    "2x2 tensor4": (2, 2, {"tensor": 4, "data": 1}),
    "4x1 tensor2": (4, 1, {"tensor": 2, "data": 2}),
    "4x1 tensor4": (4, 1, {"tensor": 4, "data": 1}),
    "2x2 data2 fsdp2": (2, 2, {"data": 2, "fsdp": 2}),
    "2x2 fsdp4": (2, 2, {"data": 1, "fsdp": 4}),
    "4x1 fsdp4": (4, 1, {"data": 1, "fsdp": 4}),
    # Each process stands for a slice.
    "2x2 slices2": (2, 2, {"dcn_data": 2}),
    "2x2 slices2 fsdp4": (2, 2, {"data": 1, "fsdp": 2, "dcn_data": 1, "dcn_fsdp": 2}),
    "4x1 slices4": (4, 1, {"dcn_data": 2, "dcn_fsdp": 2}),
}
ORDERS = ("straight", "reversed", "v6e")


@pytest.fixture(scope="module")
def numbered(base_config, tmp_path_factory) -> pathlib.Path:
    """A configuration of images whose pixels hold their record number, each with its caption."""
    folder = tmp_path_factory.mktemp("numbered")
    image_folder, store = folder / "images", folder / "embeddings"
    image_folder.mkdir()
    store.mkdir()
    captions = [f"record {i}" for i in range(RECORDS)]
    for i, caption in enumerate(captions):
        pixels = np.full((SIZE, SIZE, 3), (i % 256, i // 256, 7), np.uint8)
        Image.fromarray(pixels).save(image_folder / f"{i:04d}.png")
        (image_folder / f"{i:04d}.txt").write_text(caption)
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=(3, DIM)).astype(ml_dtypes.bfloat16) for _ in captions]
    unit = store / unit_name(captions, encoder="fake")
    write_unit(unit, captions, vectors)
    write_manifest(store, [describe_unit(unit)], {"encoder": "fake", "max_len": LENGTH})
    data = dataclasses.replace(
        base_config.data,
        kind="folder",
        path=str(image_folder),
        embeddings=str(store),
        loader="numpy",
        batch_size=BATCH,
    )
    model = dataclasses.replace(base_config.model, channels=(32,), head_dim=8, dropout=0.1)
    config = dataclasses.replace(
        base_config,
        data=data,
        model=model,
        diffusion=dataclasses.replace(base_config.diffusion, cond_drop_prob=0.4),
        # Key biases have no gradient but rounding, which a small eps would scale to full steps.
        optimizer=dataclasses.replace(base_config.optimizer, eps=1e-3),
        train=TrainConfig(steps=20, log_every=1),
        checkpoint=CheckpointConfig(every=20),
    )
    path = folder / "numbered.py"
    path.write_text(CONFIG_FILE.format(json=json.dumps(dataclasses.asdict(config))))
    return path


def run(what: str, spec: pathlib.Path, layout: str, orders: str, out: pathlib.Path, *flags: str):
    """Runs the probe in all processes of a layout."""
    processes, devices, mesh = LAYOUTS[layout]
    axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    command = [sys.executable, PROBE, what, spec, orders, out, *axes, *flags]
    finish(start(command, processes, devices))


def read_table(out: str, processes: int) -> dict[tuple[int, int], dict]:
    """(step, row) -> what reached it; every device that holds a row must agree."""
    found: dict[tuple[int, int], dict] = {}
    for index in range(processes):
        for entry in json.loads(pathlib.Path(f"{out}.{index}.json").read_text()):
            at = entry.pop("step"), entry.pop("row")
            entry.pop("device")
            assert found.setdefault(at, entry) == entry, f"replicas of {at} differ"
    return found


@pytest.fixture(scope="module")
def expected(numbered, tmp_path_factory):
    """The table of one process with four devices in their own order."""
    out = tmp_path_factory.mktemp("expected") / "table"
    run("table", numbered, "1x4", "straight", out)
    table = read_table(f"{out}.straight.numpy", 1)
    assert len(table) == 3 * BATCH
    assert len({row["noise"] for row in table.values()}) == len(table)
    assert len({row["record"] for (step, _), row in table.items() if step == 0}) == BATCH
    assert {row["drop"] for row in table.values()} == {True, False}
    return table


def check_tables(numbered, expected, tmp_path, layout, orders):
    run("table", numbered, layout, ",".join(orders), tmp_path / "table")
    loaders = ["numpy"] + ["seqio"] * (importlib.util.find_spec("tensorflow") is not None)
    for order in orders:
        for loader in loaders:
            table = read_table(f"{tmp_path / 'table'}.{order}.{loader}", LAYOUTS[layout][0])
            assert table == expected, (order, loader)


QUICK = ("4x1 tensor2",)


@pytest.mark.parametrize("layout", QUICK)
def test_rows_reach_their_devices(numbered, expected, tmp_path, layout):
    check_tables(numbered, expected, tmp_path, layout, ORDERS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in QUICK])
def test_rows_reach_their_devices_on_every_mesh(numbered, expected, tmp_path, layout):
    check_tables(numbered, expected, tmp_path, layout, ORDERS)


@pytest.fixture(scope="module")
def trained(numbered, tmp_path_factory):
    """Losses and parameters after 20 steps of one process with four devices."""
    out = tmp_path_factory.mktemp("trained") / "one"
    run("train", numbered, "1x4", "straight", out)
    return results(f"{out}.straight")


def results(out: str):
    lines = (pathlib.Path(f"{out}.run") / "metrics.jsonl").read_text().split("\n")
    losses = [json.loads(line)["loss"] for line in lines if line]
    return losses, dict(np.load(f"{out}.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1x4"])
def test_twenty_steps_agree(numbered, trained, tmp_path, layout):
    """With dropout and dropped captions, in every order of the devices."""
    run("train", numbered, layout, ",".join(ORDERS), tmp_path / "run")
    expected_losses, expected_params = trained
    for order in ORDERS:
        losses, params = results(f"{tmp_path / 'run'}.{order}")
        assert len(losses) == 20
        np.testing.assert_allclose(losses, expected_losses, rtol=TOLERANCE, err_msg=order)
        for name, value in expected_params.items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(
                params[name], value, atol=TOLERANCE * scale, err_msg=f"{order} {name}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["2x2 slices2", "2x2 slices2 fsdp4"])
def test_a_run_of_two_slices_restarts_with_one(numbered, trained, tmp_path, layout):
    """At the same global batch: ten steps on two slices, ten more on one of them."""
    run("train", numbered, layout, "straight", tmp_path / "run", "--config.train.steps=10")
    first, _ = results(f"{tmp_path / 'run'}.straight")
    assert len(first) == 10
    processes, devices, _ = LAYOUTS[layout]
    command = [sys.executable, PROBE, "train", numbered, "straight", tmp_path / "run"]
    # The mesh of the configuration: all devices of the slice along data.
    finish(start(command, processes // 2, devices))
    losses, params = results(f"{tmp_path / 'run'}.straight")
    expected_losses, expected_params = trained
    assert losses[:10] == first and len(losses) == 20
    np.testing.assert_allclose(losses, expected_losses, rtol=TOLERANCE)
    for name, value in expected_params.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(params[name], value, atol=TOLERANCE * scale, err_msg=name)
