"""The store with a remote side: a folder reached through fsspec, as an object store is."""

import errno
import hashlib
import json
import os
import shutil
import socket

import pytest
from s3fs import S3FileSystem

from f2l_vllm.store import cached_store, object_store
from f2l_vllm.store.errors import StoreUnavailable
from f2l_vllm.store.store import MANIFEST_FILE, StoreError
from tests.support.s3 import environment, temporary_s3
from tests.unit.store.test_store import write

WEIGHTS = "adapter_model.safetensors"


def keep(store, content):
    temporary = store.temporary()
    temporary.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    store.keep_video(temporary, sha256)
    return sha256


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def far(tmp_path):
    return tmp_path / "far"


@pytest.fixture
def open_store(tmp_path, far):
    """`open_store(home)`: a server's or worker's store on one machine or another."""

    def build(home="here", **options):
        return cached_store.open_store(tmp_path / home, url=f"file://{far}", **options)

    return build


def test_an_adapter_cleared_away_while_it_is_written_can_be_written_again(open_store, far, monkeypatch):
    store = open_store()
    put_file, removed = store._remote._files.put_file, []

    def put_after_removal(source, target, **options):
        if not removed and os.path.isdir(os.path.dirname(target)):
            removed.append(shutil.rmtree(os.path.dirname(target)))
            store._remote._files.auto_mkdir = False  # as if between making the folder and writing into it
        put_file(source, target, **options)

    monkeypatch.setattr(store._remote._files, "put_file", put_after_removal)
    with pytest.raises(StoreUnavailable, match="removed from the store while"):
        store.publish_adapter("f2l-1", write("weights"), {})
    store._remote._files.auto_mkdir = True
    store.publish_adapter("f2l-1", write("weights"), {})
    assert store.verify_adapter("f2l-1")


def test_what_one_machine_stores_another_finds_whole(open_store):
    here, there = open_store("here"), open_store("there")
    sha256 = keep(here, b"video")
    here.publish_adapter("f2l-1", write("weights"), {"info": 1})
    assert there.fetch_video(sha256).read_bytes() == b"video"
    path = there.load_path("f2l-1")
    assert (path / WEIGHTS).read_text() == "weights"
    assert there.verify_adapter("f2l-1")["info"] == 1
    assert here.has_video(sha256)
    assert not here.has_video("0" * 64)


@pytest.fixture(params=["memory", "s3"])
def url(request, monkeypatch):
    """Of an empty store."""
    if request.param == "memory":
        yield "memory://bucket/videos"
        return
    with temporary_s3() as s3:
        set_environment(monkeypatch, s3.environment)
        yield s3.url


