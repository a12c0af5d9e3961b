"""Routes of the page and of the JSON API, as an ASGI application.

`http_request` validates what a client sends; none of it becomes part of a path, a header or HTML.
Images are addressed by random identifiers, the page is a constant that shows strings as text, and
responses are JSON or PNG.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from imagen_jax.config.schema import Config
from imagen_jax.serving import http_request
from imagen_jax.serving.access import Access, Guard
from imagen_jax.serving.gallery import Gallery
from imagen_jax.serving.http_request import LORAS, SETTINGS, ClientRequestError, Limits
from imagen_jax.serving.worker import QueueFull, Worker, WorkerFailed

SHOWN_IMAGES = 60
RETRY_SECONDS = 2
NO_JOB = "no such job; the server forgets finished jobs after a while"


def make_app(
    worker: Worker,
    gallery: Gallery,
    configs: Sequence[Config],
    limits: Limits,
    access: Access,
) -> Guard:
    """Builds the application.

    Args:
      worker: samples the images.
      gallery: holds the finished images.
      configs: of the stages.
      limits: of a request.
      access: which requests are answered.
    """
    text, policy = _page()

    async def page(request: Request) -> Response:
        return HTMLResponse(text, headers={"content-security-policy": policy})

    async def health(request: Request) -> Response:
        status = {"status": worker.state, "waiting": worker.waiting()}
        return JSONResponse(status, 503 if worker.state == "failed" else 200)

    async def metrics(request: Request) -> Response:
        return Response(worker.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def about(request: Request) -> Response:
        return JSONResponse(_about(configs, limits))

    async def images(request: Request) -> Response:
        return JSONResponse({"images": gallery.newest(SHOWN_IMAGES)})

    async def image(request: Request) -> Response:
        file = gallery.file(request.path_params["id"])
        if file is None or not file.is_file():
            raise HTTPException(404, "no such image; the server deletes old ones")
        return FileResponse(file, headers={"cache-control": "private, max-age=86400"})

    routes = [
        Route("/", page),
        Route("/api/health", health),
        Route("/metrics", metrics),
        Route("/api/about", about),
        *_job_routes(worker, configs, limits),
        Route("/api/images", images),
        Route("/images/{id}.png", image),
    ]
    handlers: Any = {
        HTTPException: _http_error,
        ClientRequestError: _client_request_error,
        QueueFull: _queue_full,
        WorkerFailed: _worker_failed,
    }
    guard = Guard(Starlette(routes=routes, exception_handlers=handlers), access, worker.metrics)
    worker.metrics.watch("connections", "Open connections.", lambda: len(guard.connections))
    return guard


def _job_routes(worker: Worker, configs: Sequence[Config], limits: Limits) -> list[Route]:
    async def submit(request: Request) -> Response:
        validated = await http_request.read_request(
            request.headers, request.receive, configs, limits
        )
        job = worker.submit(validated)
        return JSONResponse(job.describe() | {"ahead": worker.ahead(job)}, 202)

    async def job(request: Request) -> Response:
        found = worker.job(request.path_params["id"])
        if found is None:
            raise HTTPException(404, NO_JOB)
        return JSONResponse(found.describe() | {"ahead": worker.ahead(found)})

    async def cancel(request: Request) -> Response:
        found = worker.cancel(request.path_params["id"])
        if found is None:
            raise HTTPException(404, NO_JOB)
        return JSONResponse(found.describe())

    async def job_preview(request: Request) -> Response:
        found = worker.job(request.path_params["id"])
        preview = None if found is None else found.preview
        if preview is None:
            raise HTTPException(404, "no job of this name is being sampled")
        return Response(await run_in_threadpool(preview.png), media_type="image/png")

    return [
        Route("/api/jobs", submit, methods=["POST"]),
        Route("/api/jobs/{id}", job),
        Route("/api/jobs/{id}", cancel, methods=["DELETE"]),
        Route("/api/jobs/{id}/preview.png", job_preview),
    ]


async def _http_error(request: Request, error: HTTPException) -> Response:
    return _error(error.detail, error.status_code, error.headers)


async def _client_request_error(request: Request, error: ClientRequestError) -> Response:
    return _error(str(error), error.status, error.headers)


async def _queue_full(request: Request, error: QueueFull) -> Response:
    return _error(str(error), 429, {"retry-after": str(RETRY_SECONDS)})


async def _worker_failed(request: Request, error: WorkerFailed) -> Response:
    return _error(str(error), 503, None)


def _error(message: str, status: int, headers: Any) -> Response:
    return Response(http_request.error_body(message), status, headers, "application/json")


def _about(configs: Sequence[Config], limits: Limits) -> dict[str, Any]:
    """Stages and limits, from which the page builds its form."""
    names = ("samples", "steps", "guidance_weight", "prompt")
    return {
        "stages": [
            {
                "name": config.name,
                "image_size": config.data.image_size,
                **{name: getattr(config.sampling, name) for name in (*SETTINGS, LORAS)},
            }
            for config in configs
        ],
        "limits": {name: getattr(limits, name) for name in names},
    }


def _page() -> tuple[str, str]:
    """The page as one HTML text, and a content security policy that allows its own script only."""
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
