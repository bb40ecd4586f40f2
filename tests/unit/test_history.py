"""The checker of histories finds each thing that may not happen, and nothing in a history in which none did."""

from dataclasses import replace

import pytest

from tests.soak.history import operations
from tests.soak.history.checker import violations
from tests.soak.history.operations import NO_ANSWER, Operation

A, B = "a" * 64, "b" * 64


def upload(at, file_id="file-1", tenant="red", sha256=A, **values):
    name = values.pop("name", f"{file_id}.mp4")
    named = {"tenant": tenant, "file_id": file_id, "name": name, "sha256": sha256, "server": "server-0"}
    return Operation("upload", at, at + 0.5, **{**named, **values})


def done(kind, at, file_id="file-1", until=0.5, **values):
    """Something about a file, by its tenant unless said."""
    return Operation(
        kind, at, at + until, file_id=file_id, **{"tenant": "red", "server": "server-0", "sha256": A, **values}
    )


def listed(at, *ids, tenant="red", **values):
    found = [[file_id, f"{file_id}.mp4"] for file_id in ids]
    return Operation("list", at, at + 0.1, tenant=tenant, server="server-0", found=found, **values)


def fault(at, until, server="server-0"):
    return Operation("fault", at, until, server=server, code="kill a server")


def calm(at):
    return Operation("calm", at, at, found=["server-0", "server-1"])


def key(kind, at, until=0.5, **values):
    return Operation(f"{kind} key", at, at + until, tenant="red", key="c" * 64, **values)


