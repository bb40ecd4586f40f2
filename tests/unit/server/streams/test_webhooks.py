"""Webhooks against a real receiver on this machine."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai
import pytest

from f2l_vllm.server.streams.webhooks import WebhookError, Webhooks, new_secret, secret_key, signature
from f2l_vllm.server_process import free_port
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.fetch import FetchPolicy

LOOPBACK = FetchPolicy(allowed=("127.0.0.0/8",))
EVENT = {"id": "evt_1", "object": "event", "type": "stream.watch.answer", "created_at": 1, "data": {"id": "é"}}


class Receiver:
    """Answers with one status after another, the last one again and again; keeps what it received."""

    def __init__(self, *statuses, port=0, body=b"", location=None):
        self.received = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"]))
                outer.received.append((dict(self.headers), content))
                self.send_response(statuses[min(len(outer.received), len(statuses)) - 1])
                if location:
                    self.send_header("Location", location)
                self.end_headers()
                while body:
                    self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a sender that has read enough
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def send(url, secret=None, policy=LOOPBACK, **limits):
    hooks = Webhooks(policy, **{"tries": 5, "first_delay": 0.01, "longest_delay": 0.02, **limits})
    asyncio.run(hooks.send(url, secret or new_secret(), EVENT))


def test_the_signature_is_the_standards_published_one():
    key = secret_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    assert (
        signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
        == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


def test_the_stock_client_takes_the_event_and_refuses_one_that_was_changed():
    secret = new_secret()
    with Receiver(200) as receiver:
        send(receiver.url, secret)
    ((headers, body),) = receiver.received
    client = openai.OpenAI(api_key="-", webhook_secret=secret)
    client.webhooks.verify_signature(body, headers)
    assert json.loads(body) == EVENT
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(body.replace(b"evt_1", b"evt_2"), headers)


def test_a_receiver_that_fails_gets_the_same_id_again_until_it_succeeds():
    with Receiver(500, 503, 204) as receiver:
        send(receiver.url)
    assert [headers["webhook-id"] for headers, _ in receiver.received] == ["evt_1"] * 3


def test_a_receiver_that_always_fails_is_given_up_after_so_many_tries():
    with Receiver(500) as receiver, pytest.raises(WebhookError, match=r"in 5 tries.*status 500"):
        send(receiver.url)
    assert len(receiver.received) == 5


def test_a_receiver_that_is_down_gets_the_event_when_it_is_back():
    port = free_port()

    async def run():
        hooks = Webhooks(LOOPBACK, tries=1000, first_delay=0.01, longest_delay=0.02)
        refused = asyncio.Event()
        attempt = hooks._try

        async def watched(*arguments):
            try:
                return await attempt(*arguments)
            except VideoError:
                refused.set()
                raise

        hooks._try = watched
        sending = asyncio.create_task(hooks.send(f"http://127.0.0.1:{port}/", new_secret(), EVENT))
        await refused.wait()
        with Receiver(200, port=port) as receiver:
            await sending
        assert len(receiver.received) == 1

    asyncio.run(run())


def test_gone_ends_it_at_once():
    with Receiver(410) as receiver, pytest.raises(WebhookError) as error:
        send(receiver.url)
    assert error.value.gone
    assert len(receiver.received) == 1


def test_a_redirect_is_not_followed():
    with Receiver(200) as elsewhere, Receiver(302, location=elsewhere.url) as receiver:
        with pytest.raises(WebhookError, match="redirects are not followed"):
            send(receiver.url, tries=2)
        assert len(receiver.received) == 2
        assert elsewhere.received == []


def test_a_long_answer_is_not_read_to_its_end():
    with Receiver(200, body=bytes(1 << 20)) as receiver:
        send(receiver.url, tries=1, seconds=5)
    assert len(receiver.received) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]"])
def test_an_address_that_is_not_public_is_refused_at_once(host):
    with pytest.raises(VideoError) as error:
        send(f"http://{host}:9/", policy=FetchPolicy())
    assert error.value.code == "url_not_allowed"


def test_a_receiver_that_does_not_answer_is_given_up_after_its_time():
    async def run():
        async def silent(_reader, _writer):
            await asyncio.Event().wait()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        with pytest.raises(WebhookError, match="did not answer"):
            await Webhooks(LOOPBACK, tries=1, seconds=0.05).send(url, new_secret(), EVENT)
        server.close()

    asyncio.run(run())


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_#", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])
def test_a_secret_that_is_none_is_refused(secret):
    with pytest.raises(ValueError, match="whsec_"):
        secret_key(secret)
