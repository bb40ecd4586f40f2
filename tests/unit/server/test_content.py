"""What of a request vLLM may see."""

import copy
import typing

import pytest

from f2l_vllm.server.chat.content import CONTENTS, CONVERSATIONS, ITEMS, PARTS, REFUSED, REQUESTS, admit, private
from f2l_vllm.server.errors import APIError
from tests.support.vllm_names import chat_utils, make_arg_parser

TEXT = {"type": "text", "text": "What is shown?"}
PICTURE = {"type": "image_url", "image_url": {"url": "https://a.example/p.png", "detail": "low"}}
INTERNAL = "http://127.0.0.1:9399/x"


def chat(*parts, role="user"):
    return {"messages": [{"role": role, "content": list(parts)}]}


def refusal(body):
    with pytest.raises(APIError) as error:
        admit(body, "tenant", 8)
    assert (error.value.status, len(error.value.message) > 20) == (400, True)
    return error.value.code


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Once"},
        {"prompt": [[1, 2], [3]], "model": "base"},
        {"messages": [{"role": "user", "content": "Hello."}]},
        {"messages": [[{"role": "user", "content": "Hello."}], [{"role": "user", "content": "Again."}]]},
        chat(TEXT, PICTURE, "plain"),
        chat({"type": "image_url", "image_url": {"url": "DATA:image/png;base64,AAAA"}}),
        chat({"type": "file", "file": {"file_id": "file-a", "f2l": {"start": 1}}}, TEXT),
        chat({"type": "video_url", "video_url": {"url": "https://a.example/v.mp4"}}),
        chat({"type": "refusal", "refusal": "No."}, {"type": "thinking", "thinking": "Hm."}, role="assistant"),
        chat({**TEXT, "cache_control": {"type": "ephemeral"}}, role="system"),
        chat({"type": "tool_reference", "name": "f"}, role="tool"),
        {
            "messages": [
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": '{"image_pil": 1}'}}]},
                {"role": "tool", "tool_call_id": "1", "content": [TEXT]},
            ],
            "tools": [{"type": "function", "function": {"parameters": {"properties": {"image_pil": {"type": "x"}}}}}],
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"properties": {"uuid": {}}}}},
            "metadata": {"image_url": "x"},
            "audio": {"voice": "alloy"},
            "mm_processor_kwargs": None,
            "vllm_xargs": {"ngram_size": 3},
        },
        {"input": "Hello."},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file-a", "f2l": {"start": 1}}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "https://a.example/v.mp4"}]}]},
        {
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "https://a/b"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}], "content": None},
                {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"},
                {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "a"}]},
            ]
        },
        {
            "system": [TEXT],
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://a/b"}}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"uuid": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [TEXT]}]},
            ],
        },
        {"query": "a", "items": ["b", [1, 2]], "documents": [{"title": "t", "text": "x"}]},
        "not an object",
        None,
    ],
)
def test_what_clients_of_these_routes_send_passes_as_it_is(body):
    sent = copy.deepcopy(body)
    assert not admit(body, "tenant", 8)
    assert body == sent


