"""The HTTP interface: routes of all tasks, OpenAI's, health, metrics, and their schema."""

import asyncio
import base64
import dataclasses
import functools
import io
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, TypeVar

import anyio
import fastapi
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException as StarletteHTTPException
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

from univg_jax import version
from univg_jax.errors import UnsupportedError, UserError, check_name, quote
from univg_jax.inputs import make_request
from univg_jax.result import Result
from univg_jax.serving import schema
from univg_jax.serving.batching import Batching, Job
from univg_jax.serving.bodies import KINDS, FieldError, open_picture, read_body, transparent_hole
from univg_jax.serving.gate import (
    DOCS,
    OPEN,
    ClientLeft,
    Gate,
    Limits,
    refuse_http,
    refuse_user_error,
)
from univg_jax.serving.metrics import Metrics
from univg_jax.settings import MAX_SEED

JSON = "application/json"
MODEL = "univg"  # the name that OpenAI's clients give
NAME = Annotated[str, fastapi.Path(json_schema_extra={"enum": [MODEL]})]
Value = TypeVar("Value")

Asked = tuple[str, dict[str, Any]]  # a task and the inputs of `make_request`
Encoded = tuple[Result, bytes]  # what was made, and its file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """A path where pictures are made."""

    path: str
    tag: str
    body: type[schema.Body]
    kinds: tuple[str, ...] = KINDS  # of the body
    ask: Callable[[schema.Body, dict[str, Any]], Asked]  # what a body and its inputs ask for


def _routes(tasks: Sequence[str]) -> list[Route]:
    """Those of a model with these tasks."""
    found = [
        Route(path=f"/v1/{name}", tag="tasks", body=body, ask=functools.partial(_asked, task))
        for name, (task, body) in schema.ROUTES.items()
        if task in tasks
    ]
    openai = functools.partial(Route, tag="OpenAI", ask=_asked_openai)
    if "t2i" in tasks:
        body = schema.OpenAIGeneration
        found.append(openai(path="/v1/images/generations", body=body, kinds=KINDS[:1]))
    if {"ie", "ip"} & set(tasks):
        found.append(openai(path="/v1/images/edits", body=schema.OpenAIEdit, kinds=KINDS[1:]))
    return found


def _asked(task: str, body: schema.Body, inputs: dict[str, Any]) -> Asked:
    return task, inputs


def _asked_openai(body: schema.Body, inputs: dict[str, Any]) -> Asked:
    """What a request of OpenAI's asks for; the size of an edit is that of its image."""
    if body.model is not None:
        check_name(body.model, [MODEL], what="model")
    if "image" not in inputs:
        return "t2i", inputs
    size = inputs.pop("size", None)
    if size not in (None, inputs["image"].size):
        raise FieldError(
            "size={}x{}: an edit has the size of its image, {}x{}".format(
                *size, *inputs["image"].size
            ),
            field="size",
        )
    if "mask" in inputs:
        return "ip", inputs | {"mask": transparent_hole(inputs["mask"])}
    return "ie", inputs


def create_app(
    batching: Batching, metrics: Metrics, *, limits: Limits, api_keys: Sequence[str] = ()
) -> FastAPI:
    """The application of a model. Without `api_keys` anybody may ask."""
    app = FastAPIOffline(
        title="univg_jax",
        version=version.__version__,
        summary="One image model: text to image, editing, in- and outpainting, layouts, depth, "
        "pose, segmentation, and pictures of a given person.",
        redoc_url=None,
        static_url=f"{DOCS}/static",
        swagger_ui_oauth2_redirect_url=f"{DOCS}/redirect",
    )
    tasks = list(batching.pipeline.tasks)
    described = schema.Model(id=MODEL, created=int(time.time()), tasks=tasks)
    pictures = Pictures(batching, limits)

    @app.get("/health", response_model=schema.State, tags=["server"])
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get(
        "/ready",
        response_model=schema.State,
        responses={503: {"model": schema.State}},
        tags=["server"],
    )
    async def ready(response: Response) -> dict[str, str]:
        """Whether all programs are compiled: 503 until then."""
        if batching.is_ready:
            return {"status": "ready"}
        response.status_code = 503
        return {"status": "compiling"}

    @app.get(
        "/metrics",
        response_class=fastapi.responses.PlainTextResponse,
        responses=_refusals(api_keys),
        tags=["server"],
    )
    async def read_metrics() -> Response:
        """The metrics, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get(
        "/v1/models",
        response_model=schema.Models,
        responses=_refusals(api_keys),
        tags=["OpenAI"],
    )
    async def models() -> schema.Models:
        """The model, as OpenAI's API lists models."""
        return schema.Models(data=[described])

    @app.get(
        "/v1/models/{name}",
        response_model=schema.Model,
        responses=_refusals(api_keys, takes_name=True),
        tags=["OpenAI"],
    )
    async def model(name: NAME) -> schema.Model:
        """One model, as OpenAI's API describes it."""
        if name != MODEL:
            raise HTTPException(404, f"unknown model {quote(name)} (known: {MODEL})")
        return described

    routes = _routes(batching.pipeline.tasks)
    for route in routes:
        app.post(
            route.path,
            response_model=schema.Answer,
            responses=_refusals(api_keys, takes_body=True) | {200: _PICTURE},
            name=route.path.rpartition("/")[2],
            operation_id=route.path.strip("/").replace("/", "_"),
            tags=[route.tag],
        )(pictures.handler(route))
    app.openapi = functools.cache(lambda: _openapi(app, routes, is_locked=bool(api_keys)))
    app.add_exception_handler(UserError, refuse_user_error)
    app.add_exception_handler(StarletteHTTPException, refuse_http)
    app.add_middleware(
        Gate,
        metrics=metrics,
        limits=limits,
        api_keys=api_keys,
        batching=batching,
        paths={route.path for route in app.routes},
    )
    return app


