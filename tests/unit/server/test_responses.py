"""Whose a stored response is, and what a conversation goes on about; the handler behind is a stand-in for vLLM's."""

import asyncio
from types import SimpleNamespace

import pytest

from f2l_vllm.server.chat import responses
from f2l_vllm.server.chat.request import Video
from f2l_vllm.server.chat.resolve import AnswerSource
from f2l_vllm.server.chat.responses import ResponsesHandler
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.tenants import asking_tenant


class Inner:
    """Stores as vLLM does, under the request's own id."""

    def __init__(self, enable_store=True):
        self.enable_store = enable_store
        self.background_tasks = {}
        self.response_store, self.msg_store, self.event_store = {}, {}, {}

    async def create_responses(self, request, raw_request):
        if request.input == "fail":
            raise ValueError("unreadable")
        self.response_store[request.request_id] = SimpleNamespace(id=request.request_id, model=request.model)
        if request.background:
            self.background_tasks[request.request_id] = asyncio.create_task(request.written.wait())
        return self.response_store[request.request_id]

    async def retrieve_responses(self, response_id, starting_after, stream):
        return self.response_store[response_id]

    async def cancel_responses(self, response_id):
        return self.response_store[response_id]


class Lease:
    adapter, key, held = SimpleNamespace(name="f2l-1", rank=8), "key", True

    def release(self):
        self.held = False


class Handler(ResponsesHandler):
    """Resolves any videos at once and notes which."""

    def __init__(self, inner):
        super().__init__(
            inner, SimpleNamespace(service=SimpleNamespace(settings=SimpleNamespace(wait_seconds=1))), ["base"]
        )
        self.asked, self.leases = [], []

    async def _source(self, messages, asked, how, tenant):
        self.asked.append((tenant, list(asked)))
        self.leases.append(Lease())
        return AnswerSource("adapter", {}, self.leases[-1]), messages

    async def ask(self, tenant, name, text="Hello?", *, model="base", **fields):
        request = {"background": False, "store": True, "previous_response_id": None, "model_extra": {}, **fields}
        request = SimpleNamespace(request_id=name, model=model, input=text, **request)

        async def body():
            return {"input": text}

        raw = SimpleNamespace(state=SimpleNamespace(tenant=tenant), headers={}, json=body, url=SimpleNamespace(path=""))
        return await self.create_responses(request, raw)

    async def get(self, tenant, name):
        asking_tenant.set(tenant)
        return [await self.retrieve_responses(name, None, False), await self.cancel_responses(name)]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(responses.vllm_answers, "with_details", lambda response, details: response)


def refused(code, awaitable):
    async def run():
        with pytest.raises(APIError) as error:
            await awaitable
        assert error.value.code == code

    return run()


def test_a_response_is_its_tenants_own_by_every_way():
    async def scenario():
        handler = Handler(Inner())
        await handler.ask("a", "resp_a")
        assert [found.id for found in await handler.get("a", "resp_a")] == ["resp_a"] * 2
        await refused("response_not_found", handler.get("b", "resp_a"))
        await refused("response_not_found", handler.ask("b", "resp_b", previous_response_id="resp_a"))
        await refused("response_not_found", handler.ask("a", "resp_c", previous_response_id="resp_b"))
        await refused("invalid_request", handler.ask("b", "resp_a"))  # would stand in its place
        assert (await handler.ask("a", "resp_d", previous_response_id="resp_a")).id == "resp_d"

    asyncio.run(scenario())


def test_a_conversation_goes_on_about_its_videos():
    async def scenario():
        handler = Handler(Inner())
        await handler.ask("a", "resp_1", model="file-1")
        await handler.ask("a", "resp_2", previous_response_id="resp_1")
        await handler.ask("a", "resp_3", model="file-2", previous_response_id="resp_2")
        asked = [videos for _, videos in handler.asked]
        assert asked == [[Video("file-1")], [Video("file-1")], [Video("file-1"), Video("file-2")]]
        assert not any(lease.held for lease in handler.leases)

    asyncio.run(scenario())


def test_what_fails_or_is_not_stored_is_nobodys():
    async def scenario():
        handler = Handler(Inner())
        with pytest.raises(ValueError, match="unreadable"):
            await handler.ask("a", "resp_1", "fail")
        await handler.ask("a", "resp_2", store=False)
        await handler.ask("a", "resp_3", model="file-1", model_extra={"f2l": {"mode": "both"}})
        for name in ("resp_1", "resp_2", "resp_3"):
            await refused("response_not_found", handler.get("a", name))
        await handler.ask("b", "resp_1")
        storeless = Handler(Inner(enable_store=False))
        await storeless.ask("a", "resp_1")
        with pytest.raises(APIError, match="VLLM_ENABLE_RESPONSES_API_STORE"):
            await storeless.get("a", "resp_1")

    asyncio.run(scenario())


def test_only_so_many_are_kept(monkeypatch):
    async def scenario():
        handler = Handler(inner := Inner())
        for number in range(5):
            await handler.ask("a", f"resp_{number}")
        assert set(inner.response_store) == {"resp_2", "resp_3", "resp_4"}
        await refused("response_not_found", handler.get("a", "resp_1"))

    monkeypatch.setattr(responses, "_KEPT", 3)
    asyncio.run(scenario())


def test_an_answer_in_the_background_holds_its_adapter_until_it_is_written():
    async def scenario():
        handler, written = Handler(Inner()), asyncio.Event()
        await handler.ask("a", "resp_1", model="file-1", background=True, written=written)
        (lease,) = handler.leases
        assert lease.held
        written.set()
        await asyncio.sleep(0.01)
        assert not lease.held
        stored, _ = await handler.get("a", "resp_1")
        assert "visual_tokens" in stored.f2l
        frames = {"model": "file-1", "background": True, "model_extra": {"f2l": {"mode": "frames"}}}
        await refused("invalid_f2l_options", handler.ask("a", "resp_2", **frames))

    asyncio.run(scenario())


def test_a_stream_that_fails_ends_with_an_event_that_says_so():
    async def events():
        yield SimpleNamespace(sequence_number=4)
        raise RuntimeError("no")

    async def scenario():
        return [event async for event in responses._told(events(), AnswerSource("adapter"), None)]

    last = asyncio.run(scenario())[-1]
    assert (last.type, last.code, last.sequence_number) == ("error", "internal_error", 5)
