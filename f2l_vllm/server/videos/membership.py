"""One server's place among those of its catalog: it forgets what others delete, and answers while its models are the
ones that files are answered with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.catalog.listener import Listener
from f2l_vllm.catalog.notices import DELETIONS, MODELS
from f2l_vllm.server.videos.bell import Bell
from f2l_vllm.server.videos.forgetting import Forgetting
from f2l_vllm.store.errors import Unavailable

logger = logging.getLogger(__name__)
_TICK_SECONDS = 0.5
_LEAST_SECONDS = 0.05  # between two calls of `attend`, however much is deleted


class Membership:
    """Lives on the server's event loop.

    Args:
        revision: identifies this server's models and sampling.
        adopt: brings the catalog's files to this revision. Runs in a thread.
        listener: hears of deletions and of models that were appointed.
    """

    def __init__(
        self,
        catalog: Catalog,
        forgetting: Forgetting,
        revision: str,
        adopt: Callable[[], None],
        listener: Listener | None = None,
    ) -> None:
        self._catalog, self._forgetting, self._revision, self._adopt = catalog, forgetting, revision, adopt
        self._bell = Bell(listener, DELETIONS, MODELS)
        self._is_appointed: bool | None = None  # None: not known yet
        self.appointed = asyncio.Event()  # set when this server has answered for the first time, or may
        catalog.revision = revision

    async def attend(self) -> None:
        """Forget what was deleted since the last call; notice if the models change that files are answered with."""
        await self._forgetting.forget()
        is_appointed = await asyncio.to_thread(self._catalog.is_appointed, self._revision)
        if is_appointed and not self._is_appointed:
            await self._begin()
        elif not is_appointed and self._is_appointed is not False:
            message = "files are answered by servers with other models: to change, run f2l-vllm adopt %s or stop them"
            logger.warning(message, self._revision)
        self._is_appointed = is_appointed

    async def _begin(self) -> None:
        """Answer from now on, and adopt the files: those that are not adopted yet are refused one by one."""
        self._is_appointed = True
        adopting = asyncio.create_task(asyncio.to_thread(self._adopt))
        try:
            while not (await asyncio.wait([adopting], timeout=_TICK_SECONDS))[0]:
                with suppress(Unavailable):
                    await self._forgetting.forget()  # which also tells the others that this server runs
            await adopting
        except BaseException:
            self._is_appointed = None  # it begins again with the next `attend`
            raise
        self.appointed.set()

    async def run(self) -> None:
        """Call `attend` repeatedly, and when something was deleted or appointed, until cancelled."""
        while True:
            await asyncio.sleep(_LEAST_SECONDS)
            await self._bell.wait(_TICK_SECONDS - _LEAST_SECONDS)
            self._bell.silence()
            try:
                await self.attend()
            except Unavailable as error:
                logger.warning("this server hears later of what others do: %s", error)
            except Exception:
                logger.exception("this server heard nothing of the others, and goes on")

    @property
    def is_waiting(self) -> bool:
        """Whether files are answered by servers of another revision."""
        return self._is_appointed is False

    @property
    def why_not_ready(self) -> str | None:
        """Why no question should come here now; None if they may."""
        if not self._forgetting.has_joined:
            return "what was deleted while this server was away is being forgotten"
        if not self._is_appointed:
            return "files are answered by servers with another model, hypernetwork or sampling than this one's"
        return None