class Pictures:
    """Requests for pictures to their answers."""

    def __init__(self, batching: Batching, limits: Limits):
        self.batching, self.limits = batching, limits
        self._decoders: anyio.CapacityLimiter | None = None  # needs a loop

    def handler(self, route: Route) -> Callable[[Request], Awaitable[Response]]:
        """What FastAPI calls with a request for a route."""

        async def handle(request: Request) -> Response:
            return await self.answer(request, route)

        handle.__doc__ = route.body.__doc__
        return handle

    async def answer(self, request: Request, route: Route) -> Response:
        """The pictures that a request asks for. Raises UserError and HTTPException."""
        if not self.batching.is_ready:
            raise HTTPException(503, "still compiling: see /ready", {"Retry-After": "10"})
        begin = time.monotonic()
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await read_body(request, route.body)
        except TimeoutError:
            raise HTTPException(408, f"the body took over {self.limits.seconds:g} s") from None
        seconds = self.limits.seconds - (time.monotonic() - begin)
        body, file_only = _negotiate(request, body)
        if file_only and body.n > 1:
            raise FieldError("n: an answer that is a file has one picture", field="n")
        with self.batching.places(body.n):
            return await _unless_left(
                request, self._make(body, route, request, file_only=file_only), seconds=seconds
            )

    async def _make(
        self, body: schema.Body, route: Route, request: Request, *, file_only: bool
    ) -> Response:
        jobs = await self._in_thread(self._jobs, body, route)
        request.state.task = jobs[0].request.task
        request.state.pictures = len(jobs)
        async with asyncio.TaskGroup() as group:
            works = [self._picture(job, body.output_format) for job in jobs]
            tasks = [group.create_task(_settle(work)) for work in works]
        made = [task.result() for task in tasks]
        for picture in made:
            if isinstance(picture, Exception):
                raise picture
        return await self._in_thread(_respond, made, body, file_only)

    async def _picture(self, job: Job, output_format: str) -> Encoded:
        result = await self.batching.make(job)
        return result, await self._in_thread(_encode, result, output_format)

    def _jobs(self, body: schema.Body, route: Route) -> list[Job]:
        """What is to be made. Raises UserError for what cannot be."""
        inputs = body.inputs()
        for name in body.pictures:
            if name in inputs:
                inputs[name] = open_picture(name, inputs[name], max_pixels=self.limits.pixels)
        task, inputs = route.ask(body, inputs)
        if task not in (tasks := self.batching.pipeline.tasks):
            raise UnsupportedError(f"the model has no task {task!r} (it has {', '.join(tasks)})")
        made = make_request(task, data=self.batching.pipeline.config.data, **inputs)
        height, width = made.letterbox.picture
        if height * width > self.limits.pixels:
            raise UserError(
                f"the answer would have {width} x {height} pixels: expected at most "
                f"{self.limits.pixels}"
            )
        options = body.options()
        pipeline = self.batching.with_options(task, **options)
        seed = random.randrange(MAX_SEED - body.n) if body.seed is None else body.seed
        negative = options.get("negative_prompt", "")
        return [
            Job(request=made, seed=seed + i, negative_prompt=negative, pipeline=pipeline)
            for i in range(body.n)
        ]

    async def _in_thread(self, function: Callable[..., Value], *arguments: object) -> Value:
        """Decodes and encodes pictures: a few at a time, so that memory is bounded."""
        self._decoders = self._decoders or anyio.CapacityLimiter(4)
        return await anyio.to_thread.run_sync(function, *arguments, limiter=self._decoders)


