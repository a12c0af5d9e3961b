"""Whether a bucket is in the region of this machine, as the clouds' own servers say.

Google's and Amazon's machines have a metadata server that needs no credentials. A region that
cannot be found within some seconds is unknown.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from imagen_jax.config.schema import Config
from imagen_jax.io import buckets, mirrors

TIMEOUT = 3.0  # Seconds of a request.
_GOOGLE = {"Metadata-Flavor": "Google"}
# Locations of several regions: what the names of theirs begin with.
_SEVERAL = {"us": ("us-",), "eu": ("europe-",), "asia": ("asia-",)}
_SEVERAL |= {"nam4": ("us-central1", "us-east1"), "eur4": ("europe-north1", "europe-west4")}
_SEVERAL |= {"asia1": ("asia-northeast1", "asia-northeast2")}


def check_regions(
    config: Config, workdir: str | None
) -> Iterator[tuple[Literal["ok", "warning"], str]]:
    """Findings of `doctor`: the region of each bucket of a run beside that of this machine.

    Args:
      config: of the run.
      workdir: of the run, or the mirror of one in a bucket.
    """
    paths = [config.data.path, *(source.path for source in config.data.mixture.values())]
    paths += [config.data.embeddings, config.text.path, mirrors.origin(workdir or "") or ""]
    names = [tuple(path.split("/")[:3]) for path in paths if buckets.is_address(path)]
    for scheme, _, bucket in dict.fromkeys(names):
        yield _finding(scheme.rstrip(":"), bucket)


def _finding(scheme: str, bucket: str) -> tuple[Literal["ok", "warning"], str]:
    ask_bucket, ask_machine = {
        "gs": (_google_bucket, _google_machine),
        "s3": (_amazon_bucket, _amazon_machine),
    }[scheme]
    there, here = _in_time(lambda: ask_bucket(bucket)), _in_time(ask_machine)
    known = [region or "an unknown region" for region in (there, here)]
    text = f"{scheme}://{bucket} is in {known[0]}, this machine in {known[1]}"
    if not there or not here or here == there or here.startswith(_SEVERAL.get(there, ())):
        return "ok", text
    return (
        "warning",
        f"{text}; reads across regions are slow and charged, use a bucket in {here}",
    )


def _google_bucket(bucket: str) -> str:
    """As `us-central2`; of several regions, as `us`."""
    server = os.environ.get("TENSORSTORE_GCS_HTTP_URL") or "https://storage.googleapis.com"
    token = _in_time(_google_token, requests=1)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    name = urllib.parse.quote(bucket, safe="")
    return json.loads(_get(f"{server}/storage/v1/b/{name}", headers))["location"].lower()


def _google_machine() -> str:
    # projects/1/zones/us-central2-b
    return _metadata("zone").rpartition("/")[2].rpartition("-")[0]


def _google_token() -> str:
    return json.loads(_metadata("service-accounts/default/token"))["access_token"]


def _metadata(name: str) -> str:
    host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    return _get(f"http://{host}/computeMetadata/v1/instance/{name}", _GOOGLE)


def _amazon_bucket(bucket: str) -> str:
    server = os.environ.get("AWS_ENDPOINT_URL") or "https://s3.amazonaws.com"
    request = urllib.request.Request(
        f"{server}/{urllib.parse.quote(bucket, safe='')}", method="HEAD"
    )
    try:
        headers = urllib.request.urlopen(request, timeout=TIMEOUT).headers
    except urllib.error.HTTPError as error:  # Also where the bucket may not be read.
        headers = error.headers
    return headers["x-amz-bucket-region"] or ""


def _amazon_machine() -> str:
    server = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
    seconds = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _get(f"{server}/latest/api/token", seconds, "PUT")
    path = f"{server}/latest/meta-data/placement/region"
    return _get(path, {"X-aws-ec2-metadata-token": token})


def _get(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return answer.read().decode()


def _in_time(ask: Callable[[], str], *, requests: int = 3) -> str | None:
    """The answer; None: an error, or none in time (a look-up of a name has no limit of its own)."""
    found: list[str] = []

    def run() -> None:
        try:
            found.append(ask())
        except (OSError, ValueError, KeyError, TypeError):
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(requests * TIMEOUT)
    return found[0] if found and found[0] else None