def set_environment(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # which are connected to another test's


def test_the_same_over_another_kind_of_file_system(tmp_path, url):
    here, there = (cached_store.open_store(tmp_path / home, url=url) for home in ("here", "there"))
    here.sweep(lambda _names: (), older_than_s=-1)  # nothing is there
    sha256 = keep(here, b"video")
    assert not here.has_video("0" * 64)
    here.publish_adapter("f2l-1", write("weights"), {})
    assert there.fetch_video(sha256).read_bytes() == b"video"
    assert (there.load_path("f2l-1") / WEIGHTS).read_text() == "weights"
    here.sweep(lambda _names: ())
    assert there.has_video(sha256)  # too young to be called lost
    here.sweep(lambda _names: (), older_than_s=-1)
    assert not there.has_video(sha256)
    for _ in range(2):  # what is already gone can be removed
        here.remove_video(sha256)
        here.remove_adapter("f2l-1")
    third = cached_store.open_store(tmp_path / "third", url=url)
    with pytest.raises(StoreError, match="missing"):
        third.load_path("f2l-1")
    with pytest.raises(StoreError, match="missing"):
        third.fetch_video(sha256)


def test_a_half_copy_there_is_never_taken_for_a_whole_one(open_store, far):
    here = open_store("here")
    sha256 = keep(here, b"video")
    here.publish_adapter("f2l-1", write("weights"), {})
    (far / "adapters" / "f2l-1" / WEIGHTS).write_text("weigh")
    (far / "videos" / sha256[:2] / sha256).write_bytes(b"vid")
    there = open_store("there")
    with pytest.raises(StoreError, match="differs from what was written"):
        there.load_path("f2l-1")
    with pytest.raises(StoreError, match="differs from what was uploaded"):
        there.fetch_video(sha256)
    (far / "adapters" / "f2l-1" / MANIFEST_FILE).unlink()
    with pytest.raises(StoreError, match="missing"):
        there.load_path("f2l-1")
    assert everything(there.home) == []
    there.publish_adapter("f2l-1", write("weights"), {})
    keep(there, b"video")
    other = open_store("other")
    assert (other.load_path("f2l-1") / WEIGHTS).read_text() == "weights"
    assert other.fetch_video(sha256).read_bytes() == b"video"


def test_a_damaged_copy_here_is_fetched_again(open_store):
    store = open_store()
    path = store.publish_adapter("f2l-1", write("weights"), {})
    (path / WEIGHTS).write_text("we1ghts")
    assert (store.load_path("f2l-1") / WEIGHTS).read_text() == "weights"
    shutil.rmtree(path)
    assert (store.load_path("f2l-1") / WEIGHTS).read_text() == "weights"


def test_a_manifest_cannot_name_files_elsewhere(open_store, far, tmp_path):
    open_store().publish_adapter("f2l-1", write("weights"), {})
    manifest = far / "adapters" / "f2l-1" / MANIFEST_FILE
    manifest.write_text(json.dumps({"name": "f2l-1", "files": {"../../evil": {"bytes": 1, "sha256": ""}}}))
    with pytest.raises(StoreError, match="none of an adapter's"):
        open_store("there").load_path("f2l-1")


def test_removal_is_complete_on_both_sides(open_store, far):
    store = open_store()
    sha256 = keep(store, b"video")
    store.publish_adapter("f2l-1", write("weights"), {})
    for _ in range(2):
        store.remove_adapter("f2l-1")
        store.remove_video(sha256)
    assert everything(far) == []
    assert everything(store.home) == []


def test_the_cache_holds_what_was_used_last_and_what_is_in_use(open_store):
    store = open_store(cache_bytes=2500)
    videos = [keep(store, bytes([i]) * 1000) for i in range(4)]
    for index, sha256 in enumerate(videos):
        os.utime(store.video_path(sha256), (index, index))
    store.fetch_video(videos[0])
    assert store.trim(set()) == 2000  # the first was used just now
    assert [store.video_path(sha256).exists() for sha256 in videos] == [True, False, False, True]
    for sha256 in videos:
        store.fetch_video(sha256)
    assert store.trim(set()) == 0  # all of them just now: over the limit, but nobody's file goes
    assert store.trim({videos[0], videos[1], videos[2]}, young_s=-1) == 1000
    assert not store.video_path(videos[3]).exists()
    store.publish_adapter("f2l-1", write("weights" * 1000), {})
    store.protect(lambda name: name == "f2l-1")
    store.trim(set(), young_s=-1)
    assert store.adapter_path("f2l-1").is_dir()
    assert not any(store.video_path(sha256).exists() for sha256 in videos)
    store.protect(lambda _name: False)
    store.trim(set(), young_s=-1)
    assert everything(store.home) == []
    assert store.fetch_video(videos[1]).read_bytes() == bytes([1]) * 1000


def test_a_store_that_is_full_or_away_says_so_and_keeps_nothing(open_store, far, monkeypatch):
    store = open_store()
    sha256 = keep(store, b"old")
    store.video_path(sha256).unlink()

    def fail(error):
        def put(*_args, **_kwargs):
            raise error

        return put

    files = type(store._remote._files)
    for error, full in ((OSError(errno.ENOSPC, "full"), True), (ConnectionError("no route"), False)):
        monkeypatch.setattr(files, "put_file", fail(error))
        monkeypatch.setattr(files, "get_file", fail(error))
        with pytest.raises(StoreUnavailable) as caught:
            keep(store, b"video")
        assert caught.value.full is full
        with pytest.raises(StoreUnavailable):
            store.publish_adapter("f2l-1", write("weights"), {})
        with pytest.raises(StoreUnavailable):
            store.fetch_video(sha256)
        assert everything(store.home / "videos") == everything(store.home / "adapters") == []
    monkeypatch.undo()
    assert store.fetch_video(sha256).read_bytes() == b"old"


@pytest.fixture
def silent_s3(monkeypatch):
    """The URL of a store that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
        set_environment(monkeypatch, environment(endpoint))
        yield "s3://f2l/videos"
    S3FileSystem.clear_instance_cache()


def test_writing_to_a_store_that_never_answers_is_given_up(tmp_path, silent_s3, monkeypatch):
    monkeypatch.setattr(object_store, "_PUT_SECONDS", 0.5)
    store = cached_store.open_store(tmp_path, url=silent_s3)
    adapter = store.temporary()
    write("weights")(adapter)
    with pytest.raises(StoreUnavailable, match="did not let this server keep a video: it did not answer in time"):
        keep(store, b"video")
    with pytest.raises(StoreUnavailable, match="did not let this server keep an adapter: it did not answer in time"):
        store._remote.put_adapter(adapter, "f2l-1")
    assert everything(store.home / "videos") == []


def test_an_unknown_kind_of_store_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="F2L_STORE=nowhere://x"):
        cached_store.open_store(tmp_path, url="nowhere://x")
