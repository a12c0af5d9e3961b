"""A TFDS builder of one's own: found by entry point or class, with files beside the data."""

import importlib.metadata
import json
import sys

import pytest

from imagen_jax.config import plugins
from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.sources import tfds_files
from imagen_jax.data.sources.registry import open_source

tfds = pytest.importorskip("tensorflow_datasets")
tfds_build = pytest.importorskip("imagen_jax.data.sources.tfds_build")

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


class OwnConfig(tfds.core.BuilderConfig):
    pass


class MyOwnData3D(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.3")
    BUILDER_CONFIGS = [OwnConfig(name="one"), OwnConfig(name="two")]
    url_infos = None

    def _info(self):
        features = {"image": tfds.features.Image(shape=(9, 9, 3)), "caption": tfds.features.Text()}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(3):
            image = np.full((9, 9, 3), index, np.uint8)
            yield index, {"image": image, "caption": f"{self.builder_config.name} {index}"}

    def text_files(self):
        return {"prompts_own.jsonl": ({"prompt": f"own {n}"} for n in range(2)), "empty.jsonl": []}

    def folders(self):
        return {"own_files": ((f"{n}.bin", bytes([n, 255])) for n in range(2))}


class Renamed(MyOwnData3D):
    name = "another_name"


class NoBuilder:
    pass
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    (folder / "own_package").mkdir()
    (folder / "own_package" / "__init__.py").touch()
    (folder / "own_package" / "builder.py").write_text(BUILDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "own_package.builder"
    for name in ("own_package", "own_package.builder"):
        sys.modules.pop(name, None)


@pytest.fixture
def entry_points(monkeypatch, module):
    """Declares names of the group as an installed distribution does."""
    real = importlib.metadata.entry_points

    def declare(**values):
        group = plugins.TFDS_BUILDERS
        own = [importlib.metadata.EntryPoint(n, v, group) for n, v in values.items()]

        def entry_points(**selection):
            found = real(**selection)
            return [*found, *own] if selection.get("group") == group else found

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    return declare


def captions(path, name):
    source = open_source(DataConfig(kind="tfds", path=str(path), name=name))
    return sorted(text for i in range(len(source)) for text in source.captions(i))


def test_a_class_of_ones_own(tmp_path, module):
    name = f"{module}:MyOwnData3D/two:1.2.3"
    assert captions(tmp_path, name) == ["two 0", "two 1", "two 2"]
    assert (tmp_path / "my_own_data3_d" / "two" / "1.2.3").is_dir()
    rows = (tmp_path / "prompts_own.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [{"prompt": "own 0"}, {"prompt": "own 1"}]
    assert (tmp_path / "empty.jsonl").read_text() == ""
    files = {path.name: path.read_bytes() for path in (tmp_path / "own_files").iterdir()}
    assert files == {"0.bin": b"\x00\xff", "1.bin": b"\x01\xff"}
    # What is built is read without the builder, by any of its names.
    for again in (f"{module}:MyOwnData3D", "my_own_data3_d/two", "my_own_data3_d:1.2.3"):
        assert captions(tmp_path, again) == ["two 0", "two 1", "two 2"]


def test_an_entry_point(tmp_path, module, entry_points):
    entry_points(my_own_data3_d=f"{module}:MyOwnData3D")
    assert captions(tmp_path, "my_own_data3_d/one") == ["one 0", "one 1", "one 2"]
    with pytest.raises(ConfigError, match=r"no TFDS data set, .*did you mean 'my_own_data3_d'\?"):
        captions(tmp_path, "my_own_data3")


@pytest.mark.parametrize(
    "name", ["MyOwnData3D", "ShapesWorld256", "ABCFoo", "GLUE", "Mnist", "A1B2", "own_data", "X"]
)
def test_the_folder_of_a_class_is_the_one_of_tfds(name):
    expected = tfds.core.naming.camelcase_to_snakecase(name)
    assert tfds_files.parse_name(f"some.package:{name}").folder == expected


@pytest.mark.parametrize(
    "name, parts",
    [
        ("shapes_world", ("shapes_world", "", "")),
        ("shapes_world:1.0.0", ("shapes_world", "", "1.0.0")),
        ("coco_captions/2014", ("coco_captions", "2014", "")),
        ("coco_captions/2014:1.1.0", ("coco_captions", "2014", "1.1.0")),
        ("a.b:Cls", ("a.b:Cls", "", "")),
        ("a.b:Cls:1.0.0", ("a.b:Cls", "", "1.0.0")),
        ("a.b:Cls/x/y:10.0.0", ("a.b:Cls", "x/y", "10.0.0")),
    ],
)
def test_the_parts_of_a_name(name, parts):
    assert tfds_files.parse_name(name) == parts


def test_names_that_do_not_work_are_refused_in_one_line(tmp_path, module, entry_points):
    entry_points(wrong_name=f"{module}:MyOwnData3D")
    for name, message in {
        "": "config.data.name is empty, but config.data.kind='tfds' needs a data set",
        f"{module}:NoBuilder": "is not a TFDS builder class",
        f"{module}:Missing": "cannot be imported",
        "no_such_package_x:Data": "cannot be imported",
        f"{module}:Renamed": "writes to the folder 'another_name', expected 'renamed'",
        "wrong_name": "writes to the folder 'my_own_data3_d', expected 'wrong_name'",
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            captions(tmp_path, name)
        assert len(str(error.value).splitlines()) == 1
