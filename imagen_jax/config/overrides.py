"""Conversion between Config dataclasses, locked ml_collections ConfigDicts, overrides and JSON.

Dataclass defaults -> `configs/*.py` changes a locked ConfigDict -> command-line overrides ->
checked dataclass. Only the CLI and configuration files use a ConfigDict, so a misspelled field
fails before compilation.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import hashlib
import importlib.util
import json
import pathlib
import traceback
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections

from imagen_jax.config.data import ComponentConfig
from imagen_jax.config.fields import ConfigError, unknown_field, unknown_name, without_effect
from imagen_jax.config.schema import Config
from imagen_jax.config.section import make_section


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The locked, typed ConfigDict with the fields and values of `config`."""
    return make_section(config).lock()


def _coerce(path: str, hint: Any, value: Any) -> Any:
    """`value` as the type `hint`, or ConfigError."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(path, typing.get_args(hint)[0], v) for v in value)
    if typing.get_origin(hint) is dict and isinstance(value, Mapping):
        return {k: _coerce(f"{path}.{k}", typing.get_args(hint)[1], v) for k, v in value.items()}
    if type(None) in typing.get_args(hint):
        return None if value is None else _coerce(path, _inner(hint), value)
    if hint is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if typing.get_origin(hint) is None and type(value) is hint:
        return value
    expected = (
        getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
    )
    raise ConfigError(f"{path}={value!r} must be of type {expected}, got {type(value).__name__}")


def from_dict(cls: type, values: Any, path: str = "config") -> Any:
    """Builds dataclass `cls` from a mapping; checks names and types.

    A missing field gets its default, so that configurations saved before it existed still load.

    Raises:
      ConfigError: an unknown field, or a value of the wrong type.
    """
    if isinstance(values, ml_collections.ConfigDict):  # A source of a mixture.
        values = values.to_dict()
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must be a section of fields, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            raise ConfigError(unknown_field(f"{path}.{name}", name, names))
    return cls(**{n: _coerce(f"{path}.{n}", hints[n], v) for n, v in values.items()})


def from_config_dict(values: ml_collections.ConfigDict) -> Config:
    """The checked dataclass of a ConfigDict. Raises ConfigError."""
    return from_dict(Config, values.to_dict())


def override(values: ml_collections.ConfigDict, assignments: Sequence[str]) -> None:
    """Applies `a.b=value` strings in place; a value is read as the field's own type.

    Raises:
      ConfigError: unknown field (names the nearest) or a value that is not of the field's type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"config.{path} has no value; write --config.{path}=VALUE")
        *parents, leaf = path.split(".")
        node: Any = values
        for depth, name in enumerate([*parents, leaf]):
            if not isinstance(node, ml_collections.ConfigDict) or name not in node:
                names = list(node) if isinstance(node, ml_collections.ConfigDict) else []
                where = ".".join(["config", *path.split(".")[: depth + 1]])
                raise ConfigError(unknown_field(where, name, names))
            if name is not leaf or depth < len(parents):
                node = node[name]
        current = node[leaf]
        optional = _optional_type([*parents, leaf])
        if optional is not None:
            if text.lower() == "none":
                node[leaf] = None
                continue
            current = optional() if current is None else current
        node[leaf] = _parse(f"config.{path}", current, text)


def _inner(hint: Any) -> Any:
    """T of `T | None`."""
    (inner,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    return inner


def _optional_type(path: Sequence[str]) -> Any:
    """T where the field has the type `T | None`; None for every other field."""
    hint: Any = Config
    for name in path:
        if typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        elif dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(name)
    return _inner(hint) if type(None) in typing.get_args(hint) else None


def _parse(path: str, current: Any, text: str) -> Any:
    if isinstance(current, ml_collections.ConfigDict):
        raise ConfigError(f"{path} is a section; set one of its fields: {', '.join(current)}")
    if isinstance(current, str):
        return text
    if isinstance(current, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"{path}={text!r} must be true or false")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    if isinstance(current, float) and type(value) is int:
        value = float(value)
    if isinstance(current, tuple) and isinstance(value, (list, tuple)):
        return tuple(value)
    if type(value) is not type(current):
        raise ConfigError(f"{path}={text!r} must be of type {type(current).__name__}")
    return value


# Fields that do not change what a run learns, and those that do not change its compiled step.
NOT_LEARNED_FIELDS = without_effect(Config, "learns")
NOT_COMPILED_FIELDS = without_effect(Config, "compiled")


def changes(saved: Config, given: Config) -> dict[str, tuple[Any, Any]]:
    """The fields that differ and change what a run learns: path -> (saved, given).

    `train.steps` counts only when the learning rate depends on it. A fingerprint that is missing on
    one side does not count.
    """
    ignored: set[str] = set(NOT_LEARNED_FIELDS)
    if given.optimizer.schedule in ("constant", "rsqrt"):
        ignored.add("train.steps")
    olds, news = (
        flatten_fields(dataclasses.asdict(saved)),
        flatten_fields(dataclasses.asdict(given)),
    )
    # A mixture may have gained or lost sources: a field of one side only is None on the other.
    pairs = {path: (olds.get(path), news.get(path)) for path in {**olds, **news}}
    return {
        path: (old, new)
        for path, (old, new) in pairs.items()
        if old != new
        and not matches_any_field(path, ignored)
        and not (path.endswith("fingerprint") and not (old and new))
        and not (_is_source_name(path) and not _names_differ(path, olds, news))
    }


def _is_source_name(path: str) -> bool:
    return fnmatch.fnmatchcase(path, "data.name") or fnmatch.fnmatchcase(
        path, "data.mixture.*.name"
    )


def _names_differ(path: str, olds: Mapping[str, Any], news: Mapping[str, Any]) -> bool:
    """Whether the name of a source changed: only tfds has one; earlier versions saved a default."""
    kind = f"{path.removesuffix('name')}kind"
    return "tfds" in (olds.get(kind), news.get(kind)) and bool(olds.get(path) and news.get(path))


def matches_any_field(path: str, names: Collection[str]) -> bool:
    """Whether a field, or a section that contains it, matches one of `names`; * is any one name."""
    parts = path.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(field, name) for field in above for name in names)


