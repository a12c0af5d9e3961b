"""LoRA of a stage: updates of kernels, training from a base, adapters apart from the stage."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.lora import LoraConfig
from imagen_jax.config.schema import Config, EmaConfig, TrainConfig
from imagen_jax.export.adapters import export_lora
from imagen_jax.export.export import export, read_average
from imagen_jax.inference.adapters import LoraSpec, parse
from imagen_jax.inference.cascade import Cascade
from imagen_jax.interop.weights import WeightsError, flatten
from imagen_jax.parallel import partitioning
from imagen_jax.stages import lora
from imagen_jax.stages.folder import load_stage, write_stage_files
from imagen_jax.stages.loss import loss_fn
from imagen_jax.stages.network import init_params
from imagen_jax.training.initial_state import abstract_state
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.train import train


def with_lora(config: Config, rank=2, alpha=3.0, targets=("*attention*",), **fields) -> Config:
    return dataclasses.replace(
        config,
        lora=LoraConfig(rank=rank, alpha=alpha, targets=targets),
        train=TrainConfig(**{"steps": 3, "log_every": 1, **fields}),
    )


def test_a_convolution_s_update_is_two_convolutions():
    """Hu et al. 2022, Eq. 3, for a kernel of 3x3: one to the rank, then one of 1x1."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, kernel = jax.random.normal(keys[0], (2, 8, 8, 5)), jax.random.normal(keys[1], (3, 3, 5, 7))
    a, b = jax.random.normal(keys[2], (3, 3, 5, 2)), jax.random.normal(keys[3], (2, 7))

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params = {"conv": {"kernel": kernel}, "lora": {"conv": {"a": a, "b": b}}}
    got = conv(x, lora.merged(params, 0.5)["conv"]["kernel"])
    np.testing.assert_allclose(got, conv(x, kernel) + 0.5 * conv(x, a) @ b, atol=1e-4)


def test_the_first_update_is_zero_and_targets_are_chosen(base_config, make_batch):
    config = with_lora(base_config, targets=("*attention*/query", "conv_in"))
    params = partitioning.unbox(init_params(config, jax.random.key(0)))
    plain = partitioning.unbox(init_params(base_config, jax.random.key(0)))
    names = {path.rsplit("/", 1)[0] for path in flatten(params["lora"])}
    assert "conv_in" in names and all(n == "conv_in" or n.endswith("/query") for n in names)
    assert len(names) > 1
    jax.tree.map(np.testing.assert_array_equal, lora.merged(params, 1.0), plain)
    batch, key = jax.tree.map(jnp.asarray, make_batch(config)), jax.random.key(1)
    losses = [loss_fn(p, batch, key, c)[0] for p, c in ((params, config), (plain, base_config))]
    assert losses[0] == losses[1]
    with pytest.raises(ConfigError, match="config.lora.targets: 'atention' matches no kernel"):
        init_params(with_lora(base_config, targets=("atention",)), jax.random.key(0))


@pytest.fixture(scope="module")
def base_stage(base_config, random_params, tmp_path_factory):
    """The folder of a stage with random weights."""
    folder = tmp_path_factory.mktemp("base_stage")
    write_stage_files(folder, random_params(base_config), base_config, {})
    return folder


@pytest.fixture(scope="module")
def trained(base_stage, base_config, make_batch, tmp_path_factory):
    """(configuration, workdir) of a LoRA trained for three steps from `base_stage`."""
    workdir = tmp_path_factory.mktemp("lora_run")
    config = with_lora(base_config, init_from=str(base_stage))
    config = dataclasses.replace(config, ema=EmaConfig(decay=0.5))
    train(config, str(workdir), lambda start: iter(lambda: make_batch(config), None), len)
    return config, workdir


@pytest.mark.slow
def test_training_changes_the_lora_alone(trained, base_stage):
    config, workdir = trained
    params, _, _ = read_average(str(workdir))
    stored = flatten(load_stage(str(base_stage)).params)
    for name, value in flatten(jax.device_get(params)).items():
        if name.startswith("lora/"):
            assert np.abs(value).max() > 0, name
        else:
            np.testing.assert_array_equal(value, stored[name], err_msg=name)


@pytest.mark.slow
def test_the_state_has_one_copy_of_the_network(trained, base_config):
    config = trained[0]
    optimizer, mesh = make_optimizer(config.optimizer, 4), partitioning.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        _, abstract = abstract_state(config, optimizer, mesh)
    sizes = {name: x.size for name, x in flatten(abstract.params).items()}
    own = sum(size for name, size in sizes.items() if name.startswith("lora/"))
    expected = sum(sizes.values()) + 3 * own  # With two moments and the average.
    total = sum(x.size for x in jax.tree.leaves(abstract) if x.size > 1)
    ones = sum(1 for x in jax.tree.leaves(abstract.params) if x.size == 1)
    assert total == expected - ones


def images(*stages, loras=()):
    cascade = Cascade.load([str(s) for s in stages], text_encoder=None, loras=loras)
    rng = np.random.default_rng(0)
    text_emb = rng.normal(size=(2, 4, 8)).astype(np.float32)
    return cascade.sample_floats(text_emb=text_emb, text_mask=np.ones((2, 4), bool), seed=1)


