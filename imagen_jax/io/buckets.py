"""Files and folders in object stores, gs:// and s3://, by tensorstore.

The only module that talks to a store. Small results of verbs are copied (`cli/staging.py`); data,
embeddings and checkpoints are read by ranges. Credentials are those that the clouds' own libraries
find; `TENSORSTORE_GCS_HTTP_URL` and `AWS_ENDPOINT_URL` name other servers. Requests that fail with
429, 500, 503 or a broken connection are repeated by tensorstore with back-off and jitter.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import tensorstore as ts

_ADDRESS = re.compile(r"(gs|s3)://([^/]+)(?:/(.*))?", re.DOTALL)
RETRIES = 8  # Of a request; the waits double from 0.2 s to 32 s, about a minute together.
THREADS = 16
# A connection without a byte for so many seconds is broken.
_SILENCE = {
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}


class BucketError(OSError, ValueError):
    """An object store cannot be read or written; the message holds the address."""


class MissingError(BucketError, FileNotFoundError):
    """There is no such object."""


class ExistsError(BucketError, FileExistsError):
    """An object exists that must be new: another process has written it."""


class Content(NamedTuple):
    """What a read returns.

    Attributes:
      data: the bytes.
      tag: of the version of the object (its generation or ETag); another one after every write.
    """

    data: bytes
    tag: str


def is_address(text: str) -> bool:
    """Whether `text` is an address in a store that this module knows."""
    return _ADDRESS.fullmatch(text) is not None


def patience() -> ts.Context:
    """How often tensorstore repeats a request; its own 32 times take a quarter of an hour."""
    import tensorstore as ts

    retries = {"max_retries": RETRIES, "initial_delay": "200ms", "max_delay": "32s"}
    return ts.Context({"gcs_request_retries": retries, "s3_request_retries": retries})


def join(address: str, *names: str) -> str:
    """An address below another one."""
    return "/".join([address.rstrip("/"), *names])


def kvstore(address: str) -> ts.KvStore:
    """The objects below a folder by name, for libraries that read through tensorstore."""
    bucket, path = _open(address)
    return bucket / f"{path}/" if path else bucket


def read(address: str, offset: int = 0, size: int | None = None) -> Content:
    """Reads an object, or `size` bytes of it from `offset` on.

    Raises:
      MissingError: there is no such object.
      BucketError: it has fewer bytes, or the store does not answer.
    """
    store, key = _open(address)
    span = None if size is None and not offset else slice(offset, size and offset + size)
    found = _answer(address, lambda: store.read(key, byte_range=span).result())
    if found.state != "value":
        raise MissingError(f"{address} does not exist")
    if size is not None and len(found.value) != size:
        raise BucketError(f"{address} has become shorter")
    return Content(found.value, found.stamp.generation.hex())


def tag(address: str) -> str:
    """`Content.tag` of an object; "": there is none."""
    store, key = _open(address)
    found = _answer(address, lambda: store.read(key, byte_range=slice(0, 0)).result())
    return found.stamp.generation.hex() if found.state == "value" else ""


def write(address: str, data: bytes, *, new: bool = False, replaces: str = "") -> None:
    """Writes an object; readers see the whole of it or what was there before.

    Args:
      address: of the object.
      data: its content.
      new: of several processes that write the object, one succeeds.
      replaces: tag of the version to replace; "": any.

    Raises:
      ExistsError: the object exists, and `new` is set, or it is no longer what it `replaces`.
      BucketError: the store does not answer.
    """
    store, key = _open(address)
    expected = _nothing() if new else bytes.fromhex(replaces) or None
    written = _answer(address, lambda: store.write(key, data, if_equal=expected).result())
    # A write whose answer was lost is repeated, and then finds its own object.
    if not written.generation and not _holds(address, data):
        raise ExistsError(f"{address} exists; another process has written it meanwhile")


def _holds(address: str, data: bytes) -> bool:
    try:
        return read(address).data == data
    except MissingError:
        return False


def is_inside(name: str) -> bool:
    """Whether the name of an object below a folder is a path that stays inside of it."""
    return all(part not in ("", ".", "..") for part in name.split("/")) and "\0" not in name


def names(address: str) -> list[str]:
    """Names of the objects below a folder, relative to it, sorted; [] if there are none."""
    store, path = _open(address)
    return sorted(_below(store, path, address))


def delete(addresses: Iterable[str]) -> None:
    """Deletes objects; those that do not exist are skipped."""

    def remove(address: str) -> None:
        store, key = _open(address)
        _answer(address, lambda: store.write(key, None).result())

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(remove, addresses))


@functools.cache
def _nothing() -> bytes:
    """The generation of an object that does not exist, in every store."""
    import tensorstore as ts

    store = ts.KvStore.open({"driver": "memory"}).result()
    return store.read("missing").result().stamp.generation


def download(address: str, folder: pathlib.Path) -> pathlib.Path:
    """Copies an object, or all objects below an address.

    Args:
      address: of an object, or of a "folder", whose objects begin with it and a slash.
      folder: local, of the copies.

    Returns:
      The copy: a file or a folder in `folder`, with the last name of the address.

    Raises:
      BucketError: there is nothing, or the store does not answer.
    """
    store, path = _open(address)
    target = folder / (path.rpartition("/")[2] or "bucket")
    names = [""] if path and _exists(store, path, address) else list(_below(store, path, address))
    if not names:
        raise BucketError(f"{address} holds nothing; check the address and the rights to list it")

    def copy(name: str) -> None:
        key = path if not name else f"{path}/{name}".lstrip("/")
        content = _answer(address, lambda: store.read(key).result())
        if content.state != "value":
            raise BucketError(f"{address}: {key} was removed while it was copied")
        local = target / name if name else target
        if not local.resolve().is_relative_to(folder.resolve()):
            raise BucketError(f"{address}: the name {name!r} leads out of the folder")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(content.value)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, names))
    return target


def check_free(address: str) -> None:
    """Raises BucketError if an address names a bucket alone, is in use, or cannot be listed."""
    store, path = _open(address)
    if not path:
        raise BucketError(f"{address} is a bucket; add a name, as gs://BUCKET/NAME")
    if _exists(store, path, address) or next(_below(store, path, address), None):
        raise BucketError(f"{address} exists; name a new one")


def upload(source: pathlib.Path, address: str, *, last: Sequence[str] = ()) -> int:
    """Uploads a file, or all files of a folder; of several writers of an object one succeeds.

    Args:
      source: the file or folder.
      address: of the object, or of the folder.
      last: names of files that mark a folder as complete, uploaded after the others.

    Returns:
      The number of objects.

    Raises:
      BucketError: an object exists, or the store does not answer.
    """
    if tag(address):
        raise BucketError(f"{address} exists; name a new one")
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]

    def put(file: pathlib.Path) -> None:
        name = "" if file == source else f"/{file.relative_to(source).as_posix()}"
        write(f"{address.rstrip('/')}{name}", file.read_bytes(), new=True)

    marks = [file for file in files if file.name in last]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(put, [file for file in files if file not in marks]))
        list(pool.map(put, marks))
    return len(files)


def _open(address: str) -> tuple[ts.KvStore, str]:
    """The bucket of an address, and the name within it."""
    found = _ADDRESS.fullmatch(address)
    if not found:
        raise BucketError(f"{address} is no address of gs:// or s3://; give gs://BUCKET/NAME")
    scheme, bucket, path = found.groups()
    server = [os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL", "TENSORSTORE_GCS_HTTP_URL")]
    store = _answer(address, lambda: _bucket(scheme, bucket, *server, retries=RETRIES))
    return store, (path or "").strip("/")


@functools.lru_cache(64)
def _bucket(scheme: str, bucket: str, endpoint: str, gcs: str, *, retries: int) -> ts.KvStore:
    """The connection to a bucket; the arguments are those that it depends on."""
    import tensorstore as ts

    del gcs, retries  # tensorstore and `patience` read them.
    for name, value in _SILENCE.items():
        os.environ.setdefault(name, value)
    spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket}
    if scheme == "s3" and endpoint:
        region = os.environ.get("AWS_REGION", os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
        spec |= {"endpoint": endpoint, "aws_region": region}
    return ts.KvStore.open(spec, context=patience()).result()


def _exists(store: ts.KvStore, key: str, address: str) -> bool:
    import tensorstore as ts

    span = ts.KvStore.KeyRange(key, key + "\0")
    return key.encode() in _answer(address, lambda: store.list(span).result())


def _below(store: ts.KvStore, path: str, address: str) -> Iterator[str]:
    """Names of the objects below a folder, relative to it."""
    import tensorstore as ts

    prefix = f"{path}/" if path else ""
    span = ts.KvStore.KeyRange(prefix, prefix[:-1] + "0" if prefix else "")  # "0" follows "/".
    for key in _answer(address, lambda: store.list(span).result()):
        name = key.decode("utf-8", "surrogateescape")
        # Consoles make empty objects for folders.
        if name.startswith(prefix) and not name.endswith("/"):
            yield name.removeprefix(prefix)


def _answer(address: str, request: Callable[[], Any]) -> Any:
    """The result of a request. Raises BucketError, in one line."""
    try:
        return request()
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, BucketError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise BucketError(f"{address} cannot be used ({reason})") from error