KEY = {"key": "c" * 64, "until": 0.1}
ADDED, REVOKED = key("add", 1), key("revoke", 10)
CLEAN = [
    ADDED,
    done("ask", 2, status=401, sha256="", **KEY),  # not every server has read it yet
    done("ask", 8, **KEY),
    done("ask", 10.4, **KEY),  # it began before the revocation was acknowledged
    done("ask", 10.1, status=401, sha256="", **KEY),
    REVOKED,
    done("ask", 10.6, status=401, sha256="", **KEY),
    done("ask", 10.6, status=503, sha256="", retry_after=True, **KEY),
    upload(0),
    upload(1, "file-2", "blue", B),
    upload(1, "file-3", expires_at=20.0),
    upload(1, "file-4", expires_at=4.0, idle_seconds=3.0),
    upload(1, "", name="file-lost.mp4", status=NO_ANSWER, server="server-1"),
    fault(1, 2, "server-1"),
    fault(1.5, 1.6, "postgres"),
    done("ask", 2),
    done("ask", 2, "file-2", tenant="blue", sha256=B),
    done("ask", 2, "file-2", status=404, sha256=""),  # another tenant's
    done("ask", 3, "file-4"),
    done("ask", 4, status=NO_ANSWER, server="server-1"),  # its fault was over a moment ago
    done("ask", 5, status=503, retry_after=True),
    done("ask", 5, status=409),
    done("ask", 6.2, "file-4"),  # each use counts
    listed(6, "file-1", "file-3", "file-4", "file-lost"),  # the last one's upload was done, but not acknowledged
    done("ask", 10.4, "file-4", status=404, until=0.1),
    done("delete", 11, until=2),
    done("ask", 11.5, until=3),  # it began before the deletion was acknowledged
    done("ask", 11.5, status=404),
    done("delete", 12, status=404),
    done("ask", 14, status=404),
    done("ask", 25, "file-3", status=404),
    done("delete", 25, "file-3"),  # due, and nobody has tidied up
    upload(26, "file-5", sha256=A),
    done("look", 27, "file-1", sha256=A, found=["store videos/aa"]),  # the same bytes were uploaded again
    calm(30),
    Operation("ready", 30, 31, server="server-0"),
    *(done("ask", 31, "file-2", tenant="blue", sha256=B, server=f"server-{number}") for number in range(2)),
    *(done("ask", 31, "file-5", server=f"server-{number}") for number in range(2)),
    done("delete", 33, "file-2", tenant="blue", erased=True),
    done("delete", 33, "file-5", erased=True),
    Operation("left", 34, 35, found={}),
]
BROKEN = {
    "an answer from another video": ("another video's", [upload(0), done("ask", 1, sha256=B)]),
    "other bytes": ("another video's", [upload(0), done("content", 1, sha256=B)]),
    "another tenant is answered": ("another tenant's", [upload(0), done("ask", 1, tenant="blue")]),
    "another tenant deletes": ("another tenant's", [upload(0), done("delete", 1, tenant="blue")]),
    "a list shows another tenant's": ("another tenant's", [upload(0), listed(1, "file-1", tenant="blue")]),
    "answered after a deletion": ("after its end", [upload(0), done("delete", 1), done("ask", 1.6)]),
    "deleted twice": ("after its end", [upload(0), done("delete", 1), done("delete", 2)]),
    "answered when due": ("after its end", [upload(0, expires_at=5.0), done("ask", 6.1)]),
    "answered when idle": ("after its end", [upload(0, expires_at=3.0, idle_seconds=3.0), done("ask", 5)]),
    "listed after a deletion": ("after its end", [upload(0), done("delete", 1), listed(2, "file-1")]),
    "not found": ("lost", [upload(0), done("ask", 1, status=404)]),
    "not found before it is due": ("lost", [upload(0, expires_at=9.0), done("ask", 1, status=404)]),
    "not found to be deleted": ("lost", [upload(0), done("delete", 1, status=404)]),
    "failed": ("lost", [upload(0), done("ask", 1, status=422, code="video_failed")]),
    "not listed": ("lost", [upload(0), listed(1)]),
    "not answered in the end": ("lost", [upload(0), calm(9), done("ask", 10), Operation("left", 12, 12)]),
    "answered by a revoked key": ("revoked", [upload(0), ADDED, REVOKED, done("ask", 10.6, **KEY)]),
    "a revoked key finds a video": ("revoked", [upload(0), ADDED, REVOKED, done("ask", 10.6, status=409, **KEY)]),
    "a valid key is refused": ("refused", [upload(0), ADDED, REVOKED, done("ask", 8, status=401, **KEY)]),
    "a lasting key is refused": ("refused", [upload(0), done("ask", 1, status=401)]),
    "an error for no reason": ("error", [upload(0), done("ask", 1, status=502)]),
    "no answer for no reason": ("error", [upload(0), fault(1, 2, "server-1"), done("ask", 1, status=NO_ANSWER)]),
    "no answer long after": ("error", [upload(0), fault(1, 2), done("ask", 9, status=NO_ANSWER)]),
    "unavailable without a time": ("error", [upload(0), done("ask", 1, status=503)]),
    "a bug while it was harmed": ("error", [upload(0), fault(1, 2), done("ask", 1, status=500)]),
    "an upload that is refused": ("error", [upload(0, status=400)]),
    "a process ends": ("died", [Operation("died", 1, 1, server="worker-0")]),
    "one id for two": ("doubled", [upload(0), upload(1, name="other.mp4")]),
    "listed twice": ("doubled", [upload(0), listed(1, "file-1", "file-1")]),
    "two files of one upload": (
        "doubled",
        [upload(0), replace(listed(1), found=[["file-1", "file-1.mp4"], ["file-9", "file-1.mp4"]])],
    ),
    "a file of a refused upload": (
        "doubled",
        [upload(0, "", name="x.mp4", status=429), replace(listed(1), found=[["file-9", "x.mp4"]])],
    ),
    "a file of nobody's": ("another tenant's", [listed(1, "file-9")]),
    "left of one": ("not erased", [upload(0), done("delete", 1), done("look", 1, found=["server-0 videos/aa"])]),
    "left of one elsewhere": (
        "not erased",
        [upload(0), fault(1, 2, "server-1"), done("delete", 1), done("look", 1, found=["server-0 f2l-1"])],
    ),
    "not erased in the end": (
        "not erased",
        [upload(0), replace(calm(3), found=["server-0"]), done("ask", 4), done("delete", 6, erased=False)],
    ),
    "left in the end": ("left", [Operation("left", 1, 2, found={"store": ["videos/aa"]})]),
    "not ready": ("not ready", [calm(1), Operation("ready", 1, 32, server="server-0", status=503, code="behind")]),
}


def test_a_history_in_which_nothing_is_wrong():
    assert violations(CLEAN) == []


@pytest.mark.parametrize(("rule", "history"), BROKEN.values(), ids=BROKEN)
def test_what_may_not_happen_is_found(rule, history):
    found = violations(history)
    assert {one.rule for one in found} == {rule}
    assert all(one.operations for one in found)


def test_a_history_is_read_as_it_was_written(tmp_path):
    operations.write(tmp_path / "history.jsonl", CLEAN)
    assert operations.read(tmp_path / "history.jsonl") == CLEAN
