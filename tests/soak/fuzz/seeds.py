"""Valid requests of every route, to be mutated, and values that parsers and handlers tend to stumble over."""

from __future__ import annotations

import json
from typing import Any

from tests.soak.fuzz.wire import Input

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
TEXT = [{"role": "user", "content": "What is the background?"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_NUMBERS = [0, -1, 1, 1.5, -0.0, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**400, 1e308]
_TEXTS = [
    "x",
    "0",
    "-1",
    "nan",
    "inf",
    "１０",
    "1_0",
    "é",
    "../../etc/passwd",
    "%00",
    "{{7*7}}",
    "file:///etc/passwd",
    "http://127.0.0.1:1/x",
    "data:,",
]
_PICTURES = ["data:image/png;base64,", "data:video/mp4;base64,AAAA", "file-" + "0" * 24]
_CHARACTERS = ["", " ", "\x00", "a\x00b", "\ud800", "\U0001f600", "a" * 5000]
_HOLDERS: list[Any] = [[], {}, [[]], [{}], [None], {"": ""}, {"type": "text"}, {"type": None}, ["x"] * 300]
ODD: list[Any] = [None, True, False, *_NUMBERS, *_TEXTS, *_PICTURES, *_CHARACTERS, *_HOLDERS]
# Fields of the routes' requests that no seed holds.
FIELDS = [
    "allowed_token_ids",
    "bad_words",
    "best_of",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "echo",
    "continue_final_message",
    "add_generation_prompt",
    "f2l",
    "frequency_penalty",
    "ignore_eos",
    "input",
    "include_stop_str_in_output",
    "instructions",
    "kv_transfer_params",
    "length_penalty",
    "logit_bias",
    "logprob_token_ids",
    "logprobs",
    "max_completion_tokens",
    "media_io_kwargs",
    "messages",
    "metadata",
    "min_p",
    "min_tokens",
    "mm_processor_kwargs",
    "model",
    "n",
    "output_config",
    "parallel_tool_calls",
    "presence_penalty",
    "previous_response_id",
    "priority",
    "prompt",
    "prompt_embeds",
    "prompt_logprobs",
    "reasoning",
    "reasoning_effort",
    "repetition_detection",
    "repetition_penalty",
    "request_id",
    "response_format",
    "return_token_ids",
    "seed",
    "session_id",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "store",
    "stream",
    "stream_options",
    "structured_outputs",
    "suffix",
    "system",
    "temperature",
    "text",
    "thinking",
    "thinking_token_budget",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
    "truncate_prompt_tokens",
    "truncation",
    "use_beam_search",
    "user",
    "vllm_xargs",
    "uuid",
    "image_url",
    "video_url",
    "input_audio",
    "file",
    "type",
    "content",
    "role",
]
HEADERS = [
    *(("X-F2L-Wait", wait) for wait in ("0", "nan", "inf", "１", "-1", "1e400")),
    *(("Content-Type", kind) for kind in ("text/plain", "application/json; charset=utf-16", "Multipart/Form-Data")),
    ("Content-Type", "multipart/form-data; boundary="),
    ("Content-Encoding", "gzip"),
    ("Expect", "100-continue"),
    ("Accept-Encoding", "gzip"),
    ("X-Request-Id", "x" * 3000),
    ("X-data-parallel-rank", "7"),
    ("Cookie", "a=\xff;;="),
    *(("Authorization", value) for value in ("Bearer", "Basic x")),
    *(("Range", span) for span in ("bytes=99-1", "bytes=0-0,5-")),
    ("If-None-Match", "*"),
    ("Transfer-Encoding", "identity"),
    ("X-Session-Id", "é"),
]


def seeds(model: str, file_id: str, video: bytes) -> list[Input]:
    """One input at least for every route and every way to ask; `file_id` is a ready video of the caller."""
    ask = {"model": model, "messages": TEXT, "max_tokens": 3}
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"enum": [1, 2]}}}
    video_part = {"type": "file", "file": {"file_id": file_id, "f2l": {"start": 0, "end": 1}}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    text_part = {"type": "text", "text": "x"}
    chats: dict[str, dict[str, Any]] = {
        "sampled": {"temperature": 0.5, "stop": ["x"], "seed": 1, "top_p": 0.9, "n": 1},
        "about a video": {"model": file_id, "f2l": {"mode": "adapter", "wait": 1}},
        "from frames": {"model": file_id, "f2l": {"mode": "frames"}},
        "with a video": {"messages": [{"role": "user", "content": [video_part, text_part]}]},
        "with a picture": {"messages": [{"role": "user", "content": [picture, text_part]}]},
        "streamed": {"stream": True, "stream_options": {"include_usage": True}},
        "of a schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        "of an object": {"response_format": {"type": "json_object"}},
        "of a regex": {"structured_outputs": {"regex": "[a-z]{1,5}"}},
        "of a grammar": {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}},
        "of choices": {"structured_outputs": {"choice": ["a", "b"]}},
        "with a tool": {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
        "with logprobs": {"logprobs": True, "top_logprobs": 2},
    }
    response = {
        "model": model,
        "input": [{"role": "user", "content": "x"}],
        "max_output_tokens": 16,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}},
    }
    others = {
        "completion": (COMPLETIONS, {"model": model, "prompt": "x", "max_tokens": 3, "logprobs": 1}),
        "completion of ids": (COMPLETIONS, {"model": file_id, "prompt": [[1, 2], [3]], "max_tokens": 2}),
        "response": ("/v1/responses", response),
        "message": ("/v1/messages", {**ask, "system": "x", "stop_sequences": ["x"], "temperature": 1.0}),
        "pin": (f"/v1/files/{file_id}", {"f2l": {"pinned": False}}),
    }
    bodies = {f"chat {name}": (CHAT, {**ask, **more}) for name, more in chats.items()} | others
    posts = [Input(name, "POST", path, JSON, json.dumps(body).encode()) for name, (path, body) in bodies.items()]
    own = [f"/v1/files/{file_id}{end}" for end in ("", "/content", "/events", "/adapter")]
    paths = ["/v1/files?limit=2&order=asc&purpose=vision", f"/v1/files?after={file_id}", f"/v1/models/{file_id}", *own]
    paths += ["/v1/models", "/ready", "/health", "/metrics", "/version", "/ping"]
    gets = [Input(f"get {path.split('?')[0].replace(file_id, 'ID')}", "GET", path) for path in paths]
    delete = Input("delete", "DELETE", "/v1/files/file-" + "0" * 24)
    return [*posts, *gets, delete, Input("upload", "POST", "/v1/files", FORM, form(video))]


def form(video: bytes) -> bytes:
    """An upload with every field that there is."""
    parts = {
        'name="purpose"': b"vision",
        'name="expires_after[anchor]"': b"created_at",
        'name="expires_after[seconds]"': b"3600",
        'name="f2l[pinned]"': b"false",
        'name="file"; filename="a.mp4"': video,
    }
    head = "--b\r\nContent-Disposition: form-data; {}\r\n\r\n"
    return b"".join(head.format(name).encode() + value + b"\r\n" for name, value in parts.items()) + b"--b--\r\n"
