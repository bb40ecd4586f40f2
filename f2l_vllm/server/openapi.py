"""What the OpenAPI description says of vLLM's routes that answer about videos: the fields this server adds to them.

Source: FastAPI, Extending OpenAPI. vLLM's request models let unknown fields pass, so its own description has no `f2l`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from f2l_vllm import __version__
from f2l_vllm.server import vllm_api
from f2l_vllm.server.chat.content import REFUSED
from f2l_vllm.server.chat.request import Mode
from f2l_vllm.server.middleware.auth import keep_listed_routes
from f2l_vllm.server.routes import router

_SCHEMAS = "#/components/schemas/"
_SPANNED = (
    "FileFile",
    "VideoURL",
    "ResponseInputFileParam",
    "ResponseInputFileContentParam",
)  # parts that name a video

DESCRIPTIONS = {
    "/v1/chat/completions": "Answer about the video that is the `model`, or about the videos that `file` and "
    "`video_url` parts name, from their adapters or their frames.",
    "/v1/completions": "Continue a text about the video that is the `model`, from its adapter.",
    "/v1/responses": "As `/v1/chat/completions`; videos are named by the `model` or by `input_file` parts.",
    "/v1/responses/{response_id}": "A stored response of the caller's, where the operator lets vLLM store them.",
    "/v1/responses/{response_id}/cancel": "End a stored response that is answered in the background.",
    "/v1/messages": "Anthropic's Messages: answer about the video that is the `model`, from its adapter.",
    "/v1/messages/count_tokens": "Count the tokens of the text, which is all that a question to an adapter costs.",
}
_ASKS = {path for path in DESCRIPTIONS if "{" not in path and not path.endswith("count_tokens")}


_Moment = Annotated[float, Field(ge=0)] | str | None


class F2LOptions(BaseModel):
    """How a question is answered."""

    model_config = ConfigDict(extra="forbid")
    mode: Mode = Field(
        "adapter",
        description="`adapter`: from the adapters, without visual tokens. `frames`: from the frames in context. "
        "`both`: from the frames, under the adapters. `/v1/completions` and `/v1/messages` take `adapter` alone.",
    )
    wait: Literal["none"] | Annotated[float, Field(ge=0, le=3600)] | None = Field(
        None,
        description="How long to wait for videos that are not ready, seconds. Default: what the operator set.",
    )
    start: _Moment = Field(None, description="With `end`: what is meant of videos that do not say it themselves.")
    end: _Moment = None
    last: float | None = Field(None, gt=0, description="Seconds back from the end instead.")


class F2LSpan(BaseModel):
    """A part of a long video, seconds. Of a stream also the wall clock: Unix seconds, or a text as ISO 8601 has it."""

    model_config = ConfigDict(extra="forbid")
    start: _Moment = Field(0)
    end: _Moment = Field(None, description="Default: the end of the video.")
    last: float | None = Field(None, gt=0, description="Seconds back from the end instead.")


class F2LVideo(BaseModel):
    """A video that an answer is about, or a stream."""

    file_id: str | None = None
    stream_id: str | None = None
    adapter: str | None = None
    covered: list[tuple[float, float]] | None = Field(None, description="What was read of it, seconds.")


class F2LAnswer(BaseModel):
    """What an answer about videos was made from."""

    mode: Mode
    adapter: str | None = None
    rank: int | None = None
    videos: list[F2LVideo] = []
    visual_tokens: int = Field(description="In the prompt.")
    visual_tokens_avoided: int = 0
    waited_seconds: float = 0.0
    covered: list[tuple[float, float]] | None = Field(None, description="Of streams: what was read, Unix seconds.")
    age_seconds: float | None = Field(None, description="Of streams: since the end of the newest that was read.")


def reference() -> dict[str, Any]:
    """The description of all routes for videos and questions, made without a server or a model."""
    app = FastAPI(title="f2l-vllm", version=__version__)
    for part in (router, *vllm_api.question_routers()):
        app.include_router(part)
    keep_listed_routes(app, [])
    extend(app)
    return app.openapi()


def extend(app: FastAPI) -> None:
    """Have the application describe what this server adds to vLLM's routes, and nothing that it refuses."""
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _extended(stock())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _extended(described: dict[str, Any]) -> dict[str, Any]:
    named = [(model, "validation") for model in (F2LOptions, F2LSpan, F2LAnswer)]
    _, added = models_json_schema(named, ref_template=f"{_SCHEMAS}{{model}}")  # type: ignore[arg-type]
    schemas = described.setdefault("components", {}).setdefault("schemas", {})
    for path, text in DESCRIPTIONS.items():
        for operation in described["paths"].get(path, {}).values():
            operation["description"] = text
            if path in _ASKS:
                _add_fields(operation, schemas)
    for name in _SPANNED:
        if name in schemas:
            schemas[name]["properties"]["f2l"] = {"$ref": f"{_SCHEMAS}F2LSpan"}
    schemas.update(added["$defs"])
    return described


def _add_fields(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = schemas[body.removeprefix(_SCHEMAS)]["properties"]
    for name in REFUSED:
        fields.pop(name, None)
    fields["f2l"] = {"$ref": f"{_SCHEMAS}F2LOptions"}
    wait = {"type": "string", "description": "`none`, or seconds up to 3600; `f2l.wait` in the body wins."}
    operation.setdefault("parameters", []).append({"name": "X-F2L-Wait", "in": "header", "schema": wait})
    answer = operation["responses"]["200"]["content"]["application/json"]
    answer["schema"] = {
        "allOf": [answer["schema"], {"type": "object", "properties": {"f2l": {"$ref": f"{_SCHEMAS}F2LAnswer"}}}]
    }
