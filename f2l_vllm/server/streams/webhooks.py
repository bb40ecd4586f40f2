"""Signed webhooks, as https://www.standardwebhooks.com describes them and OpenAI's clients verify them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import random
import secrets
import time
from dataclasses import replace
from typing import Any

from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.fetch import FetchPolicy, open_url

_PREFIX = "whsec_"
_SECRET_BYTES = 24  # the standard asks for 24 to 64
_ANSWER_BYTES = 4096
_GONE = 410


class WebhookError(Exception):
    """An event that was not delivered.

    Attributes:
        gone: the receiver said that it wants no more events (410).
    """

    def __init__(self, message: str, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class Webhooks:
    """Sends events to receivers, which may be at any public address, and elsewhere only where the policy says so."""

    def __init__(
        self,
        policy: FetchPolicy,
        *,
        tries: int = 12,
        first_delay: float = 1.0,
        longest_delay: float = 600.0,
        seconds: float = 15.0,
    ) -> None:
        """Times are in seconds.

        Args:
            policy: its `allowed` networks are the addresses that are not public and may receive events.
            tries: of one event. With the delays of the defaults, the last begins within 35 minutes.
            first_delay, longest_delay: between tries; it doubles, and half of it is random.
            seconds: of one try, from the look-up of the name to the end of the answer.
        """
        self._policy = replace(policy, seconds=seconds)
        self._tries = tries
        self._first_delay = first_delay
        self._longest_delay = longest_delay

    async def send(self, url: str, secret: str, event: dict[str, Any]) -> None:
        """Return when the receiver has taken the event, which it may get more than once, always with the same id.

        The id is the event's own `id`, if it has one.

        Raises:
            WebhookError: all tries failed, or the receiver is gone.
            VideoError: `invalid_url`, `url_not_allowed`: not tried again.
            ValueError: the secret is not `whsec_` and base64.
        """
        key = secret_key(secret)
        identity = str(event.get("id") or f"msg_{secrets.token_hex(16)}")
        body = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
        for attempt in range(self._tries):
            if attempt:
                delay = min(self._longest_delay, self._first_delay * 2 ** (attempt - 1))
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            try:
                status = await self._try(url, key, identity, body)
            except TimeoutError:
                why = f"it did not answer within {self._policy.seconds:g} s"
                continue
            except VideoError as error:
                if error.code != "url_unreachable":
                    raise
                why = error.message
                continue
            if 200 <= status < 300:
                return
            if status == _GONE:
                raise WebhookError("The webhook's receiver is gone: it answered with status 410.", gone=True)
            why = f"it answered with status {status}" + (
                "; redirects are not followed, so give the address it leads to" if 300 <= status < 400 else ""
            )
        raise WebhookError(f"The webhook was not taken in {self._tries} tries; the last time: {why}")

    async def _try(self, url: str, key: bytes, identity: str, body: bytes) -> int:
        timestamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            "webhook-id": identity,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature(key, identity, timestamp, body),
        }
        async with (
            asyncio.timeout(self._policy.seconds),
            open_url("POST", url, self._policy, headers=headers, content=body, any_public=True) as response,
        ):
            received = 0
            async for piece in response.aiter_raw(_ANSWER_BYTES):
                received += len(piece)
                if received >= _ANSWER_BYTES:
                    break
            return response.status_code


def new_secret() -> str:
    """A secret for a receiver that has none."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def secret_key(secret: str) -> bytes:
    """The key in a secret.

    Raises:
        ValueError: it is not `whsec_` and base64.
    """
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("A webhook's secret is 'whsec_' and then base64.") from error
    if not key or not secret.startswith(_PREFIX):
        raise ValueError("A webhook's secret is 'whsec_' and then base64.")
    return key


def signature(key: bytes, identity: str, timestamp: str, body: bytes) -> str:
    """The value of the header `webhook-signature`."""
    signed = f"{identity}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
