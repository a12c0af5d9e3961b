"""Fields of the configuration that hold a path: each reads gs:// and s3://, others are refused."""

import dataclasses
import os
import pathlib
import typing
from unittest import mock

import pytest

from imagen_jax.cli import wiring
from imagen_jax.cli.distance_evaluator import FeatureDistances
from imagen_jax.cli.sampling_evaluators import ScoredSamples
from imagen_jax.config import overrides
from imagen_jax.config.data import ComponentConfig
from imagen_jax.config.schema import Config
from imagen_jax.config.text import TextConfig
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.sources.registry import open_source
from imagen_jax.io import buckets, copies
from imagen_jax.parallel import partitioning
from imagen_jax.stages.folder import encoder_files
from imagen_jax.text.encoders import load_text_encoder
from imagen_jax.training import initial_state, text_corpus
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.teacher import with_teacher
from tests import object_stores

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def _features(config: Config) -> None:
    FeatureDistances(config, mock.Mock(spec=Pipeline, source=range(64)), "w")


def _first_state(config: Config) -> None:
    mesh, optimizer = partitioning.make_mesh(config.mesh), make_optimizer(config.optimizer, 1)
    create, abstract = initial_state.abstract_state(config, optimizer, mesh)
    initial_state.first_state(config, create, abstract, optimizer)


# What reads each field that holds a path.
READERS = {
    "data.path": lambda c: open_source(c.data),
    "data.mixture.*.path": lambda c: open_source(c.data),
    "data.embeddings": lambda c: EmbeddingStore.open(c.data.embeddings),
    "text.path": lambda c: load_text_encoder(c.text),
    "text.vocabulary": lambda c: load_text_encoder(
        dataclasses.replace(c.text, path=str(GOLDEN / "t5_hf" / "v1_1_gated_gelu_encoder"))
    ),
    "pretrain_text.corpus": lambda c: text_corpus.read(c.pretrain_text.corpus, 1),
    "train.init_from": _first_state,
    "distill.teacher": with_teacher,
    "evaluate.prompts": lambda c: ScoredSamples(c, "w"),
    "evaluate.features": _features,
}
# Fields that hold a name, a pattern or an expression.
NAMES = {
    *("name", "checkpoint.best_metric", "embed.dtype", "lora.targets", "evaluate.averages"),
    *("evaluate.evaluators", "evaluate.scorer", "text.dtype", "text.encoder", "text.fingerprint"),
    *("text.null", "text.padding", "text.preset", "train.init_optimizer", "train.reduce_dtype"),
    *("train.trainable", "train.writers", "data.background", "data.fingerprint", "data.fit"),
    *("data.loader", "data.records", "data.resize_filter", "data.name", "data.mixture.*.name"),
    *(f"optimizer.{name}" for name in ("multipliers", "name", "schedule")),
    *(f"diffusion.aug_{name}" for name in ("noise_size", "schedule", "upsampling")),
    *(f"diffusion.{name}" for name in ("loss_weight", "prediction", "schedule")),
    *(f"model.{name}" for name in ("activation", "dtype", "name", "noise_embedding", "remat")),
    *(f"model.text_{name}" for name in ("conditioning", "norm", "pooling")),
    *(
        f"{section}sampling.{name}"
        for section in ("", "distill.")
        for name in ("dtype", "loras", "sampler", "spacing", "thresholding", "variance")
    ),
    *(
        f"data.{part}{name}"
        for part in ("", "mixture.*.")
        for name in ("caption_key", "check", "image_key", "kind", "shuffle", "split", "unique")
    ),
    *("data.where", "data.mixture.*.where", "distill.fingerprint"),
}


