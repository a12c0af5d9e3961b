"""The effects that the schema declares per field, and fields that may be None."""

import dataclasses
import json

import pytest

from imagen_jax.config import overrides
from imagen_jax.config.data import ComponentConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config, DataConfig, ModelConfig
from imagen_jax.config.text import TextConfig

# The lists of paths that the metadata replaced.
NOT_LEARNED = (
    *("name", "data.path", "data.embeddings", "data.loader", "data.prefetch"),
    *("data.max_quarantined", "data.check", "data.mixture.*.path", "data.reads"),
    *("data.caption_lines", "data.mixture.*.caption_lines", "data.records"),
    *("data.mixture.*.max_quarantined", "data.mixture.*.check"),
    *("text.path", "text.vocabulary", "text.preset", "text.dtype", "text.on_the_fly"),
    *("pretrain_text", "embed", "model.remat", "train.log_every", "train.sample_every"),
    *("train.profile_at", "train.nan_patience", "train.rollbacks", "train.accumulation"),
    *("train.spike_factor", "train.hang_timeout", "train.heartbeat_timeout", "train.writers"),
    *("train.checksum_every", "evaluate"),
    *("checkpoint", "ema.snapshot_every", "mesh", "sampling", "distill.teacher"),
)
NOT_COMPILED = (
    *("name", "data.kind", "data.path", "data.name", "data.split", "data.image_key"),
    *("data.caption_key", "data.resize_filter", "data.min_size", "data.max_quarantined"),
    *("data.embeddings", "data.fingerprint", "data.loader", "data.prefetch"),
    *(f"text.{field.name}" for field in dataclasses.fields(TextConfig) if field.name != "null"),
    *("data.background", "data.caption_lines", "data.mixture.*.caption_lines"),
    *("data.records", "data.reads", "data.shuffle", "data.where", "data.unique"),
    *(f"data.mixture.*.{name}" for name in ("shuffle", "where", "unique")),
    *("pretrain_text", "embed", "checkpoint", "sampling", "ema.snapshot_every"),
    *("mesh.cpu_devices", "train.overfit_batch", "train.nan_patience", "train.rollbacks"),
    *("train.profile_at", "train.log_every", "train.sample_every"),
    *("train.spike_factor", "train.hang_timeout", "train.heartbeat_timeout", "train.writers"),
    *("train.checksum_every", "evaluate", "data.held_out", "distill.fingerprint"),
    # The source of a mixture has the fields of a source.
    *(f"data.mixture.*.{name}" for name in ("kind", "path", "name", "split", "image_key")),
    *(f"data.mixture.*.{name}" for name in ("caption_key", "min_size", "max_quarantined")),
)


@pytest.mark.parametrize(
    ("derived", "listed"),
    [
        (overrides.NOT_LEARNED_FIELDS, NOT_LEARNED),
        (overrides.NOT_COMPILED_FIELDS, NOT_COMPILED),
    ],
    ids=["learns", "compiled"],
)
def test_the_metadata_selects_the_listed_fields(derived, listed):
    config = Config(data=DataConfig(mixture={"own": ComponentConfig()}))
    paths = overrides.flatten_fields(dataclasses.asdict(config))
    found, expected = (
        {path for path in paths if overrides.matches_any_field(path, names)}
        for names in (derived, listed)
    )
    assert found == expected
    assert 20 < len(found) < len(paths) - 20


def test_a_command_line_sets_an_optional_field_and_unsets_it():
    values = overrides.to_config_dict(Config())
    assert values.model.skip_scale is None
    for text, expected in (("0.7", 0.7), ("1", 1.0), ("None", None), ("0.5", 0.5)):
        overrides.override(values, [f"model.skip_scale={text}"])
        found = overrides.from_config_dict(values).model.skip_scale
        assert found == expected and type(found) is type(expected)
    with pytest.raises(ConfigError, match="config.model.skip_scale='half' must be of type float"):
        overrides.override(values, ["model.skip_scale=half"])
    with pytest.raises(ConfigError, match="config.model.dropout='None' must be of type float"):
        overrides.override(values, ["model.dropout=None"])


def test_json_keeps_an_optional_field():
    for value in (None, 0.5):
        config = Config(model=ModelConfig(skip_scale=value))
        assert overrides.from_json(overrides.to_json(config)) == config
    values = json.loads(overrides.to_json(Config()))
    values["model"]["skip_scale"] = "half"
    with pytest.raises(ConfigError, match=r"config.model.skip_scale='half' must be of type float"):
        overrides.from_json(json.dumps(values))
    values["model"]["skip_scale"] = 1
    assert type(overrides.from_json(json.dumps(values)).model.skip_scale) is float
