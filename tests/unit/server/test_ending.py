"""What stands between a server that stops and its clients, without a server."""

import asyncio
import json
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from starlette.responses import JSONResponse, StreamingResponse

from f2l_vllm.server.middleware import ending as ending_module
from f2l_vllm.server.middleware.ending import Ending, LastWords

GRACE = 0.2


async def receive():
    """A client that says no more."""
    await asyncio.sleep(3600)


class Server:
    """An app behind `LastWords`, and what each of its clients saw."""

    def __init__(self, app, grace=GRACE, delay=0.0):
        self.stopped = False
        self.ending = Ending(grace, self._stop, lambda: self.stopped, delay)
        self._app = LastWords(app, self.ending, ["/health"])

    def _stop(self):
        self.stopped = True

    async def ask(self, path="/v1/chat/completions"):
        """Status, headers, body, and whether the response came to its end."""
        sent = []

        async def send(message):
            sent.append(message)

        await self._app({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send)
        if not sent:
            return None, {}, "", False
        body = b"".join(message.get("body", b"") for message in sent[1:]).decode()
        whole = len(sent) > 1 and not sent[-1].get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], headers, body, whole


@pytest.fixture(autouse=True)
def no_deadline(monkeypatch):
    """These tests outlive the server they stop."""
    monkeypatch.setattr(ending_module.faulthandler, "dump_traceback_later", lambda *_, **__: None)


def events(seconds, count):
    """An app that streams so many events, so far apart."""

    async def app(scope, receive, send):
        async def body():
            for index in range(count):
                yield f"data: {index}\n\n"
                await asyncio.sleep(seconds)

        await StreamingResponse(body(), media_type="text/event-stream")(scope, receive, send)

    return app


def after(seconds):
    """An app that answers in one piece after so long, and takes an unkind view of being cancelled."""

    async def app(scope, receive, send):
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            await JSONResponse({"error": "Client disconnected"}, 400)(scope, receive, send)
            return
        await JSONResponse({"ok": True})(scope, receive, send)

    return app


def said(body):
    """The error of a body or an event, as a client reads it."""
    return json.loads(body.strip().rsplit("data: ", 1)[-1])["error"]


async def stopped_under(server, *paths, pause=0.05):
    """What those saw who were being answered when the server was told to stop."""
    asked = [asyncio.create_task(server.ask(*([path] if path else []))) for path in paths]
    await asyncio.sleep(pause)
    server.ending.begin()
    return await asyncio.wait_for(asyncio.gather(*asked), 5)


def test_answers_that_end_within_the_grace_are_whole():
    async def run():
        server = Server(after(GRACE / 2))
        ((status, _, body, whole),) = await stopped_under(server, None)
        assert (status, json.loads(body), whole) == (200, {"ok": True}, True)
        server = Server(events(0.02, 4))
        ((status, _, body, whole),) = await stopped_under(server, None)
        assert (status, body.count("data: "), whole) == (200, 4, True)
        while not server.stopped:  # nobody is waited for any more
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_stream_that_goes_on_ends_with_an_error_as_its_last_event():
    async def run():
        server = Server(events(0.02, 10_000))
        ((status, _, body, whole),) = await stopped_under(server, None)
        assert (status, whole) == (200, True)
        assert body.startswith("data: 0\n\ndata: 1\n\n")
        assert said(body)["code"] == "shutting_down"
        assert body.endswith("}\n\n")
        assert "error" not in body[: body.rindex("data: ")]

    asyncio.run(run())


def test_the_last_event_of_v1_messages_is_one_that_its_clients_know():
    async def run():
        server = Server(events(0.02, 10_000))
        ((_, _, body, _),) = await stopped_under(server, "/v1/messages")
        event, data = body.strip().split("\n\n")[-1].split("\n")
        assert event == "event: error"
        assert json.loads(data.removeprefix("data: "))["type"] == "error"
        assert said(body)["code"] == "shutting_down"

    asyncio.run(run())


def test_an_answer_in_one_piece_becomes_503_even_where_its_handler_answers_the_cancellation():
    async def run():
        ((status, headers, body, whole),) = await stopped_under(Server(after(3600)), None)
        assert (status, said(body)["code"], whole) == (503, "shutting_down", True)
        assert int(headers["retry-after"]) > 0

    asyncio.run(run())