def wrapped(part):
    """A part wherever a route would read one."""
    yield from (chat(TEXT, part, role=role) for role in ("user", "system", "assistant", "tool", "developer", "x"))
    yield {"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": [part]}]]}
    yield {"input": [{"role": "user", "content": [part]}]}
    yield {"input": [{"type": "function_call_output", "call_id": "1", "output": [part]}]}
    yield {"input": [{"type": "reasoning", "summary": [part]}]}
    yield {"system": [part], "messages": []}
    yield chat({"type": "tool_result", "tool_use_id": "1", "content": [part]})
    yield {"chat_request": chat(part)}
    for name in CONVERSATIONS:
        yield {name: {"content": [part]}}
        yield {name: ["a", {"content": [part]}]}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_pil", "image_pil": INTERNAL},
        {"image_pil": INTERNAL},
        {"image_url": INTERNAL},
        {"type": None, "image_pil": "/etc/passwd"},
        {"type": ["image_pil"], "image_pil": INTERNAL},
        {"type": "text", "text": "a", "image_pil": INTERNAL},
        {"type": "text", "text": "a", "uuid": "u", "image_pil": INTERNAL},
        {"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "u", "image_pil": INTERNAL},
        {"type": "video_url", "video_url": {"url": "data:,"}, "uuid": "u"},
        {"type": "anything", "uuid": "u", "image_embeds": "AAAA"},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "audio_embeds", "audio_embeds": "AAAA"},
        {"type": "video_embeds", "video_embeds": "AAAA"},
        {"type": "prompt_embeds", "data": "AAAA"},
        {"type": "audio_url", "audio_url": {"url": INTERNAL}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "input_file", "file_url": "file:///etc/passwd"},
        {"type": "input_file", "file_url": ["http://a"]},
        {"type": "input_file", "file_id": "file-a", "image_pil": INTERNAL},
        {"type": "video", "video": "data:,"},
        {"type": "document", "source": {"type": "url", "url": INTERNAL}},
        {"type": "image_url", "image_url": {"url": ["http://a"]}},
        {"type": "image_url", "image_url": ["http://a"]},
        {"type": "image_url", "image_url": {"url": "http://a", "path": "/etc/passwd"}},
        {"type": "image_url", "image_url": None},
        {"type": "image_url"},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
        {"type": "image_url", "image_url": {"url": " https://a"}},
        {"type": "image_url", "image_url": {"url": "httpx://a"}},
        {"type": "input_image", "image_url": {"url": "http://a"}},
        {"type": "input_image", "file_id": "file-a"},
        {"type": "image", "source": {"type": "file", "file_id": "x"}},
        {"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}},
        {"type": "image", "source": {"type": "base64", "data": "AAAA", "url": INTERNAL}},
        {"type": "image", "source": {"url": INTERNAL}},
        {"type": "text", "text": {"image_pil": INTERNAL}},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
        {"type": "video_url", "video_url": 3},
        3,
        None,
        ["a"],
        {},
    ],
)
def test_what_vllm_would_open_by_itself_is_refused_wherever_it_stands(part):
    codes = {"unsupported_part", "invalid_request", "url_not_allowed"}
    for body in wrapped(part):
        assert refusal(copy.deepcopy(body)) in codes, body


def test_a_content_that_is_no_list_is_refused():
    for content in ({"type": "image_pil", "image_pil": INTERNAL}, 3, True):
        assert refusal({"messages": [{"role": "user", "content": content}]}) == "invalid_request"
    assert refusal({"messages": [[[{"role": "user", "content": [{"image_pil": INTERNAL}]}]]]}) == "invalid_request"
    assert (
        refusal({"input": [{"type": "computer_call_output", "output": {"image_url": INTERNAL}}]}) == "unsupported_part"
    )


@pytest.mark.parametrize("name", [*REFUSED, "audio"])
def test_fields_that_would_fetch_or_share_something_are_refused(name):
    assert refusal({"messages": [], name: ["x"]}) == "unsupported_field"
    assert refusal({"chat_request": {"messages": [], name: ["x"]}}) == "unsupported_field"
    assert not admit({"messages": [], name: None}, "tenant", 8)


def test_the_same_by_the_names_of_the_engine_is_refused():
    assert refusal({"prompt": "a", "vllm_xargs": {"kv_transfer_params": "x"}}) == "unsupported_field"


def kept(uuid, tenant="a", **picture):
    body = chat({"type": "image_url", "image_url": {"url": "data:,"}, "uuid": uuid, **picture})
    admit(body, tenant, 8)
    return body["messages"][0]["content"][0]["uuid"]


def test_what_vllm_keeps_under_a_uuid_is_the_tenants_own():
    assert kept("logo") == kept("logo", image_url=None) != kept("logo", tenant="b")
    assert kept("x/k", tenant="alice") != kept("k", tenant="alice/x")
    assert kept('k"]', tenant='a", "') != kept("k", tenant='a", "", "')
    assert private("a", "") != private("", "a")


@pytest.mark.parametrize("uuid", [901, 2.5, True, ["a"], {"a": 1}, "", "x" * 257, 0, False])
def test_a_uuid_that_is_no_text_is_refused(uuid):
    assert refusal(chat({**PICTURE, "uuid": uuid})) == "invalid_uuid"


def test_no_uuid_is_none():
    body = chat({**PICTURE, "uuid": None})
    assert admit(body, "tenant", 8)
    assert body == chat(PICTURE)


def test_an_address_alone_is_taken_as_the_api_writes_it():
    body = chat({"type": "image_url", "image_url": "https://a.example/p.png"})
    assert admit(body, "tenant", 8)
    assert body == chat({"type": "image_url", "image_url": {"url": "https://a.example/p.png"}})


def test_pictures_are_counted_over_the_whole_request():
    assert not admit({"messages": [*chat(*[PICTURE] * 4)["messages"]] * 2}, "tenant", 8)
    assert refusal({"messages": [*chat(*[PICTURE] * 3)["messages"]] * 3}) == "too_many_images"


