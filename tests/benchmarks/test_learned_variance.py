"""benchmarks/learned_variance.py: its bound, its trainings and, on untrained stages, its table."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import learned_variance

from imagen_jax.cli import main
from imagen_jax.config.text import PretrainTextConfig, TextConfig
from imagen_jax.diffusion import likelihood, process
from imagen_jax.stages.conditioning import Text
from imagen_jax.stages.folder import write_stage
from imagen_jax.worlds.shapes import scenes


def test_terms_of_1000_steps_are_those_of_the_training_bound(base_config, monkeypatch):
    """Same estimates, times and noise: the chain of the sampler is that of the loss."""
    config = dataclasses.replace(
        base_config,
        model=dataclasses.replace(base_config.model, out_channels=6),
        sampling=dataclasses.replace(base_config.sampling, variance="learned"),
    )
    rng = np.random.default_rng(0)
    x0, x0_hat, eps = jnp.asarray(rng.uniform(-1, 1, (3, 2, 8, 8, 3)), jnp.float32)
    gamma = jnp.asarray(rng.uniform(size=x0.shape), jnp.float32)
    monkeypatch.setattr(learned_variance, "predict", lambda *_: [(x0_hat, gamma)])
    text = Text(np.zeros((2, 4, 8), np.float32), np.ones((2, 4), bool))
    for step in (2, 40, 500, 1000):
        times = jnp.array([step + 1, step, step - 1]) / 1000
        levels = process.logsnr_at(times, config.diffusion)
        found = learned_variance.bound_term.__wrapped__(None, config, x0, text, eps, levels, False)
        expected = likelihood.step_bound(x0, x0_hat, gamma, jnp.full(2, times[1]), config.diffusion)
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_fixed_variance_is_that_of_the_settings(base_config, monkeypatch):
    """With the posterior's variance and the true x0, the model's step is the posterior: no bits."""
    rng = np.random.default_rng(0)
    x0 = jnp.asarray(rng.uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)
    monkeypatch.setattr(learned_variance, "predict", lambda *_: [(x0, jnp.ones_like(x0))])
    levels = process.logsnr_at(jnp.array([0.6, 0.5, 0.4]), base_config.diffusion)
    bits = {}
    for gamma in (0.0, 1.0):
        sampling = dataclasses.replace(base_config.sampling, variance="fixed", gamma=gamma)
        config = dataclasses.replace(base_config, sampling=sampling)
        terms = learned_variance.bound_term.__wrapped__(None, config, x0, None, x0, levels, False)
        bits[gamma] = float(terms.max())
    assert abs(bits[0.0]) < 1e-6 and bits[1.0] > 1e-2


@pytest.mark.slow
def test_the_table_of_untrained_stages(
    base_config, sr_config, random_params, write_world, tmp_path, monkeypatch, capsys
):
    demo, out = tmp_path / "demo", tmp_path / "out"
    (demo / "data").mkdir(parents=True)
    rows = [scenes.prompt_row(scenes.scene("held_out", index)) for index in range(3)]
    (demo / "data" / "prompts_held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = PretrainTextConfig(emb_dim=8, num_layers=1, num_heads=1, mlp_dim=8, steps=1)
    world = dataclasses.replace(base_config, pretrain_text=small)
    flags = [f"--config={write_world(demo, world, steps=1, every=1)}", f"--out={demo / 'text'}"]
    assert main.main(["pretrain_text", *flags]) == 0

    def write(path: pathlib.Path, config, size: int, lowres: int, channels: int = 3) -> None:
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, image_size=size, lowres_size=lowres),
            model=dataclasses.replace(config.model, out_channels=channels),
            sampling=dataclasses.replace(config.sampling, steps=2),
            text=TextConfig(path=str(demo / "text")),
            pretrain_text=small,
        )
        write_stage(path, random_params(config), config, {})

    write(demo / "stages" / "sr", sr_config, 64, 16)
    write(out / "stages" / "fixed", base_config, 16, 0)
    write(out / "stages" / "learned", base_config, 16, 0, channels=6)
    flags = [f"--demo={demo}", f"--out={out}", "--count=3", "--images=3", "--sampler_steps=2,3"]
    monkeypatch.setattr(sys, "argv", ["learned_variance.py", *flags])
    learned_variance.main()
    table, gammas = capsys.readouterr().out.split("| variance |")[1].split("| logsnr |")
    assert len(table.splitlines()) == 2 + 6 and len(gammas.splitlines()) == 2 + 1
    scores = json.loads((out / "scores.json").read_text())
    bits = {name: cell["bound"]["mean"] for name, cell in scores.items()}
    assert all(np.isfinite(list(bits.values()))) and len(set(bits.values())) == 6
    learned_variance.main()  # Everything is there.
    assert "$" not in capsys.readouterr().out


def test_the_trainings_differ_in_the_variance_alone(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(learned_variance, "imagen", lambda verb, *flags: commands.append(flags))
    flags = ["--demo=DEMO", f"--out={tmp_path}", "--sampler_steps=25", "--prediction=v"]
    monkeypatch.setattr(sys, "argv", ["learned_variance.py", *flags])
    monkeypatch.setattr(learned_variance, "score", lambda *_: None)
    monkeypatch.setattr(learned_variance, "table", lambda scores: "")
    monkeypatch.setattr(learned_variance, "gammas", lambda args: "")
    learned_variance.main()
    fixed, _, learned, _ = map(set, commands)
    assert "--config.diffusion.prediction=v" in fixed & learned
    assert {flag.split("=")[0] for flag in fixed ^ learned} == {
        "--workdir",
        "--config.model.out_channels",
        "--config.diffusion.vlb_weight",
    }
