"""The life of a video as one explicit state machine. Every transition in the project is checked here."""

from __future__ import annotations

from enum import StrEnum


class VideoState(StrEnum):
    """The state of a video. `uploaded` waits for a worker, the next three are a worker's stages, the rest are ends."""

    UPLOADED = "uploaded"
    DECODING = "decoding"
    ENCODING = "encoding"
    PUBLISHING = "publishing"
    PROCESSED = "processed"
    ERROR = "error"
    EXPIRED = "expired"
    DELETED = "deleted"


_S = VideoState
GONE = (_S.DELETED, _S.EXPIRED)
LIVE = [state.value for state in VideoState if state not in GONE]
IN_WORK = frozenset({_S.UPLOADED, _S.DECODING, _S.ENCODING, _S.PUBLISHING})
_ENDS = {_S.ERROR, _S.EXPIRED, _S.DELETED}
# A file may join a job that is already running, so it may skip stages. A stage falls back to `uploaded` when the worker
# dies. `processed` falls back only when the adapter has to be made again: it is missing or damaged, or was made under
# other revisions of the models. Without the video's bytes it becomes `error` until the old revisions are served again.
TRANSITIONS: dict[VideoState, frozenset[VideoState]] = {
    _S.UPLOADED: frozenset({_S.DECODING, _S.ENCODING, _S.PUBLISHING, _S.PROCESSED, *_ENDS}),
    _S.DECODING: frozenset({_S.ENCODING, _S.PUBLISHING, _S.UPLOADED, _S.PROCESSED, *_ENDS}),
    _S.ENCODING: frozenset({_S.PUBLISHING, _S.UPLOADED, _S.PROCESSED, *_ENDS}),
    _S.PUBLISHING: frozenset({_S.PROCESSED, _S.UPLOADED, *_ENDS}),
    _S.PROCESSED: frozenset({_S.UPLOADED, _S.ERROR, _S.EXPIRED, _S.DELETED}),
    _S.ERROR: frozenset({_S.PROCESSED, _S.EXPIRED, _S.DELETED}),
    _S.EXPIRED: frozenset({_S.DELETED}),
    _S.DELETED: frozenset(),
}


class IllegalTransition(RuntimeError):
    """The state machine has no such transition. This is a bug in the caller, never a user's mistake."""


def check_transition(current: VideoState, new: VideoState) -> None:
    """Raise `IllegalTransition` unless `current -> new` is an edge of the state machine."""
    if new not in TRANSITIONS[current]:
        raise IllegalTransition(f"a video cannot go from {current} to {new}")
