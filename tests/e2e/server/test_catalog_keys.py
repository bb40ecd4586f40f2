"""A real server whose keys are the catalog's."""

import time

import anthropic
import httpx
import openai
import pytest
from anthropic import Anthropic

from f2l_vllm.catalog.keys import key_hash
from tests.e2e.server.conftest import keys_of


def test_a_key_works_once_it_is_added_and_no_more_when_it_is_revoked(other_server, clips):
    keys = keys_of(other_server.home)
    file_id = other_server.upload(clips[0]).id
    first, other = keys("add", "news"), keys("add", "sport", "--label", "laptop")
    first, other = (other_server.client.with_options(api_key=key) for key in (first, other))
    time.sleep(1.0)
    assert first.files.retrieve(file_id).id == file_id
    assert [model.id for model in other.models.list()] == ["base"]
    with pytest.raises(openai.NotFoundError):
        other.files.retrieve(file_id)
    keys("revoke", "laptop")
    with pytest.raises(openai.AuthenticationError):
        other.models.list()
    second = other_server.client.with_options(api_key=keys("add", "news"))
    keys("revoke", key_hash(first.api_key)[:8])
    with pytest.raises(openai.AuthenticationError):
        first.files.retrieve(file_id)
    time.sleep(1.0)
    assert second.files.retrieve(file_id).id == file_id
    other_server.client.files.delete(file_id)


def test_without_the_console_its_routes_do_not_exist_and_all_others_do(other_server):
    """This server is started with `--no-console`."""
    headers = {"Authorization": f"Bearer {other_server.client.api_key}"}
    own = ("", "/", "/app.js", "/about", "/events", "/files/file-1/poster", "/files/file-1/strip")
    for path in (f"/console{name}" for name in own):
        answer = httpx.get(other_server.url + path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "route_not_found"), path
        assert httpx.get(other_server.url + path).status_code == 401, path  # no page needs no key
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert httpx.get(other_server.url + path, follow_redirects=True).status_code == 200, path
    for path in ("/v1/files", "/v1/models", "/v1/batches"):
        assert httpx.get(other_server.url + path, headers=headers).json()["object"] == "list", path
    asked = {"model": "base", "messages": [{"role": "user", "content": "What is shown?"}], "max_tokens": 2}
    answer = httpx.post(f"{other_server.url}/v1/chat/completions", headers=headers, json=asked, timeout=60)
    assert answer.json()["choices"]


def test_a_key_of_anthropics_client_reaches_its_own_tenants_videos_alone(other_server, clips):
    keys = keys_of(other_server.home)
    video = other_server.upload(clips[1])
    own, other = (
        Anthropic(base_url=other_server.url, api_key=key, max_retries=0)
        for key in (other_server.client.api_key, keys("add", "weather"))
    )
    time.sleep(1.0)
    question = {"model": video.id, "messages": [{"role": "user", "content": "What is shown?"}]}
    assert own.messages.create(**question, max_tokens=4).content
    for call in (
        lambda: other.messages.create(**question, max_tokens=4),
        lambda: other.messages.count_tokens(**question),
    ):
        with pytest.raises(anthropic.NotFoundError, match="No video"):
            call()
    with pytest.raises(anthropic.AuthenticationError) as error:
        own.with_options(api_key="wrong").messages.create(**question, max_tokens=4)
    assert error.value.body["error"]["type"] == "authentication_error"
    other_server.client.files.delete(video.id)


def test_a_conversation_is_stored_for_its_own_tenant_and_goes_on_about_its_video(other_server, clips):
    own, video = other_server.client, other_server.upload(clips[2])
    other = own.with_options(api_key=keys_of(other_server.home)("add", "culture"))
    time.sleep(1.0)
    greedy = {"temperature": 0, "max_output_tokens": 8}
    first = own.responses.create(model=video.id, input="What is shown?", **greedy)
    second = own.responses.create(model="base", input="What else?", previous_response_id=first.id, **greedy)
    assert [named["file_id"] for named in second.model_extra["f2l"]["videos"]] == [video.id]
    assert second.usage.input_tokens > first.usage.input_tokens
    assert own.responses.retrieve(second.id).output_text == second.output_text
    behind = own.responses.create(model=video.id, input="What is shown?", background=True, **greedy)
    for call in (
        lambda: other.responses.retrieve(first.id),
        lambda: other.responses.cancel(behind.id),
        lambda: other.responses.create(model="base", input="What else?", previous_response_id=first.id, **greedy),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert error.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError, match="Another response"):
        other.responses.create(model="base", input="Mine.", extra_body={"request_id": first.id}, **greedy)
    while (found := own.responses.retrieve(behind.id)).status in ("queued", "in_progress"):
        time.sleep(0.1)
    assert found.output_text == first.output_text
    assert found.model_extra["f2l"]["videos"][0]["file_id"] == video.id
    own.files.delete(video.id)
    with pytest.raises(openai.NotFoundError) as error:
        own.responses.create(model="base", input="What else?", previous_response_id=first.id, **greedy)
    assert error.value.code == "video_not_found"