@pytest.mark.slow
def test_a_request_scales_the_loras_and_switches_them_off(trained, base_stage, tmp_path):
    export_lora(str(trained[1]), str(tmp_path / "adapter"), log=len)
    spec = parse(str(tmp_path / "adapter"))
    half, plain = images(base_stage, loras=[spec._replace(weight=0.5)]), images(base_stage)
    rng = np.random.default_rng(0)
    text = {"text_emb": rng.normal(size=(2, 4, 8)).astype(np.float32)}
    text["text_mask"] = np.ones((2, 4), bool)
    for keep in ("all", "one"):
        cascade = Cascade.load([str(base_stage)], text_encoder=None, loras=[spec], keep=keep)
        for scale, expected in ((0.5, half), (0.0, plain), (0.5, half)):
            settings = {"base": {"lora_scale": scale}}
            found = cascade.sample_floats(**text, seed=1, stage_settings=settings)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_merged_and_apart_sample_the_same(trained, base_stage, tmp_path):
    _, workdir = trained
    config = export(str(workdir), str(tmp_path / "merged"), log=len)
    assert config.lora.rank == 0
    export_lora(str(workdir), str(tmp_path / "adapter"), log=len)
    merged = images(tmp_path / "merged")
    spec = parse(str(tmp_path / "adapter"))
    np.testing.assert_allclose(images(base_stage, loras=[spec]), merged, atol=2e-5)
    plain = images(base_stage)
    assert np.abs(plain - merged).max() > 1e-3
    np.testing.assert_array_equal(images(base_stage, loras=[spec._replace(weight=0.0)]), plain)
    halves = [spec._replace(weight=0.25), spec._replace(weight=0.75)]
    np.testing.assert_allclose(images(base_stage, loras=halves), merged, atol=2e-5)


@pytest.mark.slow
def test_the_flag_of_sample_records_the_lora(trained, base_stage, base_config, tmp_path, capsys):
    _, workdir = trained
    adapter = str(tmp_path / "adapter")
    assert main.main(["export", "--format=lora", f"--workdir={workdir}", f"--out={adapter}"]) == 0
    rng = np.random.default_rng(0)
    given = {"text_emb": rng.normal(size=(1, 4, 8)).astype(np.float32)}
    np.savez(tmp_path / "inputs.npz", **given, text_mask=np.ones((1, 4), bool))
    found = {}
    for name, flags in (("plain", []), ("with", [f"--loras=base={adapter}@0.5"])):
        command = ["sample", f"--stages={base_stage}", "--prompt=x", f"--out={tmp_path / name}"]
        assert main.main([*command, f"--inputs={tmp_path / 'inputs.npz'}", *flags]) == 0
        cascade = Cascade.load(
            [str(base_stage)],
            text_encoder=None,
            loras=[parse(f.removeprefix("--loras=")) for f in flags],
        )
        found[name] = cascade.weight_hashes[0]
    assert found["with"].startswith(found["plain"] + "+")
    # A folder of images with another LoRA is refused.
    command = ["sample", f"--stages={base_stage}", "--prompt=x", f"--out={tmp_path / 'plain'}"]
    flags = [f"--inputs={tmp_path / 'inputs.npz'}", f"--loras={adapter}"]
    assert main.main([*command, *flags]) == 1


def test_a_specification_is_checked(base_stage, tmp_path):
    assert parse("base=a@b/c@0.5") == LoraSpec("base", "a@b/c", 0.5)
    assert parse("a@b/c") == LoraSpec("", "a@b/c", 1.0)
    with pytest.raises(ConfigError, match=r"--loras='base=' must be \[STAGE=\]PATH"):
        parse("base=")
    with pytest.raises(ConfigError, match="--loras: stage='sr' is not one of base"):
        images(base_stage, loras=[parse("sr=x")])
    with pytest.raises(WeightsError, match="nowhere is no LoRA; give a folder of"):
        images(base_stage, loras=[parse("nowhere")])


@pytest.mark.slow
def test_a_lora_of_another_network_is_refused(trained, base_config, random_params, tmp_path):
    export_lora(str(trained[1]), str(tmp_path / "adapter"), log=len)
    model = dataclasses.replace(base_config.model, channels=(16,))
    wider = dataclasses.replace(base_config, model=model)
    (tmp_path / "wider").mkdir()
    write_stage_files(tmp_path / "wider", random_params(wider), wider, {})
    with pytest.raises(WeightsError, match="of another network: it updates .* the network has"):
        images(tmp_path / "wider", loras=[parse(str(tmp_path / "adapter"))])


@pytest.mark.slow
def test_a_run_without_a_lora_has_none_to_export(base_config, make_batch, tmp_path):
    config = dataclasses.replace(base_config, train=TrainConfig(steps=1, log_every=1))
    train(config, str(tmp_path / "run"), lambda start: iter([make_batch(config)]), len)
    with pytest.raises(WeightsError, match="no LoRA; train it with --config.lora.rank=8"):
        export_lora(str(tmp_path / "run"), str(tmp_path / "out"))


@pytest.mark.slow
def test_an_adapter_folder_names_its_configuration(trained, tmp_path):
    export_lora(str(trained[1]), str(tmp_path / "adapter"), log=len)
    assert json.loads((tmp_path / "adapter" / "config.json").read_text())["lora"]["rank"] == 2
