"""What this package relies on inside vLLM in the API process; docs/patches.md lists everything.

Each function names what it relies on. `tests/unit/server/test_vllm_api.py` holds a contract test for each, so that
another vLLM version fails there first, with a clear message, and not in production.
"""

from __future__ import annotations

import functools
import logging
import os
from _collections_abc import dict_values
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.datastructures import State
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from vllm.lora.request import LoRARequest

from f2l_vllm import logs
from f2l_vllm.engine import defaults
from f2l_vllm.engine.defaults import EngineLimits, refuse_flags
from f2l_vllm.engine.residency import FIRST_ADAPTER_ID
from f2l_vllm.settings import Settings, listed, refuse_environment

logger = logging.getLogger(__name__)

# The model the client asked for, set while its request is set up: responses show it instead of an adapter's name.
asked_model: ContextVar[str | None] = ContextVar("asked_model", default=None)

READABLE_HEADERS = ("Retry-After", "X-F2L-File", "X-Should-Retry")  # by pages of allowed origins
# While a request is set up, rendering its chat appends the number of visual tokens in the prompt here.
visual_tokens: ContextVar[list[int] | None] = ContextVar("visual_tokens", default=None)


def log_like_vllm(name: str) -> None:
    """Send our log records to the handlers of the `vllm` logger, with its level and format, unless both already go to
    the handler of this package."""
    if logs.is_configured():
        logging.getLogger().setLevel(logging.INFO)  # a library that vLLM's SageMaker routes import hides warnings
        return
    ours, theirs = logging.getLogger(name), logging.getLogger("vllm")
    ours.setLevel(theirs.level or logging.INFO)
    ours.handlers = list(theirs.handlers)
    ours.propagate = not ours.handlers


def check_environment(args: Any) -> None:
    """Refuse settings that bypass plugins or let clients change adapters.

    Raises:
        ValueError: one of them is set; the message says which and why.
    """
    refuse_environment(os.environ)
    refuse_flags(args)


def engine_limits(engine_client: Any) -> EngineLimits:
    """Read from `engine_client.vllm_config.lora_config`.

    Raises:
        ValueError: the engine runs without LoRA.
    """
    config = engine_client.vllm_config.lora_config
    if config is None:
        raise ValueError("the engine runs without LoRA: start it with --enable-lora (f2l-vllm serve does)")
    modules = getattr(config, "target_modules", None)
    slots = config.max_cpu_loras or config.max_loras
    return EngineLimits(config.max_lora_rank, slots, frozenset(modules) if modules else None)


def is_on_one_machine(engine_client: Any) -> bool:
    """Whether the engine's workers run on this machine. Read from `engine_client.vllm_config.parallel_config`."""
    return defaults.is_on_one_machine(engine_client.vllm_config.parallel_config)


@dataclass(frozen=True)
class EngineSizes:
    """`device_slots`: adapters in one step; `kv_bytes_per_token`: of the KV cache, on all devices together."""

    device_slots: int
    kv_bytes_per_token: int


def engine_sizes(engine_client: Any) -> EngineSizes:
    """Read from `lora_config`, `model_config` and `cache_config` of `engine_client.vllm_config`."""
    config = engine_client.vllm_config
    model = config.model_config
    heads = model.get_total_num_kv_heads() * model.get_head_size() * model.get_total_num_hidden_layers()
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    width = kv_cache_dtype_str_to_dtype(config.cache_config.cache_dtype, model).itemsize
    return EngineSizes(config.lora_config.max_loras, 2 * heads * width)


class AdapterNames(dict[str, LoRARequest]):
    """vLLM's registry together with the videos' adapters, which can be found only by their key.

    vLLM iterates over the values to list models, and to find an adapter named like the type of one of a question's
    content parts (its adapters for images or audio). That would give a question a video's adapter without its key.
    """

    def values(self) -> dict_values[str, LoRARequest]:
        """The operator's own adapters."""
        return {key: request for key, request in self.items() if request.lora_int_id < FIRST_ADAPTER_ID}.values()