def test_what_ignores_that_it_is_cancelled_keeps_no_client_waiting():
    async def stubborn(scope, receive, send):
        for _ in range(2):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(1)

    async def run():
        server, sent = Server(stubborn), []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/files", "headers": []}
        task = asyncio.create_task(server._app(scope, receive, send))
        await asyncio.sleep(0.05)
        server.ending.begin()
        while not server.stopped:
            await asyncio.sleep(0.01)
        assert sent[0]["status"] == 503
        assert not task.done()
        await task

    asyncio.run(asyncio.wait_for(run(), 10))


def test_who_comes_meanwhile_is_told_to_come_back_and_health_is_answered_to_the_last():
    async def run():
        server = Server(after(0.1), grace=0.5)
        first = asyncio.create_task(server.ask())
        await asyncio.sleep(0.02)
        server.ending.begin()
        status, headers, body, _ = await server.ask()
        assert (status, said(body)["code"], headers["connection"]) == (503, "shutting_down", "close")
        assert int(headers["retry-after"]) > 0
        assert (await server.ask("/health"))[0] == 200
        assert (await first)[0] == 200

    asyncio.run(run())


def test_with_a_delay_requests_are_answered_until_load_balancers_know_that_the_server_is_not_ready():
    async def run():
        server = Server(after(0), grace=3600, delay=3600)
        assert (await server.ask("/ready"))[0] == (await server.ask())[0] == 200
        server.ending.begin()
        status, _, body, _ = await server.ask("/ready")
        assert (status, said(body)["code"]) == (503, "shutting_down")
        assert (await server.ask())[0] == 200
        assert not server.ending.is_stopping
        server.ending.begin()  # in a hurry
        while not server.stopped:
            await asyncio.sleep(0.01)
        assert server.ending.is_stopping
        assert (await server.ask())[0] == 503

    asyncio.run(asyncio.wait_for(run(), 10))


def test_the_delay_is_a_part_of_the_grace():
    async def run():
        server = Server(after(3600), grace=0.2, delay=3600)
        asked = asyncio.create_task(server.ask())
        await asyncio.sleep(0.02)
        server.ending.begin()
        assert (await asked)[0] == 503

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_second_signal_ends_the_wait():
    async def run():
        server = Server(after(3600), grace=3600)
        asked = asyncio.create_task(server.ask())
        await asyncio.sleep(0.02)
        server.ending.begin()
        await asyncio.sleep(0.1)
        assert not asked.done()
        server.ending.begin()
        assert (await asyncio.wait_for(asked, 2))[0] == 503

    asyncio.run(run())


def test_a_client_that_does_not_read_is_not_waited_for():
    async def run():
        server, blocked = Server(events(0.01, 10_000)), asyncio.Event()

        async def send(message):
            if b"1" in message.get("body", b""):
                blocked.set()
            if blocked.is_set():
                await asyncio.sleep(3600)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        asyncio.create_task(server._app(scope, receive, send))  # noqa: RUF006
        await blocked.wait()
        server.ending.begin()
        while not server.stopped:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 5))


def test_a_server_whose_engine_died_tells_those_whom_uvicorn_cancels():
    async def run():
        server = Server(events(0.02, 10_000))
        asked = asyncio.create_task(server.ask())
        await asyncio.sleep(0.05)
        server.stopped = True
        asked.cancel()
        _, _, body, whole = await asked
        assert (said(body)["code"], whole) == ("shutting_down", True)

    asyncio.run(run())


STUCK = """
import asyncio, sys, time, types
sys.modules["f2l_vllm.server.errors"] = types.ModuleType("errors")  # and what it imports: nobody is answered here
from f2l_vllm.server.middleware import ending
ending._LEAVE_SECONDS = 1.0
async def main():
    it = ending.Ending(0.2, lambda: None, lambda: False)
    it.take_signals()
    print("ready", flush=True)
    await asyncio.sleep(0.5)
    if sys.argv[1] == "loop":
        pow(7, 10**9, 10**200000 - 1)  # neither the event loop nor any other thread has its turn
    await it.finish(lambda: time.sleep(3600 if sys.argv[1] == "part" else 0))
asyncio.run(main())
"""


@pytest.mark.parametrize(("stuck", "code"), [("nothing", 0), ("part", 1), ("loop", 1)])
def test_a_server_is_gone_in_time_whatever_hangs(stuck, code):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, stuck], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(8) == code
    finally:
        process.kill()
