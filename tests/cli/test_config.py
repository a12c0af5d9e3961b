"""`--config.a.b 5`, `imagen config`, and what --help says of configurations."""

import pytest

from imagen_jax.cli import main
from imagen_jax.config import overrides

CONFIG = """
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config

CONFIGS = ("small", "large")

def get_config(name="small"):
    c = overrides.to_config_dict(Config())
    c.name = name
    c.train.steps = 7
    return c
"""


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.seed=8"], ["seed=8"]),
        (["--config.seed", "8"], ["seed=8"]),
        (["--config.diffusion.logsnr_min", "-9.5", "--workdir=x"], ["diffusion.logsnr_min=-9.5"]),
        (["--config.data.flip", "true", "--config.name", "a=b"], ["data.flip=true", "name=a=b"]),
        (["--config.name", ""], ["name="]),
        (["--config.data.path", "a b"], ["data.path=a b"]),
    ],
)
def test_an_override_in_one_word_or_two(config, arguments, expected):
    # In front of, between and behind the verb's own flags.
    own = [f"--config={config}", "--workdir=y"]
    for words in ([*arguments, *own], [own[0], *arguments, own[1]], [*own, *arguments]):
        _, flags = main.parse(["train", *words])
        assert flags.overrides == expected and flags.config == config


def test_an_override_does_not_take_the_place_of_a_positional_argument():
    _, flags = main.parse(
        ["diagnose", "--config=c.py", "--config.seed", "8", "--stages=s", "--out=o"]
    )
    assert flags.overrides == ["seed=8"]
    with pytest.raises(SystemExit):
        main.parse(["train", "--config=c.py", "--workdir=x", "--config.seed", "8", "9"])


@pytest.mark.parametrize("rest", [[], ["--config.seed=8"], ["--workdir=y"]])
def test_an_override_needs_a_value_also_for_a_boolean(rest, capsys):
    with pytest.raises(SystemExit) as exit:
        main.main(["train", "--config=c.py", "--workdir=x", "--config.data.flip", *rest])
    assert exit.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "imagen train: error: --config.data.flip needs a value: "
        "--config.data.flip=VALUE or --config.data.flip VALUE"
    )


def test_config_prints_every_field(config, capsys):
    argv = ["config", f"--config={config}:large", "--config.data.batch_size", "5"]
    assert main.main([*argv, "--config.seed=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    marked = [line.split()[1] for line in lines if line.startswith("* ")]
    assert marked == [
        "config.name",
        "config.seed",
        "config.data.batch_size",
        "config.train.steps",
    ]
    assert any("config.optimizer.b2" in line and "0.999" in line for line in lines)


def test_config_with_an_unknown_name_lists_the_valid_ones(config, capsys):
    assert main.main(["config", f"--config={config}:lagre"]) == 1
    assert capsys.readouterr().err == (
        f"imagen config: --config={config}: name='lagre' is not one of small, large; "
        "did you mean 'large'?\n"
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sampling.sampler=ddmp", "config.sampling.sampler='ddmp' is not one of"),
        ("diffusion.loss_weight=minsnr", "did you mean 'min_snr'?"),
        ("model.name=unett", "config.model.name='unett' is not one of unet, efficient_unet"),
    ],
)
@pytest.mark.parametrize("verb", [["config"], ["prepare"], ["train", "--workdir=run"]])
def test_an_unknown_row_is_rejected_before_anything_else(config, verb, override, says, capsys):
    assert main.main([*verb, f"--config={config}", f"--config.{override}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize("verb", ["train", "config", "prepare", "plan"])
def test_help_shows_sections_and_presets(verb, capsys):
    with pytest.raises(SystemExit):
        main.main([verb, "--help"])
    text = capsys.readouterr().out
    for section in ("config.data", "config.model", "config.sampling"):
        assert section in text
    for file in ("shapes.py", "imagen.py", "coco.py", "folder.py"):
        assert file in text
    for name in ("sr_1024", "sr2"):
        assert name in text


def test_presets_of_the_help_exist(capsys):
    with pytest.raises(SystemExit):
        main.main(["config", "--help"])
    text = capsys.readouterr().out
    specs = [line.strip() for line in text.splitlines() if line.startswith("  configs/")]
    assert specs
    for spec in specs:
        file, _, names = spec.partition(":")
        for name in names.split(","):
            assert overrides.load(f"{file}:{name}")