def lora_registry(state: State) -> MutableMapping[str, LoRARequest]:
    """vLLM's dynamic registry, `state.openai_serving_models.lora_requests`: name -> `LoRARequest`."""
    registry = state.openai_serving_models.lora_requests = AdapterNames(state.openai_serving_models.lora_requests)
    return registry


def leave_adapters_out_of_metrics(engine_client: Any) -> None:
    """Make `vllm:lora_requests_info` name no adapter.

    Every combination of adapters in use at once would stay in the metric and in the API server's memory for good, and
    readers of the metrics would learn the videos' adapters. `engine_client.output_processor.lora_states` fills it.
    """
    engine_client.output_processor.lora_states.log_stats = False


def new_lora_request(name: str, int_id: int, path: str, base_model: str) -> LoRARequest:
    """A request without `load_inplace`, with which the engine would read the file again for every request."""
    return LoRARequest(
        lora_name=name, lora_int_id=FIRST_ADAPTER_ID + int_id, lora_path=path, base_model_name=base_model
    )


def base_model_names(state: State) -> list[str]:
    """The names under which the base model is served."""
    return [model.name for model in state.openai_serving_models.base_model_paths]


async def model_cards(state: State) -> list[dict[str, Any]]:
    """vLLM's entries of `/v1/models`: the base model, and the operator's own adapters (`--lora-modules`)."""
    models = await state.openai_serving_models.show_available_models()
    return [card.model_dump() for card in models.data]


def wrap_servings(state: State, **wraps: Callable[[Any], Any]) -> None:
    """Put our handlers in front of those of `state` with these names, as far as there are any.

    vLLM's own routes look up their handler in `state` at every request, so they keep their cancellation, keep-alive
    and load accounting. `model_name` of the models object decides the `model` field of a response; we override it to
    return what the client asked for.
    """
    models = state.openai_serving_models
    original = models.model_name

    def model_name(lora_request: LoRARequest | None = None) -> str:
        name: str = asked_model.get() or original(lora_request)
        return name

    models.model_name = model_name
    for name, wrap in wraps.items():
        if getattr(state, name, None) is not None:
            setattr(state, name, wrap(getattr(state, name)))


def rendered(chat: Any, messages: list[Any], add_generation_prompt: bool) -> str:
    """The text that vLLM's chat template makes of messages; if it fails, it may raise any error."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(messages=messages, add_generation_prompt=add_generation_prompt)
    params = request.build_chat_params(chat.chat_template, chat.chat_template_content_format)
    defaults = {**(chat.default_chat_template_kwargs or {}), "tokenize": False}
    _, prompt = chat.renderer.render_messages(request.messages, params.with_defaults(defaults))
    return str(prompt["prompt"])


def enclose_renderings(
    engine_client: Any, question: Callable[[], AbstractContextManager[None]], salt: Callable[[str | None], str | None]
) -> None:
    """Enter `question()` while vLLM renders a request into prompts for the engine, give it `salt` of its `cache_salt`
    instead, and fill `visual_tokens`.

    All of vLLM's handlers call `render_chat_async`, which returns conversations and prompts, or `render_cmpl_async` of
    `engine_client.renderer`.
    """
    renderer = engine_client.renderer

    def enclosed(stock: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stock)
        async def render(*args: Any, prompt_extras: dict[str, Any] | None = None, **kwargs: Any) -> Any:
            extras = dict(prompt_extras or {})
            if (salted := salt(extras.get("cache_salt"))) is not None:
                extras["cache_salt"] = salted
            with question():
                rendered = await stock(*args, prompt_extras=extras, **kwargs)
            if (noted := visual_tokens.get()) is not None and isinstance(rendered, tuple):
                noted.append(_visual_tokens(rendered[1]))
            return rendered

        return render

    for name in ("render_chat_async", "render_cmpl_async"):
        setattr(renderer, name, enclosed(getattr(renderer, name)))


def _visual_tokens(prompts: Sequence[Mapping[str, Any]]) -> int:
    places = [place for prompt in prompts for group in prompt.get("mm_placeholders", {}).values() for place in group]
    return sum(place.get_num_embeds() for place in places)


def guard_other_servings(state: State, guard: Callable[[Any], Any]) -> None:
    """Put `guard` around the generate handlers that do not know videos: they never answer for one by accident."""
    for name in ("openai_serving_chat_batch", "serving_generative_scoring"):
        if getattr(state, name, None) is not None:
            setattr(state, name, guard(getattr(state, name)))


def question_routers() -> list[APIRouter]:
    """vLLM's routers with the routes that answer questions, and more that this server does not have."""
    from vllm.entrypoints.anthropic.api_router import router as messages
    from vllm.entrypoints.openai.chat_completion.api_router import router as chat
    from vllm.entrypoints.openai.completion.api_router import router as completions
    from vllm.entrypoints.openai.responses.api_router import router as responses

    return [chat, completions, responses, messages]


