"""The HTTP application: JSON rows in, probabilities out.

    POST /predict    {"rows": [{column: value, ...}, ...]}  ->  {"probabilities": [...], "unseen": {field: values}}
    GET  /health     {"status": "ok", ...}
    GET  /model      what the model is, and the columns that rows must have
    GET  /metrics    counters in the text format of Prometheus

Whatever is wrong with a request is answered with a 4xx and {"error": one line}.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from embsearch_dist.serving.batching import Batcher, Overloaded
from embsearch_dist.serving.directory import ModelDirectory
from embsearch_dist.serving.metrics import Metrics
from embsearch_dist.serving.predict import logits_of, probabilities_of
from embsearch_dist.serving.requests import BadRequest, RequestEncoder, rows_of
from embsearch_dist.serving.tables import Ids


@dataclass(frozen=True)
class Limits:
    """What a request may be.

    Attributes:
        body_bytes: of a request's body.
        rows: of a request.
        batch_rows: that the model predicts together.
        waiting_rows: that may wait for it.
        delay_s: how long a request waits for company.
        body_s: how long a body may take to arrive.
    """

    body_bytes: int = 1 << 20
    rows: int = 4096
    batch_rows: int = 4096
    waiting_rows: int = 1 << 16
    delay_s: float = 0.0
    body_s: float = 30.0


class Service:
    """A loaded model and what its requests need."""

    def __init__(self, directory: ModelDirectory, limits: Limits) -> None:
        self.directory, self.limits, self.metrics = directory, limits, Metrics()
        self.model: Any = directory.model()
        self.encoder = RequestEncoder(directory)
        self.batcher: Batcher | None = None

    def _logits(self, ids: Ids) -> torch.Tensor:
        return logits_of(self.model, ids, self.directory.batch_rows)

    @contextlib.asynccontextmanager
    async def life(self, app: Starlette) -> AsyncIterator[None]:
        """The batcher lives as long as the application."""
        limits = self.limits
        sizes = (limits.batch_rows, limits.waiting_rows, limits.delay_s)
        self.batcher = Batcher(self._logits, *sizes, seen=self.metrics.batch)
        self.batcher.start()
        try:
            yield
        finally:
            await self.batcher.stop()

    async def predict(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest(415, f"content-type {kind[:60]!r}: send application/json")
        body = await self._body(request)
        # Short work stays here: a thread costs more than it.
        parse = rows_of(body, self.limits.rows) if len(body) < 1 << 14 else await run_in_threadpool(self._rows, body)
        encoded = self.encoder(parse) if len(parse) < 64 else await run_in_threadpool(self.encoder, parse)
        assert self.batcher is not None
        try:
            logits = await self.batcher(encoded.ids)
        except Overloaded as e:
            raise BadRequest(503, f"overloaded: {e}. Send the request again later") from e
        probabilities = probabilities_of(logits)
        if bool(probabilities.isnan().any()):
            row = int(probabilities.isnan().nonzero()[0])
            raise BadRequest(400, f"row {row}: the model has no answer; a number is too far from those of the training")
        self.metrics.rows(encoded.rows)
        unseen = {name: n for name, n in encoded.unseen.items() if n}
        return JSONResponse({"probabilities": probabilities.tolist(), "unseen": unseen})

    def _rows(self, body: bytes) -> list[dict[str, Any]]:
        return rows_of(body, self.limits.rows)

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said) > most:
            raise BadRequest(413, f"the body has {int(said):,} bytes, at most {most:,} are taken")
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise BadRequest(413, f"the body has more than {most:,} bytes")
                    parts.append(part)
        except TimeoutError as e:
            raise BadRequest(408, f"the body did not arrive within {self.limits.body_s:g} s") from e
        return b"".join(parts)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.directory.body["name"]})

    async def describe(self, request: Request) -> Response:
        body = self.directory.body
        told = {key: body[key] for key in ("name", "kind", "dataset", "precision")}
        return JSONResponse({**told, "columns": self.encoder.names, "limits": {"rows": self.limits.rows}})

    async def tell(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def counted(self, call: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An end point whose answers are counted and timed, and whose faults become answers."""

        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            try:
                response = await call(request)
            except BadRequest as e:
                response = JSONResponse({"error": str(e)}, e.status)
            except ClientDisconnect:
                response = Response(status_code=400)  # nobody reads it
            self.metrics.request(response.status_code, time.perf_counter() - started)
            return response

        return answer


def application(directory: ModelDirectory, limits: Limits) -> Starlette:
    """The application; the model is loaded now."""
    service = Service(directory, limits)
    routes = [
        Route("/predict", service.counted(service.predict), methods=["POST"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/model", service.describe, methods=["GET"]),
        Route("/metrics", service.tell, methods=["GET"]),
    ]

    async def other(request: Request, error: Exception) -> Response:
        status, text = 500, "the server failed; its log says why"
        if isinstance(error, HTTPException):
            status, known = error.status_code, "/predict, /health, /model and /metrics"
            text = f"{request.method} {request.url.path[:80]}: {error.detail}; there are {known}"
        service.metrics.request(status, 0.0)
        return JSONResponse({"error": text}, status)

    return Starlette(routes=routes, lifespan=service.life, exception_handlers={HTTPException: other, Exception: other})
