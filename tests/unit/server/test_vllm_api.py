"""Contracts with vLLM: what `server/vllm_api.py` and `vllm_answers.py` rely on. Another version fails here first."""

import asyncio
import inspect
import json
import logging
from argparse import Namespace
from contextlib import contextmanager
from unittest.mock import create_autospec

import pytest
import torch
import uvicorn
from model_hosting_container_standards.logging_config import configure_root_logger
from starlette.datastructures import State
from starlette.testclient import TestClient
from vllm.config import CacheConfig, LoRAConfig, ModelConfig, ParallelConfig
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicStreamEvent
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages, wrap_data_with_event
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.chat_completion import serving
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionStreamResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, UsageInfo
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.sagemaker import api_router as sagemaker
from vllm.exceptions import GenerationError
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import PlaceholderRange
from vllm.renderers.hf import HfRenderer
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import LoRARequestStates, SchedulerStats

from f2l_vllm import logs, vllm_versions
from f2l_vllm.engine.defaults import EngineLimits, check_limits
from f2l_vllm.server import vllm_answers, vllm_api
from f2l_vllm.server.app import F2LEndpointPlugin
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.tenants import Keys
from f2l_vllm.settings import Settings
from tests.support import source_of
from tests.support.vllm_names import make_arg_parser


def test_slots_and_the_kv_cache_of_a_token_are_known():
    model = create_autospec(ModelConfig, instance=True, dtype=torch.bfloat16)
    model.get_total_num_kv_heads.return_value = 5
    model.get_head_size.return_value = 64
    model.get_total_num_hidden_layers.return_value = 32
    config = Namespace(model_config=model, cache_config=CacheConfig(), lora_config=LoRAConfig(max_loras=4))
    assert vllm_api.engine_sizes(Namespace(vllm_config=config)) == vllm_api.EngineSizes(4, 2 * 5 * 64 * 32 * 2)


def test_handlers_are_looked_up_in_state_at_every_request():
    assert "app.state.openai_serving_chat" in inspect.getsource(chat_router.chat)
    assert "app.state.openai_serving_completion" in inspect.getsource(completion_router.completion)


def test_the_adapter_is_chosen_by_model_name_from_the_registry():
    assert "self.models.lora_requests[request.model]" in inspect.getsource(BaseServing._maybe_get_adapters)
    assert "request.model in self.models.lora_requests" in inspect.getsource(BaseServing._check_model)
    assert "self.lora_requests: dict" in inspect.getsource(OpenAIServingModels.__init__)


def test_vllm_goes_through_the_registrys_values_and_finds_no_videos_adapter():
    for method in (BaseServing._get_active_default_mm_loras, OpenAIServingModels.show_available_models):
        assert "lora_requests.values()" in inspect.getsource(method)
    own = LoRARequest(lora_name="image", lora_int_id=1, lora_path="/adapters/image")
    video = vllm_api.new_lora_request("f2l-x", 7, "/adapters/f2l-x", "base")
    state = State({"openai_serving_models": Namespace(lora_requests={"image": own})})
    vllm_api.lora_registry(state)["f2l-x:secret"] = video
    registry = state.openai_serving_models.lora_requests
    assert list(registry.values()) == [own]
    assert (registry["f2l-x:secret"], len(registry)) == (video, 2)


def test_metrics_of_adapters_are_filled_from_states_that_can_be_turned_off():
    assert "self.lora_states = LoRARequestStates(" in inspect.getsource(OutputProcessor.__init__)
    engine = Namespace(output_processor=Namespace(lora_states=LoRARequestStates(log_stats=True)))
    states, stats = engine.output_processor.lora_states, SchedulerStats()
    vllm_api.leave_adapters_out_of_metrics(engine)
    states.request_running("request", "f2l-x")
    states.update_scheduler_stats(stats)
    assert (stats.running_lora_adapters, dict(states.requests)) == ({}, {})


