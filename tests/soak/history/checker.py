"""Finds in a history what servers of one catalog and one store may never show. Pure: it asks nobody.

A file is there from the end of its acknowledged upload until somebody begins to delete it or it may be due, and it is
gone from the end of an acknowledged deletion or when it must be due. Between the two, and at the times of operations
whose outcome nobody heard, either answer is right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.soak.history.operations import GRACE_SECONDS, LATE_SECONDS, NO_ANSWER, Operation

READY_SECONDS = 30.0
_FOREVER = float("inf")
_READS = ("ask", "content")
_REFUSALS = {409, 429}  # not ready yet, queue full
_KEY_SECONDS = 5.0  # by then a new key works everywhere: servers read the keys once a second at most


@dataclass(frozen=True)
class Violation:
    """A rule that was broken, in words, and the operations that show it."""

    rule: str
    text: str
    operations: tuple[Operation, ...]


@dataclass
class File:
    """One accepted upload, and what was done to it by its tenant."""

    upload: Operation
    deletes: list[Operation] = field(default_factory=list)
    uses: list[Operation] = field(default_factory=list)

    @property
    def may_be_gone(self) -> float:
        """From when on it may be absent. An answer has whole seconds; a use may be forgotten with its server."""
        begun = [one.start for one in self.deletes if one.is_done or one.is_uncertain]
        due = _FOREVER if self.upload.expires_at is None else self.upload.expires_at
        return min([due, *begun])

    @property
    def must_be_gone(self) -> float:
        """From when on it must be absent."""
        due = _FOREVER if self.upload.expires_at is None else self.upload.expires_at + 1
        if self.upload.idle_seconds is not None:
            for one in sorted(self.uses, key=lambda one: one.start):
                if one.start <= due:  # a later one finds nothing to use
                    due = max(due, one.end + self.upload.idle_seconds + 1)
        return min(due, self.deleted)

    @property
    def deleted(self) -> float:
        """From when on it cannot be deleted any more. One that is due can, until somebody has tidied up."""
        return min((one.end for one in self.deletes if one.is_done), default=_FOREVER)


def violations(history: Sequence[Operation]) -> list[Violation]:
    """Everything that is wrong with a history."""
    known = files(history)
    rules = (_answers, _keys, _errors, _lists, _doubles, _erasures, _end)
    return [one for rule in rules for one in rule(history, known)]


def files(history: Sequence[Operation]) -> dict[str, File]:
    """The accepted uploads by id."""
    known = {one.file_id: File(one) for one in history if one.kind == "upload" and one.is_done}
    for one in history:
        found = known.get(one.file_id)
        if found is None or one.tenant != found.upload.tenant:
            continue
        if one.kind == "delete":
            found.deletes.append(one)
        elif one.kind == "ask" and one.status not in (401, 404):
            found.uses.append(one)
    return known


def _answers(history: Sequence[Operation], known: dict[str, File]) -> Iterator[Violation]:
    """Each answer comes from the file that was asked about, while it is there."""
    for one in history:
        found = known.get(one.file_id)
        if one.kind not in (*_READS, "delete") or found is None:
            continue
        shown = (found.upload, *found.deletes, one)
        if one.tenant != found.upload.tenant:
            if one.is_done:
                yield Violation("another tenant's", f"{one.kind} of another tenant's file was done", shown)
        elif one.is_done:
            if one.kind in _READS and one.sha256 != found.upload.sha256:
                yield Violation("another video's", f"{one.kind} came from {one.sha256[:12]}", shown)
            if one.start > (found.must_be_gone if one.kind in _READS else found.deleted):
                yield Violation("after its end", f"{one.kind} of a file that was gone", shown)
        elif one.status == 404 and one.end < found.may_be_gone:
            yield Violation("lost", f"{one.kind} found no file that nobody had deleted", shown)
        elif one.status == 422:
            yield Violation("lost", f"the file failed: {one.code}", shown)


def _keys(history: Sequence[Operation], _known: dict[str, File]) -> Iterator[Violation]:
    """Nobody is let in by a key that was revoked before he asked, and nobody is kept out who has a valid one."""
    added = {one.key: one for one in history if one.kind == "add key"}
    revoked = {one.key: one for one in history if one.kind == "revoke key"}
    for one in history:
        if one.kind not in (*_READS, "upload", "delete", "list"):
            continue
        begin, end = added.get(one.key), revoked.get(one.key)
        shown = tuple(known for known in (begin, end, one) if known is not None)
        if one.status == 401:
            is_new = begin is not None and one.start < begin.end + _KEY_SECONDS
            if not is_new and (end is None or one.end < end.start):
                yield Violation("refused", f"{one.kind} was refused although its key was valid", shown)
        elif end is not None and end.is_done and one.start > end.end and one.status not in (NO_ANSWER, 503):
            yield Violation("revoked", f"{one.kind} was let in by a key that had been revoked", shown)


def _errors(history: Sequence[Operation], _known: dict[str, File]) -> Iterator[Violation]:
    """Nobody sees an error but of a server that was being harmed, or one that says when to ask again. 500 is a bug
    whatever was harmed: for what is away there is 503."""
    faults = defaultdict(list)
    yield from (Violation("died", f"{one.server} ended by itself", (one,)) for one in history if one.kind == "died")
    for one in history:
        if one.kind == "fault":
            faults[one.server].append(one)
    for one in history:
        if one.kind not in (*_READS, "upload", "delete", "list") or 200 <= one.status < 300:
            continue
        if one.status == 401:
            continue  # judged by its key
        if one.status in (404, 422) and one.kind not in ("upload", "list"):
            continue  # judged by what is known of the file
        if one.status in _REFUSALS or (one.status == 503 and one.retry_after):
            continue
        is_fault = one.status == NO_ANSWER or one.status > 500
        near = [fault for fault in (*faults[one.server], *faults["postgres"]) if _overlap(one, fault)]
        if not is_fault or not near:
            what = "no answer" if one.status == NO_ANSWER else f"{one.status} {one.code}"
            yield Violation("error", f"{one.kind}: {what} of {one.server}, which nothing excuses", (one,))


def _lists(history: Sequence[Operation], known: dict[str, File]) -> Iterator[Violation]:
    """A list has every file that is there, once, and none that is gone."""
    by_tenant = defaultdict(list)
    for found in sorted(known.values(), key=lambda found: found.upload.end):
        by_tenant[found.upload.tenant].append(found)
    lists = [one for one in history if one.kind == "list" and one.is_done]
    for tenant in {one.tenant for one in lists}:
        coming, there = iter(by_tenant[tenant]), list[File]()
        follows = next(coming, None)
        for one in sorted((one for one in lists if one.tenant == tenant), key=lambda one: one.start):
            while follows is not None and follows.upload.end < one.start:
                there.append(follows)
                follows = next(coming, None)
            there = [found for found in there if found.may_be_gone > one.start]  # so that this takes no square of time
            listed = [file_id for file_id, _ in one.found]
            if len(set(listed)) < len(listed):
                yield Violation("doubled", "a list has a file twice", (one,))
            for found in there:
                if found.may_be_gone > one.end and found.upload.file_id not in listed:
                    yield Violation("lost", "a list lacks a file that nobody had deleted", (found.upload, one))
            for file_id in listed:
                if file_id not in known:
                    continue  # judged as a double
                found = known[file_id]
                if found.upload.tenant != tenant:
                    yield Violation("another tenant's", "a list has another tenant's file", (found.upload, one))
                elif one.start > found.must_be_gone:
                    shown = (found.upload, *found.deletes, one)
                    yield Violation("after its end", "a list has a file that was gone", shown)


def _doubles(history: Sequence[Operation], known: dict[str, File]) -> Iterator[Violation]:
    """Each upload makes one file at most, and one that was refused makes none."""
    uploads = {one.name: one for one in history if one.kind == "upload"}
    made: dict[str, str] = {}  # id -> name
    for one in history:
        if one.kind == "upload" and one.is_done:
            if one.file_id in made:
                yield Violation("doubled", "two uploads were given one id", (known[one.file_id].upload, one))
            made[one.file_id] = one.name
    ids = {name: file_id for file_id, name in made.items()}
    for one in history:
        for file_id, name in one.found if one.kind == "list" and one.is_done else ():
            upload = uploads.get(name)
            if upload is None or upload.tenant != one.tenant:
                yield Violation("another tenant's", f"a list has {name}, which its tenant never uploaded", (one,))
            elif ids.setdefault(name, file_id) != file_id:
                yield Violation("doubled", f"one upload made {ids[name]} and {file_id}", (upload, one))
            elif not upload.is_done and not upload.is_uncertain:
                yield Violation("doubled", f"an upload that was refused made {file_id}", (upload, one))


def _erasures(history: Sequence[Operation], _known: dict[str, File]) -> Iterator[Violation]:
    """What was erased is nowhere, but on a server that was being harmed, and in the store of an attempt that was given
    up: until it ends it may put its adapter there. In the end, nothing of anything is left."""
    uploads, faults = defaultdict(list), defaultdict(list)
    for one in history:
        if one.kind == "upload":
            uploads[one.sha256].append(one)
        elif one.kind == "fault":
            faults["store" if one.code == "give up a worker" else one.server].append(one)
    for one in history:
        if one.kind != "look" or sum(upload.start < one.end for upload in uploads[one.sha256]) > 1:
            continue  # somebody else has uploaded the same bytes
        for place in one.found:
            grace = LATE_SECONDS if place.startswith("store adapters/") else GRACE_SECONDS
            if not any(_overlap(one, fault, grace) for fault in faults[place.split(" ")[0]]):
                yield Violation("not erased", f"{place} was left of a video that was erased", (one,))
    calm = _calm(history)
    for one in history:
        if one.kind == "delete" and calm is not None and one.start >= calm.end and one.is_done and one.erased is False:
            yield Violation("not erased", "a video was not erased in time although all servers were well", (one,))
    last = next((one for one in reversed(history) if one.kind == "left"), None)
    if last is not None and last.found:
        yield Violation("left", f"in the end this is left: {last.found}", (last,))


def _end(history: Sequence[Operation], known: dict[str, File]) -> Iterator[Violation]:
    """When all faults are over, every server is ready in time, and answers about every file that is there."""
    calm = _calm(history)
    if calm is None:
        return
    for one in history:
        if one.kind == "ready" and (not one.is_done or one.end - one.start > READY_SECONDS):
            yield Violation("not ready", f"{one.server} was not ready within {READY_SECONDS:g} s: {one.code}", (one,))
    answered = defaultdict(set)
    for one in history:
        if one.kind == "ask" and one.start >= calm.end and one.is_done:
            answered[one.file_id].add(one.server)
    over = min((one.start for one in history if one.kind == "delete" and one.start >= calm.end), default=_FOREVER)
    for file_id, found in known.items():
        if found.may_be_gone < over or found.upload.expires_at is not None:
            continue
        for server in sorted(set(calm.found) - answered[file_id]):
            asked = [one for one in history if one.kind == "ask" and one.file_id == file_id and one.server == server]
            last = tuple(asked[-1:])
            yield Violation("lost", f"{server} does not answer about a file in the end", (found.upload, *last))


def _calm(history: Sequence[Operation]) -> Operation | None:
    return next((one for one in history if one.kind == "calm"), None)


def _overlap(one: Operation, fault: Operation, grace_seconds: float = GRACE_SECONDS) -> bool:
    return one.start <= fault.end + grace_seconds and fault.start <= one.end