HARMLESS_FIELDS = """
add_generation_prompt add_special_tokens allowed_token_ids apply_softmax background bad_words best_of cache_salt
continue_final_message early_stopping echo enable_response_messages frequency_penalty generate_chunk
generate_response generate_responses guided_decoding_backend ignore_eos include include_reasoning
include_stop_str_in_output instructions item_first label_token_ids length_penalty logit_bias logprob_token_ids
logprobs max_completion_tokens max_output_tokens max_tokens max_tool_calls metadata min_p min_tokens mm_payload
model n output_config output_mode parallel_tool_calls presence_penalty previous_response_id priority prompt
prompt_cache_key prompt_logprobs prompt_token_ids prompt_tokens questions reasoning reasoning_effort reasoning_ended
reasoning_parser_kwargs repetition_detection repetition_penalty request_id response_format return_mm_kwargs
return_prompt_text return_token_ids return_token_offsets return_token_strs return_tokens_as_token_ids
routed_experts_prompt_start sampling_params seed service_tier session_id skip_special_tokens
spaces_between_special_tokens state stop stop_sequences stop_token_ids store stream stream_interval stream_options
stream_state structured_outputs suffix temperature text thinking thinking_token_budget token_ids token_offsets
tokens tool_choice tools top_k top_logprobs top_p truncate_prompt_tokens truncation truncation_side use_beam_search
user watermarking
joint parse_context prompt_cache_options prompt_cache_retention return_weight_versions safety_identifier
"""


class TestContractWithVllm:
    """Another version that reads more than this one fails here first; decide then what `content.py` does about it."""

    # Kinds of parts that vLLM reads and this server does not take.
    LEFT_OUT: typing.ClassVar = {
        "image_pil",
        "image_embeds",
        "audio_embeds",
        "video_embeds",
        "prompt_embeds",
        "audio_url",
        "input_audio",
    }
    # Fields of vLLM's requests that hold numbers, choices, or text; what they hold is opened by nobody.
    HARMLESS: typing.ClassVar = frozenset(HARMLESS_FIELDS.split())
    # vLLM refuses a template unless the operator trusts clients with it (--trust-request-chat-template).
    BY_VLLMS_OWN_FLAG: typing.ClassVar = {"chat_template", "chat_template_kwargs"}
    CHECKED: typing.ClassVar = {*CONVERSATIONS, *CONTENTS, *REQUESTS, *REFUSED, "audio", "vllm_xargs"}

    def test_every_parser_of_parts_is_decided_about(self):
        parsers = set(chat_utils.MM_PARSER_MAP)
        assert parsers - set(PARTS) == self.LEFT_OUT
        assert parsers - self.LEFT_OUT <= set(PARTS)
        # Where a part has no type or a uuid vLLM goes by its keys: one type alone may have a uuid, and no other's key.
        media_keys = chat_utils._MEDIA_CONTENT_PART_KEYS | {"prompt_embeds"}
        with_uuid = {kind for kind, keys in PARTS.items() if "uuid" in keys}
        assert with_uuid == {"image_url"}
        for kind, keys in PARTS.items():
            assert keys & media_keys <= {kind, "image_url"}, kind

    def test_every_key_by_which_a_part_is_read_is_decided_about(self):
        known = set().union(*PARTS.values()) | {"type"}
        # Of kinds that are left out.
        others = {"image_pil", "image_embeds", "audio_embeds", "video_embeds", "audio_url", "input_audio", "data"}
        assert set(chat_utils._KNOWN_CONTENT_PART_FIELDS) <= known | others

    def test_every_field_of_every_request_is_decided_about(self):
        from fastapi.routing import APIRoute
        from pydantic import BaseModel
        from vllm.entrypoints.launchers.app import build_app
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        def models(annotation):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield annotation
            for inner in typing.get_args(annotation):
                yield from models(inner)

        app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate", "render"))
        bodies = [route.body_field for route in app.routes if isinstance(route, APIRoute) and route.body_field]
        fields = {
            name for body in bodies for model in models(body.field_info.annotation) for name in model.model_fields
        }
        assert len(fields) > 100
        assert fields - self.CHECKED - self.HARMLESS - self.BY_VLLMS_OWN_FLAG == set()
        assert set() == self.HARMLESS & self.CHECKED

    def test_items_of_a_conversation_are_those_that_vllm_makes_messages_of(self):
        import inspect

        from vllm.entrypoints.openai.responses import utils

        source = inspect.getsource(utils)
        assert '("function_call_output", "custom_tool_call_output")' in source
        assert {"function_call_output", "custom_tool_call_output"} <= ITEMS