@pytest.mark.parametrize(
    "method", [OpenAIServingChat._create_chat_completion, OpenAIServingCompletion._create_completion]
)
def test_the_responses_model_comes_from_model_name_before_streaming_starts(method):
    source = inspect.getsource(method)
    assert source.index("self.models.model_name(lora_request)") < source.index("if request.stream:\n            return")


def test_handlers_take_a_request_and_the_raw_request():
    for method in (OpenAIServingChat.create_chat_completion, OpenAIServingCompletion.create_completion):
        assert list(inspect.signature(method).parameters) == ["self", "request", "raw_request"]
    assert issubclass(OpenAIServingChat, GenerateBaseServing)


def test_a_lora_request_never_reloads_in_place():
    request = vllm_api.new_lora_request("f2l-x", 7, "/adapters/f2l-x", "base")
    assert (request.lora_name, request.lora_path) == ("f2l-x", "/adapters/f2l-x")
    assert 1 << 20 < request.lora_int_id < 1 << 31  # above --lora-modules, which count from 1; int32 in the engine
    assert request.load_inplace is False


def test_the_engine_can_add_and_remove_adapters():
    assert list(inspect.signature(AsyncLLM.add_lora).parameters) == ["self", "lora_request"]
    assert list(inspect.signature(AsyncLLM.remove_lora).parameters) == ["self", "lora_id"]


def test_chat_requests_keep_file_parts_and_our_options():
    part = {"type": "file", "file": {"file_id": "file-1"}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "hi"}]}
    body = {"model": "m", "messages": [message], "f2l": {"mode": "frames"}}
    request = ChatCompletionRequest.model_validate(body)
    assert request.messages[0]["content"][0] == part
    assert request.model_extra["f2l"] == {"mode": "frames"}


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_chat_requests_keep_spans_in_the_parts_of_every_role(role):
    parts = [
        {"type": "file", "file": {"file_id": "file-1", "f2l": {"start": 30, "end": 90}}},
        {"type": "video_url", "video_url": {"url": "data:,", "f2l": {"strat": 1}}},
        {"type": "text", "text": "hi"},
    ]
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": role, "content": parts}]})
    assert request.messages[0]["content"] == parts


def test_responses_carry_further_fields():
    usage = UsageInfo(prompt_tokens=1, total_tokens=2, completion_tokens=1)
    for response in (
        ChatCompletionResponse(model="m", choices=[], usage=usage),
        CompletionResponse(model="m", choices=[], usage=usage),
    ):
        detailed = vllm_answers.with_details(response, {"rank": 16})
        assert detailed.model_dump()["f2l"] == {"rank": 16}  # as vLLM's routes write it


def test_messages_carry_further_fields_whole_and_streamed():
    message = AnthropicMessagesResponse(id="chatcmpl-1", content=[], model="m", stop_reason="end_turn")
    detailed = vllm_answers.with_details(message, {"rank": 16})
    assert isinstance(detailed, AnthropicMessagesResponse)  # what its route looks for
    assert detailed.model_dump(exclude_none=True) == {**message.model_dump(exclude_none=True), "f2l": {"rank": 16}}
    started = AnthropicStreamEvent(type="message_start", message=message).model_dump_json(exclude_unset=True)
    first = vllm_answers.detailed_chunk(wrap_data_with_event(started, "message_start"), {"rank": 16})
    head, _, body = first.partition("data: ")
    assert (head, json.loads(body)["message"]["f2l"], first[-2:]) == ("event: message_start\n", {"rank": 16}, "\n\n")
    source = inspect.getsource(AnthropicServingMessages.message_stream_converter)
    assert 'yield wrap_data_with_event(data, "message_start")' in source
    assert 'yield wrap_data_with_event(data, "error")' in source
    assert vllm_answers.is_error_chunk(wrap_data_with_event("{}", "error"))


def test_a_stream_of_messages_raises_what_went_wrong():
    async def answer(request, raw_request):
        return chunks() if request else "whole"

    async def chunks():
        yield 'data: {"choices":[{}]}\n\n'
        yield 'data: {"error":{"message":"no token fits","code":400}}\n\n'

    async def read():
        assert await messages.create_chat_completion(False) == "whole"
        async for chunk in await messages.create_chat_completion(True):
            assert "choices" in chunk

    messages = vllm_answers.breaking_off(Namespace(create_chat_completion=answer))
    with pytest.raises(RuntimeError, match="no token fits"):
        asyncio.run(read())
    assert "sanitize_message(str(e))" in inspect.getsource(AnthropicServingMessages.message_stream_converter)


def test_the_last_chunk_of_a_stream_with_usage_carries_further_fields():
    usage = UsageInfo(prompt_tokens=1, total_tokens=2, completion_tokens=1)
    for model in (ChatCompletionStreamResponse, CompletionStreamResponse):
        last = f"data: {model(model='m', choices=[], usage=usage).model_dump_json(exclude_unset=True)}\n\n"
        detailed = vllm_answers.detailed_chunk(last, {"rank": 16})
        assert detailed.startswith("data: ")
        assert detailed.endswith("\n\n")
        body = json.loads(detailed[6:])
        assert body.pop("f2l") == {"rank": 16}
        assert body == json.loads(last[6:])
    for other in ("data: [DONE]\n\n", 'data: {"choices":[{"delta":{"content":"\\"choices\\":[]"}}]}\n\n'):
        assert vllm_answers.detailed_chunk(other, {"rank": 16}) == other
    for kind in (OpenAIServingChat, OpenAIServingCompletion):
        assert "choices=[]," in source_of(kind)


def test_a_chat_is_answered_by_methods_that_take_its_request_first():
    for method in (OpenAIServingChat.create_chat_completion, OpenAIServingChatBatch.create_batch_chat_completion):
        assert list(inspect.signature(method).parameters) == ["self", "request", "raw_request"]
    assert "await self.create_chat_completion(chat_req, raw_request)" in source_of(AnthropicServingMessages)
    for protocol in (ChatCompletionRequest, BatchChatCompletionRequest):
        asked = {"add_generation_prompt", "echo", "chat_template", "structured_outputs"}
        assert asked <= protocol.model_fields.keys()

    async def answer(request):
        return request

    state = State({"openai_serving_chat": Namespace(create_chat_completion=answer), "anthropic_serving_messages": None})
    vllm_answers.wrap_chat_answers(state, lambda method: (method, "wrapped"))
    assert state.openai_serving_chat.create_chat_completion == (answer, "wrapped")


def test_responses_are_made_by_one_method_and_streamed_as_the_clients_events():
    from vllm.entrypoints.openai.responses import serving, streaming_events
    from vllm.entrypoints.openai.responses.api_router import create_responses

    handler = serving.OpenAIServingResponses
    assert list(inspect.signature(handler.create_responses).parameters) == ["self", "request", "raw_request"]
    assert list(inspect.signature(handler.cancel_responses).parameters) == ["self", "response_id"]
    retrieve = list(inspect.signature(handler.retrieve_responses).parameters)
    assert retrieve == ["self", "response_id", "starting_after", "stream"]
    assert "handler.create_responses(request, raw_request)" in inspect.getsource(create_responses)
    source = inspect.getsource(serving) + inspect.getsource(streaming_events)
    for kind in ("response.output_text.delta", "response.output_text.done", "response.content_part.done"):
        assert kind in source


def preflight(origins):
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = ["--api-key", "key", *(["--allowed-origins", json.dumps(origins)] if origins else [])]
    app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args(flags), ("generate",))
    plugin = F2LEndpointPlugin()
    plugin._app = app
    plugin._put_in_front(Settings(), Keys(["key"], None), Namespace(is_stopping=False, answers=set()), lambda: 0)
    door = TestClient(app)
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type"
    return door.options("/v1/chat/completions", headers=asks), door.get("/v1/models", headers=asks)


def test_pages_of_allowed_origins_ask_beforehand_without_a_key_and_read_refusals():
    allowed, refused = preflight(["https://a.example"])
    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "authorization" in allowed.headers["Access-Control-Allow-Headers"]
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert refused.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "X-F2L-File" in refused.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("origins", [None, ["https://b.example"]])
def test_pages_of_other_origins_are_not_allowed(origins):
    for response in preflight(origins):
        assert response.status_code >= 400
        assert "Access-Control-Allow-Origin" not in response.headers


def test_what_vllm_stores_of_a_response_is_under_the_requests_id_in_three_places():
    from vllm.entrypoints.openai.responses import protocol
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    source = inspect.getsource(OpenAIServingResponses)
    for line in (
        "self.enable_store = envs.VLLM_ENABLE_RESPONSES_API_STORE",
        "self.msg_store[request.request_id] = messages",
        "self.response_store[response.id] = response",
        "self.event_store[request.request_id] = ",
        "self.background_tasks[response_id] = task",
        "response = await self.responses_full_generator(request, *args, **kwargs)",
    ):
        assert line in source
    assert "id=request.request_id," in inspect.getsource(protocol.ResponsesResponse.from_request)
    stores = {name: {"resp_1": 1, "resp_2": 2} for name in ("response_store", "msg_store", "event_store")}
    vllm_answers.forget_response(Namespace(**stores), "resp_1")
    assert list(stores.values()) == [{"resp_2": 2}] * 3
    assert vllm_answers.background_task(Namespace(background_tasks={}), "resp_1") is None
    stored = Namespace(response_store={"resp_1": Namespace()})
    for name in ("resp_1", "resp_2"):
        vllm_answers.detail_stored(stored, name, {"rank": 16})
    assert stored.response_store["resp_1"].f2l == {"rank": 16}


def test_events_of_a_response_carry_further_fields_and_an_error_is_one_of_the_clients():
    event = Namespace(type="response.completed", response=Namespace())
    assert vllm_answers.detailed_chunk(event, {"rank": 16}).response.f2l == {"rank": 16}
    error = vllm_answers.error_event(APIError(503, "adapter_unavailable", "Ask again."), 3)
    assert json.loads(error.model_dump_json(indent=None, by_alias=True)) == {
        "type": "error",
        "code": "adapter_unavailable",
        "message": "Ask again.",
        "param": None,
        "sequence_number": 3,
    }
    assert not vllm_answers.is_error_chunk(error)


def test_a_chat_template_is_rendered_to_text_as_for_a_request():
    source = inspect.getsource(OnlineRenderer.preprocess_chat)
    assert "request.build_chat_params(" in source
    assert ").with_defaults(" in source
    assert "tokenize=(" in source
    assert "tokenizer = self.renderer.tokenizer" in inspect.getsource(OpenAIServingChat._create_chat_completion)
    source = inspect.getsource(OpenAIServingChat._effective_chat_template_kwargs)
    for name in ("chat_template", "chat_template_content_format", "default_chat_template_kwargs"):
        assert f"self.{name}" in source
    assert list(inspect.signature(HfRenderer.render_messages).parameters) == ["self", "messages", "params"]
    assert parse_dec_only_prompt("text") == {"prompt": "text"}
    assert "prompt = parse_dec_only_prompt(prompt_raw)" in inspect.getsource(HfRenderer.render_messages)

    def render(messages, params):
        given.append((messages, params.get_apply_chat_template_kwargs(), params.chat_template_content_format))
        return [], parse_dec_only_prompt("User: Hi\nAssistant:")

    given = []
    chat = Namespace(
        renderer=Namespace(render_messages=render),
        chat_template="{{ messages }}",
        chat_template_content_format="string",
        default_chat_template_kwargs={"enable_thinking": False},
    )
    assert vllm_api.rendered(chat, [{"role": "user", "content": "Hi"}], True) == "User: Hi\nAssistant:"
    ((messages, options, content_format),) = given
    assert ([dict(one) for one in messages], content_format) == ([{"role": "user", "content": "Hi"}], "string")
    expected = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
    assert {name: options[name] for name in expected} == expected
    assert options["chat_template"] == "{{ messages }}"


def test_a_chunk_of_a_chat_is_one_event_whose_choices_have_an_index_and_a_delta():
    choice = ChatCompletionResponseStreamChoice(index=1, delta=DeltaMessage(content=" Blau"), finish_reason=None)
    chunk = ChatCompletionStreamResponse(model="m", choices=[choice]).model_dump_json(exclude_unset=True)
    assert '"choices":[{' in chunk
    (read,) = json.loads(chunk)["choices"]
    assert (read["index"], read["delta"]) == (1, {"content": " Blau"})
    source = inspect.getsource(OpenAIServingChat.chat_completion_stream_generator)
    assert 'yield f"data: {data}\\n\\n"' in source
    assert "delta=DeltaMessage(" in source_of(OpenAIServingChat)


def test_the_server_says_that_it_stops_before_it_waits_for_requests():
    source = inspect.getsource(launcher)
    assert "app.state.server = server" in source
    assert "should_exit = True" in source
    state = State({})
    assert not vllm_api.is_stopping(state)
    state.server = Namespace(should_exit=True)
    assert vllm_api.is_stopping(state)


def test_our_signal_handlers_come_after_vllms_and_an_end_by_should_exit_runs_the_lifespan():
    source = inspect.getsource(launcher.serve_http)
    # The lifespan begins when the server's task first runs: at the await, after both handlers were set.
    assert source.index("loop.create_task(server.serve") < source.index("loop.add_signal_handler(signal.SIGTERM")
    assert source.index("loop.add_signal_handler(signal.SIGTERM") < source.index("await server_task")
    assert source.index("app.state.server = server") < source.index("loop.create_task(server.serve")
    assert issubclass(launcher.NoSignalServer, uvicorn.Server)  # which sets none of its own
    serving = source_of(uvicorn.Server)
    stopping = inspect.getsource(uvicorn.Server.shutdown)
    assert "if self.should_exit:" in serving
    assert "timeout=self.config.timeout_graceful_shutdown" in serving
    assert stopping.index("t.cancel(msg=") < stopping.index("await self.lifespan.shutdown()")
    state = State({})
    vllm_api.stop_http(state)
    vllm_api.bound_http_shutdown(state, 1.0)
    assert not vllm_api.is_serving(state)
    server = state.server = launcher.NoSignalServer(uvicorn.Config(app=None))
    assert not vllm_api.is_serving(state)
    server.started = True
    assert vllm_api.is_serving(state)
    vllm_api.stop_http(state)
    vllm_api.bound_http_shutdown(state, 1.5)
    assert server.should_exit
    assert server.config.timeout_graceful_shutdown == 1.5


def test_the_engine_is_killed_at_once_with_a_timeout_of_zero():
    from vllm.v1.utils import shutdown

    source = inspect.getsource(shutdown)
    assert source.index("proc.terminate()") < source.index("if remaining <= 0") < source.index("kill_process_tree")
    calls = []
    vllm_api.stop_engine(Namespace(shutdown=lambda timeout: calls.append(timeout)))
    assert calls == [0]


@pytest.mark.parametrize(
    ("flag", "environment", "seconds"),
    [(0, None, 30.0), (90, None, 90.0), (90, "12.5", 12.5), (0, "0", 0.0)],
)
def test_the_grace_is_our_setting_or_vllms_flag(monkeypatch, flag, environment, seconds):
    from vllm.engine.arg_utils import EngineArgs

    assert EngineArgs(model="x").shutdown_timeout == 0
    if environment is not None:
        monkeypatch.setenv("F2L_SHUTDOWN_SECONDS", environment)
    assert vllm_api.grace_seconds(Namespace(shutdown_timeout=flag), Settings()) == seconds


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        (None, "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("fe80::1", "http://[fe80::1]:8000"),
        ("films.example.com", "http://films.example.com:8000"),
    ],
)
def test_the_start_ends_with_an_address_to_go_to(host, shown):
    args = Namespace(host=host, port=8000, uds=None, ssl_keyfile=None, ssl_certfile=None)
    assert vllm_api.url(args) == shown