def texts(cls: type, prefix: str = "") -> typing.Iterator[str]:
    """Paths of the fields of a schema that hold texts."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if typing.get_origin(hint) is dict:
            hint, name = typing.get_args(hint)[1], f"{name}.*"
        if dataclasses.is_dataclass(hint):
            yield from texts(typing.cast(type, hint), f"{name}.")
        elif hint is str or str in typing.get_args(hint):
            yield name


def test_every_field_that_holds_a_text_is_one_of_these():
    found = set(texts(Config))
    assert found - NAMES == READERS.keys() and found >= NAMES


def with_address(config: Config, field: str, address: str) -> Config:
    values = overrides.to_config_dict(config)
    value = f"('inception={address}',)" if field == "evaluate.features" else address
    given = ["data.kind=webdataset", "evaluate.scorer=shapes"]
    overrides.override(values, [*given, *([] if "*" in field else [f"{field}={value}"])])
    config = overrides.from_config_dict(values)
    if "*" in field:
        mixture = {"a": ComponentConfig(kind="webdataset", path=address)}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=mixture))
    return wiring.with_home(config)


@pytest.mark.parametrize("scheme", ["gs", "s3", "hdfs"])
@pytest.mark.parametrize("field", READERS)
def test_an_address_where_nothing_is(field, scheme, base_config, tmp_path, monkeypatch):
    """The store is asked, or the address is refused; in one line, and nothing is written here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = f"{scheme}://bucket/{field.replace('*', 'a')}"
    with object_stores.in_memory() as requests, pytest.raises(Exception) as error:
        READERS[field](with_address(base_config, field, address))
    assert type(error.value).__module__.startswith("imagen_jax"), repr(error.value)
    named = address if scheme != "hdfs" else "hdfs://bucket"
    assert named in str(error.value) and "\n" not in str(error.value)
    assert bool(requests) == (scheme != "hdfs")
    assert set(os.listdir(tmp_path)) <= {"cache"}


def upload(folder: pathlib.Path, address: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            buckets.write(buckets.join(address, name), file.read_bytes())


@pytest.mark.parametrize(
    ("encoder", "folder"), [("bytes", "t5_hf/v1_1_gated_gelu_encoder"), ("bert", "bert")]
)
def test_a_text_encoder_in_a_bucket_is_that_of_a_disk(encoder, folder, monkeypatch):
    config = TextConfig(encoder=encoder, path=str(GOLDEN / folder), max_len=8)
    if encoder == "bytes":
        monkeypatch.setattr("imagen_jax.text.vocabulary.ByteVocabulary.size", 8)
    with object_stores.in_memory():
        upload(GOLDEN / folder, f"s3://bucket/{folder}")
        remote = dataclasses.replace(config, path=f"s3://bucket/{folder}/")
        found, expected = load_text_encoder(remote), load_text_encoder(config)
        assert found.fingerprint() == expected.fingerprint()


def test_a_corpus_and_a_vocabulary_in_a_bucket(tmp_path):
    line = b'["a red cross", "one red cross"]\n'
    with object_stores.in_memory():
        buckets.write("gs://bucket/corpus.jsonl", line)
        buckets.write("gs://bucket/tokenizer.json", b"{}")
        assert text_corpus.read("gs://bucket/corpus.jsonl", 9) == [["a red cross", "one red cross"]]
        # Export copies it into the stage folder.
        text = TextConfig(path=str(tmp_path), vocabulary="gs://bucket/tokenizer.json")
        (file,) = encoder_files(text).values()
        assert file.read_bytes() == b"{}"


def test_a_copy_is_made_once_and_named_by_its_address():
    with object_stores.in_memory() as requests:
        buckets.write("gs://bucket/copied/a.txt", b"x")
        with (
            pytest.raises(ValueError, match="^gs://bucket/copied is wrong$"),
            copies.reading("gs://bucket/copied") as folder,
        ):
            assert (pathlib.Path(folder) / "a.txt").read_bytes() == b"x"
            raise ValueError(f"{folder} is wrong")
        before = dict(requests)
        assert copies.local("gs://bucket/copied/") == folder
        assert dict(requests) == before
    assert copies.local("runs/a") == "runs/a"