def cors(app: FastAPI) -> list[Middleware]:
    """vLLM's middleware for `--allowed-origins`, taken out of the app and completed; none without origins."""
    ours = [entry for entry in app.user_middleware if entry.cls is CORSMiddleware]
    app.user_middleware[:] = [entry for entry in app.user_middleware if entry.cls is not CORSMiddleware]
    options: list[Any] = [{**entry.kwargs, "expose_headers": READABLE_HEADERS} for entry in ours]
    return [Middleware(CORSMiddleware, **given) for given in options if given["allow_origins"]]


def is_stopping(state: State) -> bool:
    """Whether vLLM's server is stopping, which it also does by itself when its engine has died."""
    return bool(getattr(getattr(state, "server", None), "should_exit", False))


def quiet_paths(args: Any) -> set[str]:
    """The paths whose requests vLLM was told not to log. vLLM ignores its own flag when somebody configures logging."""
    return set(listed(getattr(args, "disable_access_log_for_endpoints", None) or ""))


def url(args: Any) -> str:
    """The address of this server on its own machine."""
    if getattr(args, "uds", None):
        return f"unix:{args.uds}"
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(args.host or "", args.host)
    scheme = "https" if args.ssl_keyfile and args.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host and '[' not in host else host}:{args.port}"


def api_keys(args: Any) -> list[str]:
    """The keys of `--api-key`, else the one in VLLM_API_KEY, as in vLLM's own check."""
    return [key for key in (getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]) if key]


def grace_seconds(args: Any, settings: Settings) -> float:
    """How long open answers may continue when the server stops: our setting if it is set, else vLLM's flag."""
    if "shutdown_seconds" in settings.model_fields_set:
        return settings.shutdown_seconds
    return float(getattr(args, "shutdown_timeout", 0) or settings.shutdown_seconds)


def stop_engine(engine_client: Any) -> None:
    """End the engine's processes. With this timeout vLLM kills them right after asking them to end; no data is lost."""
    engine_client.shutdown(timeout=0)


def is_serving(state: State) -> bool:
    """Whether uvicorn accepts connections."""
    return bool(getattr(getattr(state, "server", None), "started", False))


def stop_http(state: State) -> None:
    """Make uvicorn accept no more connections, wait for the open ones, and run the end of the lifespan."""
    if (server := getattr(state, "server", None)) is not None:
        server.should_exit = True


def bound_http_shutdown(state: State, seconds: float) -> None:
    """Bound how long a stopping uvicorn waits for connections: a client that does not read would block it forever."""
    if (server := getattr(state, "server", None)) is not None:
        server.config.timeout_graceful_shutdown = seconds


def is_engine_dead(error: BaseException) -> bool:
    """Whether a call failed because the engine is dead. vLLM's handlers deal with that."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


def is_failed_generation(error: BaseException | None) -> bool:
    """Whether the engine gave up one request, as it does when it cannot load the adapter."""
    from vllm.exceptions import GenerationError

    return isinstance(error, GenerationError)


def questions_in_work(engine_client: Any) -> int:
    """How many requests the engine has, running and waiting: `engine_client.output_processor` counts them."""
    count: int = engine_client.output_processor.get_num_unfinished_requests()
    return count


async def engine_is_healthy(engine_client: Any) -> bool:
    """Whether the engine answers."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        await engine_client.check_health()
    except EngineDeadError:
        return False
    return True
