"""The page and the JSON API, as an ASGI application; `Guard` stands before both.

What a client sends is never part of a path, a header or HTML here: pictures are asked for by random
identifiers, the page is one fixed text that shows words as text, and answers are JSON or PNG.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.resources
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from imagen_jax.config.schema import Config
from imagen_jax.serving.gallery import Gallery
from imagen_jax.serving.http_request import SETTINGS, ClientRequestError, Limits, parse
from imagen_jax.serving.worker import QueueFull, Worker, preview

SHOWN_IMAGES = 60
BODY_SECONDS = 10.0  # within which a body must have come
DRAIN_FACTOR = 256  # times the largest body is read of one that is too large
RETRY_SECONDS = 2


def make_app(
    worker: Worker,
    gallery: Gallery,
    configs: Sequence[Config],
    limits: Limits,
    hosts: Collection[str] = (),
) -> Guard:
    """The application.

    Args:
      worker: draws.
      gallery: the pictures it has drawn.
      configs: of the stages.
      limits: of a request.
      hosts: names in the header Host that are answered; (): any.
    """
    text, policy = _page()

    async def page(request: HttpRequest) -> Response:
        return HTMLResponse(text, headers={"content-security-policy": policy})

    async def health(request: HttpRequest) -> Response:
        state = "ready" if worker.ready else "warming up"
        return JSONResponse({"status": state, "waiting": worker.waiting()})

    async def about(request: HttpRequest) -> Response:
        return JSONResponse(_about(configs, limits))

    async def submit(request: HttpRequest) -> Response:
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise HTTPException(415, "the body must have the content type application/json")
        try:
            job = worker.submit(parse(await _body(request, limits.body), configs, limits))
        except ClientRequestError as error:
            raise HTTPException(400, str(error)) from None
        except QueueFull as error:
            raise HTTPException(429, str(error), {"retry-after": str(RETRY_SECONDS)}) from None
        return JSONResponse(job.describe() | {"ahead": worker.ahead(job)}, 202)

    async def job(request: HttpRequest) -> Response:
        found = worker.job(request.path_params["id"])
        if found is None:
            raise HTTPException(404, "no such job; finished ones are forgotten after a while")
        return JSONResponse(found.describe() | {"ahead": worker.ahead(found)})

    async def estimate(request: HttpRequest) -> Response:
        found = worker.job(request.path_params["id"])
        png = None if found is None else preview(found)
        if png is None:
            raise HTTPException(404, "nothing is being drawn under that name")
        return Response(png, media_type="image/png")

    async def pictures(request: HttpRequest) -> Response:
        return JSONResponse({"pictures": gallery.newest(SHOWN_IMAGES)})

    async def picture(request: HttpRequest) -> Response:
        file = gallery.file(request.path_params["id"])
        if file is None or not file.is_file():
            raise HTTPException(404, "no such picture; old ones are deleted")
        return FileResponse(file, headers={"cache-control": "private, max-age=86400"})

    routes = [
        Route("/", page),
        Route("/api/health", health),
        Route("/api/about", about),
        Route("/api/jobs", submit, methods=["POST"]),
        Route("/api/jobs/{id}", job),
        Route("/api/jobs/{id}/preview.png", estimate),
        Route("/api/pictures", pictures),
        Route("/pictures/{id}.png", picture),
    ]
    handlers: Any = {HTTPException: _refusal}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), hosts)


class Guard:
    """Refuses requests that another site's page makes, and adds headers to every answer.

    A page elsewhere may send what it likes to a server on loopback, and by DNS rebinding may even
    read the answer: then the header Host has that page's name, and Origin, if sent, another one.
    """

    HEADERS = (
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-resource-policy", b"same-origin"),
    )

    def __init__(self, app: Starlette, hosts: Collection[str]):
        """Wraps `app`; `hosts` as in `make_app`."""
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers one request."""

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                more = [*self.HEADERS]
                if b"cache-control" not in given:
                    more.append((b"cache-control", b"no-store"))
                if b"content-security-policy" not in given:
                    more.append((b"content-security-policy", b"default-src 'none'"))
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._hosts and _name(host) not in self._hosts:
            answer = _error(400, "this server does not go by the name in the header Host")
        elif origin is not None and urlsplit(origin).netloc != host:
            answer = _error(403, "requests from other sites are not answered")
        else:
            answer = self._app
        await answer(scope, receive, send_guarded)


async def _body(request: HttpRequest, limit: int) -> bytes:
    """The body, of which no more than `limit` bytes are ever held."""
    body, size = b"", 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                # More is thrown away for a while, so that a client comes to read the answer.
                body = body + part if size <= limit else b""
                if size > DRAIN_FACTOR * limit:
                    break
    except TimeoutError:
        raise HTTPException(408, "the body took too long", {"connection": "close"}) from None
    except ClientDisconnect:  # Nobody reads this answer.
        raise HTTPException(400, "the client has left") from None
    if size > limit:
        message = f"a request has at most {limit} bytes"
        raise HTTPException(413, message, {"connection": "close"})
    return body


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)


async def _refusal(request: HttpRequest, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail, error.headers)


def _about(configs: Sequence[Config], limits: Limits) -> dict[str, Any]:
    """What the page needs to know."""
    names = ("samples", "steps", "guidance_weight", "prompt")
    return {
        "stages": [
            {
                "name": config.name,
                "image_size": config.data.image_size,
                **{name: getattr(config.sampling, name) for name in SETTINGS},
            }
            for config in configs
        ],
        "limits": {name: getattr(limits, name) for name in names},
    }


def _page() -> tuple[str, str]:
    """The page in one file, and a policy under which it runs its own script and nothing else."""
    parts = importlib.resources.files("imagen_jax.serving") / "page"
    read = {name: parts.joinpath(f"page.{name}").read_text("utf-8") for name in ("css", "js")}
    text = parts.joinpath("page.html").read_text("utf-8")
    text = text.replace("/*style*/", read["css"]).replace("/*script*/", read["js"])
    hashes = {
        name: base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for name, part in read.items()
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['js']}'; "
        f"style-src 'sha256-{hashes['css']}'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy
