"""Files and folders in object stores, gs:// and s3://, by tensorstore.

A verb that reads a file or a folder of a bucket works on a local copy of it, and what it writes is
uploaded when it ends (`cli/staging.py`). Credentials are those that the clouds' own libraries find;
`TENSORSTORE_GCS_HTTP_URL` and `AWS_ENDPOINT_URL` name other servers. Requests that fail with 429,
500, 503 or a broken connection are repeated by tensorstore with back-off and jitter.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorstore as ts

_ADDRESS = re.compile(r"(gs|s3)://([^/]+)(?:/(.*))?", re.DOTALL)
RETRIES = 5  # Of a request; tensorstore waits 1 s after the first, up to 32 s.
THREADS = 16


class BucketError(ValueError):
    """An object store cannot be read or written; the message holds the address."""


def is_address(text: str) -> bool:
    """Whether `text` is an address that `download` and `upload` know."""
    return _ADDRESS.fullmatch(text) is not None


def patience() -> ts.Context:
    """How often tensorstore repeats a request; its own 32 times take a quarter of an hour."""
    import tensorstore as ts

    retries = {"max_retries": RETRIES}
    return ts.Context({"gcs_request_retries": retries, "s3_request_retries": retries})


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
    store, path = _open(address)
    here = _answer(address, lambda: store.read(path).result())
    if here.state == "value":
        raise BucketError(f"{address} exists; name a new one")
    nothing = here.stamp.generation  # A write on this condition does not replace an object.
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]

    def put(file: pathlib.Path) -> None:
        name = "" if file == source else f"/{file.relative_to(source).as_posix()}"
        data = file.read_bytes()
        written = _answer(
            address, lambda: store.write(f"{path}{name}", data, if_equal=nothing).result()
        )
        if not written.generation:
            raise BucketError(f"{address}{name} exists; another process has written it meanwhile")

    marks = [file for file in files if file.name in last]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(put, [file for file in files if file not in marks]))
        list(pool.map(put, marks))
    return len(files)


def _open(address: str) -> tuple[ts.KvStore, str]:
    """The bucket of an address, and the name within it."""
    import tensorstore as ts

    found = _ADDRESS.fullmatch(address)
    if not found:
        raise BucketError(f"{address} is no address of gs:// or s3://; give gs://BUCKET/NAME")
    scheme, bucket, path = found.groups()
    spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
        region = os.environ.get("AWS_REGION", os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
        spec |= {"endpoint": endpoint, "aws_region": region}
    store = _answer(address, lambda: ts.KvStore.open(spec, context=patience()).result())
    return store, (path or "").strip("/")


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