def test_keys_are_those_of_vllms_own_check(monkeypatch):
    from vllm.entrypoints.serve.middleware import register

    source = inspect.getsource(register.init_entrypoints_middleware)
    assert "for key in (args.api_key or [envs.VLLM_API_KEY]) if key" in source
    assert vllm_api.api_keys(Namespace(api_key=["a", "b"])) == ["a", "b"]
    monkeypatch.setenv("VLLM_API_KEY", "c")
    assert vllm_api.api_keys(Namespace(api_key=None)) == ["c"]
    assert vllm_api.api_keys(Namespace(api_key=["a"])) == ["a"]
    monkeypatch.delenv("VLLM_API_KEY")
    assert vllm_api.api_keys(Namespace(api_key=None)) == []


def test_the_endpoint_plugin_fits_vllms_protocol():
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(F2LEndpointPlugin(), EndpointPlugin)


def test_an_engine_without_lora_is_refused():
    engine = Namespace(vllm_config=Namespace(lora_config=None))
    with pytest.raises(ValueError, match="--enable-lora"):
        vllm_api.engine_limits(engine)


@pytest.mark.parametrize(("executor", "one"), [("uni", True), ("mp", True), ("ray", False)])
def test_adapters_are_kept_in_this_machines_memory_only_if_all_workers_are_here(executor, one):
    parallel = ParallelConfig()
    parallel.distributed_executor_backend = executor
    assert vllm_api.is_on_one_machine(Namespace(vllm_config=Namespace(parallel_config=parallel))) is one


def test_an_engine_that_would_not_attach_an_adapter_is_refused():
    engine = Namespace(
        vllm_config=Namespace(
            lora_config=LoRAConfig(max_lora_rank=16, max_loras=1, max_cpu_loras=2, target_modules=["q_proj"])
        )
    )
    limits = vllm_api.engine_limits(engine)
    assert (limits.max_rank, limits.host_slots, limits.target_modules) == (16, 2, {"q_proj"})
    check_limits(limits, rank=16, modules=["q_proj"])
    with pytest.raises(ValueError, match="--max-lora-rank 32"):
        check_limits(limits, rank=32, modules=["q_proj"])
    with pytest.raises(ValueError, match="down_proj: name it in --lora-target-modules"):
        check_limits(limits, rank=16, modules=["down_proj", "q_proj"])
    everything = EngineLimits(max_rank=16, host_slots=2, target_modules=None)
    check_limits(everything, rank=16, modules=["down_proj"])


def test_environments_that_bypass_or_open_the_server_are_refused(monkeypatch):
    vllm_api.check_environment(Namespace())
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="bypasses Python plugins"):
        vllm_api.check_environment(Namespace())
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    with pytest.raises(ValueError, match="--api-server-count must be 1"):
        vllm_api.check_environment(Namespace(api_server_count=2))
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    with pytest.raises(ValueError, match="unset it"):
        vllm_api.check_environment(Namespace())


def test_responses_name_what_was_asked_for():
    class Models:
        def model_name(self, lora_request=None):
            return "adapter"

    state = State({"openai_serving_models": Models(), "openai_serving_chat": 1, "openai_serving_completion": None})
    wraps = dict.fromkeys(("openai_serving_chat", "openai_serving_completion", "absent"), lambda inner: inner + 1)
    vllm_api.wrap_servings(state, **wraps)
    assert not hasattr(state, "absent")
    assert state.openai_serving_chat == 2
    assert state.openai_serving_completion is None
    assert state.openai_serving_models.model_name() == "adapter"
    token = vllm_api.asked_model.set("file-1")
    assert state.openai_serving_models.model_name() == "file-1"
    vllm_api.asked_model.reset(token)