def _negotiate(request: Request, body: schema.Body) -> tuple[schema.Body, bool]:
    """What the client accepts: the body with the format of its files, and whether one is all.

    A format that the body names is the only one. Of equals JSON comes first, then PNG. Raises
    HTTPException if the client accepts none of them.
    """
    accept = parse_accept_header(",".join(request.headers.getlist("accept")) or "*/*", MIMEAccept)
    named = "output_format" in body.model_fields_set
    formats = [body.output_format] if named else list(schema.FORMATS)
    qualities = {kind: accept.quality(kind) for kind in (JSON, *(f"image/{f}" for f in formats))}
    best = max(qualities, key=qualities.__getitem__)
    if not qualities[best]:
        raise HTTPException(406, f"nothing that is accepted: there is {', '.join(qualities)}")
    if best == JSON:
        return body, False
    return body.model_copy(update={"output_format": best.removeprefix("image/")}), True


async def _settle(work: Awaitable[Result]) -> Result | Exception:
    """The result, or the error as one: a group of tasks would wrap it."""
    try:
        return await work
    except Exception as error:
        return error


async def _unless_left(request: Request, work: Awaitable[Value], *, seconds: float) -> Value:
    """What `work` gives, if the client waits for it, and it takes at most so long."""

    async def wait_until_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    left = asyncio.ensure_future(wait_until_left())
    try:
        done, _ = await asyncio.wait(
            {working, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if working in done:
            return working.result()
        if left in done:
            raise ClientLeft
        raise HTTPException(504, "the answer took too long: ask for less, or later")
    finally:
        working.cancel()
        left.cancel()


def _respond(made: Sequence[Encoded], body: schema.Body, file_only: bool) -> Response:
    first, file = made[0]
    media_type = f"image/{body.output_format}"
    if file_only:
        return Response(file, media_type=media_type, headers={"X-Seed": str(first.seeds[0])})
    as_url = getattr(body, "response_format", None) == "url"
    data = []
    for result, file in made:
        encoded = base64.b64encode(file).decode()
        data.append(
            schema.Image(
                b64_json=None if as_url else encoded,
                url=f"data:{media_type};base64,{encoded}" if as_url else None,
                seed=result.seeds[0],
                prompt=result.prompts[0],
                size="{}x{}".format(*result.image.size),
                answer=None if result.answer is None else schema.Array.of(result.answer),
            )
        )
    # Where the checkpoint lies is the server's own affair.
    settings = {k: v for k, v in first.settings.items() if k != "checkpoint"}
    answer = schema.Answer(
        created=int(time.time()),
        data=data,
        output_format=body.output_format,
        task=first.task,
        settings=settings,
    )
    return Response(answer.model_dump_json(), media_type=JSON)


def _encode(result: Result, output_format: str) -> bytes:
    buffer = io.BytesIO()
    lossless = {"lossless": True} if output_format == "webp" else {}
    quality = {"quality": 95} if output_format == "jpeg" else {}
    result.image.save(buffer, schema.FORMATS[output_format], **lossless, **quality)
    return buffer.getvalue()


_PICTURE = {
    "description": "The pictures; if `Accept` prefers an image, the file of the only one",
    "content": {f"image/{name}": {} for name in schema.FORMATS},
}


def _refusals(
    api_keys: Sequence[str], *, takes_body: bool = False, takes_name: bool = False
) -> dict[int | str, Any]:
    """What a route may answer instead."""
    found = {}
    if api_keys:
        found[401] = "No known key"
    if takes_name:
        found[404] = "No such model"
    if takes_body:
        found |= {
            400: "What cannot be made, in one line",
            406: "None of the media types that are accepted",
            408: "The body came too slowly",
            413: "The body is too large",
            415: "Neither JSON nor a form",
            429: "Too many wait; Retry-After says when to try again",
            500: "The model's picture is not finite, or an error of the server",
            503: "Still compiling",
            504: "It took too long",
        }
    return {
        status: {"model": schema.Refusal, "description": text} for status, text in found.items()
    }


def _openapi(app: FastAPI, routes: Sequence[Route], *, is_locked: bool) -> dict[str, Any]:
    """FastAPI's schema, with the two kinds of bodies, which it does not know of one route."""
    made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    models = [(route.body, "validation") for route in routes]
    _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
    components = made.setdefault("components", {})
    components["schemas"] |= definitions["$defs"]
    for route in routes:
        name = route.body.__name__
        form = schema.form_schema(route.body, components["schemas"][name])
        components["schemas"][f"{name}Form"] = form
        names = dict(zip(KINDS, (name, f"{name}Form")))
        content: dict[str, dict[str, Any]] = {
            kind: {"schema": {"$ref": f"#/components/schemas/{names[kind]}"}}
            for kind in route.kinds
        }
        lists = [field for field in ("margins", "boxes") if field in route.body.model_fields]
        if lists:  # as JSON, and not as one part an item
            as_json = {field: {"contentType": KINDS[0]} for field in lists}
            content[KINDS[1]]["encoding"] = as_json
        made["paths"][route.path]["post"]["requestBody"] = {"required": True, "content": content}
    if is_locked:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in made["paths"].items():
            for operation in operations.values():
                if path not in OPEN:
                    operation["security"] = [{"key": []}]
    return made