def flatten_fields(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping: path -> value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= flatten_fields(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def from_file(file: str, name: str = "") -> ml_collections.ConfigDict:
    """Values of a configuration before overrides; also for a file that builds on another one.

    Args:
      file: a Python file with `get_config(name) -> ConfigDict` and, optionally, the valid names in
        `CONFIGS` (a dict with these keys, or a tuple).
      name: of the configuration; "": the default of `get_config`.

    Raises:
      ConfigError: the file or name does not exist, or the file raises an error.
    """
    spec = f"{file}:{name}" if name else file
    module = _execute(file, spec)
    known = list(getattr(module, "CONFIGS", ()))
    if name and known and name not in known:
        raise ConfigError(f"--config={file}: {unknown_name('name', name, known)}")
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"--config={spec}: {file} has no function get_config(name)")
    try:
        values = module.get_config(name) if name else module.get_config()
    except Exception as error:  # The file is the user's: whatever it raises is about their input.
        where = _where(file, error)
        hint = "" if known else f"; does get_config know the name {name!r}?"
        hint = hint if isinstance(error, KeyError) and name in error.args else ""
        raise ConfigError(f"--config={spec}: {where}: {_one_line(error)}{hint}") from error
    if not isinstance(values, ml_collections.ConfigDict):
        got = type(values).__name__
        call = f"get_config({name!r})" if name else "get_config()"
        raise ConfigError(f"--config={spec}: {file}: {call} returned {got}, expected a ConfigDict")
    return values


def names(file: str) -> list[str]:
    """Names of the configurations in a file, from its `CONFIGS`; []: the file declares none."""
    return list(getattr(_execute(file, file), "CONFIGS", ()))


def _execute(file: str, spec: str) -> types.ModuleType:
    """The configuration file as a module."""
    path = pathlib.Path(file)
    if not path.is_file():
        raise ConfigError(f"--config={spec}: no file {file!r}; try configs/shapes.py:base")
    module_spec = importlib.util.spec_from_file_location(f"imagen_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(
            f"--config={spec}: {file!r} is no Python file; try configs/shapes.py:base"
        )
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # As above.
        raise ConfigError(f"--config={spec}: {_where(file, error)}: {_one_line(error)}") from error
    return module


def _where(file: str, error: Exception) -> str:
    """The file and its line that raised `error`."""
    if isinstance(error, SyntaxError):
        return f"{file}, line {error.lineno}"
    path = str(pathlib.Path(file).absolute())  # As importlib has it in a traceback.
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename in (file, path)]
    return f"{file}, line {lines[-1]}" if lines else file


def _one_line(error: Exception) -> str:
    """Kind and message of a foreign error, at most 300 characters."""
    if isinstance(error, ConfigError):
        return str(error)
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}"
    return line if len(line) <= 300 else f"{line[:300]} ..."


def load(spec: str, assignments: Sequence[str] = ()) -> Config:
    """Loads `FILE[:NAME]`, applies the overrides and checks the result.

    Args:
      spec: a Python file with `get_config(name) -> ConfigDict`, optionally `:NAME`.
      assignments: `a.b=value` strings.

    Raises:
      ConfigError: the file or name does not exist, or a field or value is wrong.
    """
    file, _, name = spec.partition(":")
    values = from_file(file, name)
    try:
        _complete(values)
    except ConfigError as error:
        raise ConfigError(f"--config={spec}: {file}: {error}") from error
    override(values, assignments)
    return from_config_dict(values)


def _complete(values: ml_collections.ConfigDict) -> None:
    """Completes the sources of a mixture with default fields, so that overrides reach them."""
    for name, given in values.data.mixture.items():
        source = from_dict(ComponentConfig, given, f"config.data.mixture.{name}")
        with values.data.mixture.unlocked():
            path = f"config.data.mixture.{name}"
            values.data.mixture[name] = make_section(source, path)


def to_json(config: Config) -> str:
    """The configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


# Fields of earlier versions without a meaning today; saved configurations may contain them.
RETIRED = ("pretrain_text.mask_rate", "pretrain_text.max_captions")


def from_json(text: str) -> Config:
    """Inverse of `to_json`, of earlier versions too. Raises ConfigError."""
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ConfigError("the file is nested too deeply to be a configuration") from error
    if isinstance(values, dict):
        _update(values)
    return from_dict(Config, values)


def _update(values: dict[str, Any]) -> None:
    """Brings the values of an earlier version to the meaning of today, in place."""
    for path in RETIRED:
        section, name = path.split(".")
        if isinstance(values.get(section), dict):
            values[section].pop(name, None)
    data = values.get("data")
    if isinstance(data, dict):
        mixture = data.get("mixture")
        parts = mixture.values() if isinstance(mixture, dict) else ()
        for source in (data, *(part for part in parts if isinstance(part, dict))):
            # Text files were read by lines before the field existed.
            source.setdefault("caption_lines", True)


def fingerprint(value: Any) -> str:
    """Short stable hash of a dataclass or JSON-like value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