def test_a_request_that_the_engine_gave_up_raises_in_one_way_and_is_streamed_in_another():
    assert "raise GenerationError(" in inspect.getsource(GenerateBaseServing._raise_if_error)
    assert vllm_api.is_failed_generation(GenerationError("Internal server error"))
    assert not vllm_api.is_failed_generation(EngineDeadError())
    assert vllm_api.is_engine_dead(EngineDeadError())
    streamed = {
        "0.32": 'yield f"data: {self._convert_generation_error_to_streaming_response(e)}\\n\\n"',
        "0.33": "yield self.create_error_response(",
    }
    assert streamed[vllm_versions.installed()] in source_of(OpenAIServingChat)
    error = ErrorResponse(error=ErrorInfo(message="m", type="InternalServerError", code=500))
    for written in (json.dumps(error.model_dump()), error.model_dump_json()):
        assert vllm_answers.is_error_chunk(f"data: {written}\n\n")
    assert "json.dumps(" in inspect.getsource(GenerateBaseServing.create_streaming_error_response)
    assert not vllm_answers.is_error_chunk(
        'data: {"id":"chatcmpl-1","choices":[{"delta":{"content":"{\\"error\\":"}}]}\n\n'
    )


def test_an_engine_says_which_adapters_it_has():
    assert inspect.iscoroutinefunction(AsyncLLM.list_loras)


def test_every_handler_makes_its_prompts_by_two_methods_of_one_renderer():
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.renderers import base, online_renderer

    for method in (base.BaseRenderer.render_chat_async, base.BaseRenderer.render_cmpl_async):
        assert "prompt_extras" in inspect.signature(method).parameters
        assert "self._apply_prompt_extras(tok_prompts, prompt_extras)" in inspect.getsource(method)
    source = inspect.getsource(online_renderer)
    assert "renderer = self.renderer" in source
    assert source.count("await renderer.render_chat_async(") == source.count("await renderer.render_cmpl_async(") == 1
    assert "online_renderer" in inspect.getsource(OpenAIServingChat.render_chat_request)
    for handler in (OpenAIServingResponses, AnthropicServingMessages):
        assert "online_renderer" in source_of(handler)


def test_prompts_are_made_within_a_question_and_under_its_salt():
    seen = []
    place = PlaceholderRange(offset=3, length=4, is_embed=torch.tensor([False, True, True, False]))

    class Renderer:
        async def render_chat_async(self, *messages, prompt_extras=None):
            seen.append((list(entered), messages, prompt_extras))
            return [], [{"mm_placeholders": {"image": [place], "video": [place]}}, {}]

        async def render_cmpl_async(self, *prompts, prompt_extras=None):
            seen.append((list(entered), prompts, prompt_extras))
            return [{}]

    @contextmanager
    def question():
        entered.append(1)
        yield
        entered.pop()

    entered, engine = [], Namespace(renderer=Renderer())
    vllm_api.enclose_renderings(engine, question, lambda given: None if given is None else f"own {given}")
    token = vllm_api.visual_tokens.set(noted := [])
    asyncio.run(engine.renderer.render_chat_async("a"))
    asyncio.run(engine.renderer.render_cmpl_async("b", prompt_extras={"cache_salt": "s", "other": 1}))
    vllm_api.visual_tokens.reset(token)
    assert seen == [([1], ("a",), {}), ([1], ("b",), {"cache_salt": "own s", "other": 1})]
    assert (entered, noted) == ([], [4])
    assert 'engine_input.get("mm_placeholders")' in inspect.getsource(serving._get_mm_token_counts)


def test_the_output_processor_counts_the_requests_in_work():
    processor = OutputProcessor(None, log_stats=False)
    engine = Namespace(output_processor=processor)
    assert vllm_api.questions_in_work(engine) == 0
    processor.request_states["one"] = object()
    assert vllm_api.questions_in_work(engine) == 1


def test_warnings_of_libraries_are_shown_though_vllms_routes_hide_them(monkeypatch, capsys):
    """Importing a library of its SageMaker routes has the root logger show errors alone; vLLM leaves it so."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logs.Handler("server")])
    configure_root_logger()
    assert root.level == logging.ERROR
    assert "import model_hosting_container_standards" in inspect.getsource(sagemaker._attach_router)
    root.handlers[0].setLevel(logging.NOTSET)  # as vLLM restores it
    vllm_api.log_like_vllm("f2l_vllm")
    logging.getLogger("some.library").warning("low on memory")
    assert "[some.library] low on memory" in capsys.readouterr().err
