"""A job's way as spans: `decode`, `read` and `publish`, below the upload that asked for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from f2l_vllm import tracing
from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Job
from f2l_vllm.pool.messages import Event, Failed, Progress

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_NAMES = {VideoState.DECODING: "decode", VideoState.ENCODING: "read", VideoState.PUBLISHING: "publish"}


class Trail:
    """The spans of one lane's jobs. A job whose upload was not traced has none."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[VideoState, Span]] = {}

    def note(self, job: Job, event: Event) -> None:
        """End the span of the state that a job leaves, and begin that of the one it has reached."""
        if job.trace is None or not tracing.is_on():
            return
        state = event.state if isinstance(event, Progress) else None
        if (known := self._open.get(job.object)) is not None:
            at, span = known
            if at is state:
                return
            if isinstance(event, Failed):
                span.set_attribute("error.type", event.code)
            span.end()
            del self._open[job.object]
        if state is not None and state in _NAMES:
            attributes = {"adapter": job.adapter_name, "attempt": job.attempts}
            self._open[job.object] = state, tracing.begin(_NAMES[state], job.trace, **attributes)

    def end(self) -> None:
        """End what is open: the worker has died, or the attempts were given up."""
        for _, span in self._open.values():
            span.set_attribute("error.type", "given_up")
            span.end()
        self._open.clear()
