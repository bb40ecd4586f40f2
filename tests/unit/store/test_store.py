import hashlib

import pytest

from f2l_vllm.store import room
from f2l_vllm.store.errors import StoreUnavailable
from f2l_vllm.store.store import Store, StoreError


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def write(text):
    def fill(directory):
        directory.mkdir()
        (directory / "adapter_model.safetensors").write_text(text)

    return fill


def test_an_adapter_is_whole_and_verified(store):
    path = store.publish_adapter("f2l-1", write("weights"), {"info": 1})
    assert (path / "adapter_model.safetensors").read_text() == "weights"
    manifest = store.verify_adapter("f2l-1")
    assert manifest["info"] == 1
    assert manifest["files"]["adapter_model.safetensors"]["sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_a_writer_that_fails_leaves_nothing(store, tmp_path):
    def fail(directory):
        write("half")(directory)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        store.publish_adapter("f2l-1", fail, {})
    assert list((tmp_path / "tmp").glob("*/*")) == []
    with pytest.raises(StoreError, match="missing or damaged"):
        store.verify_adapter("f2l-1")


def test_a_sound_adapter_is_never_replaced_and_a_damaged_one_is(store):
    path = store.publish_adapter("f2l-1", write("first"), {})
    store.publish_adapter("f2l-1", write("second"), {})
    assert (path / "adapter_model.safetensors").read_text() == "first"
    (path / "adapter_model.safetensors").write_text("fir5t")
    with pytest.raises(StoreError, match="differs from what was written"):
        store.verify_adapter("f2l-1")
    store.publish_adapter("f2l-1", write("second"), {})
    assert (path / "adapter_model.safetensors").read_text() == "second"


def test_another_adapter_in_its_place_is_refused(store, tmp_path):
    store.publish_adapter("f2l-1", write("weights"), {}).rename(tmp_path / "adapters" / "f2l-2")
    with pytest.raises(StoreError, match="f2l-1 lies in its place"):
        store.verify_adapter("f2l-2")


def test_removal_is_complete_and_repeatable(store, tmp_path):
    store.publish_adapter("f2l-1", write("weights"), {})
    store.remove_adapter("f2l-1")
    store.remove_adapter("f2l-1")
    assert list((tmp_path / "adapters").iterdir()) == []
    assert list((tmp_path / "tmp").glob("*/*")) == []


def test_videos_lie_under_their_hash_once(store):
    sha256 = hashlib.sha256(b"video").hexdigest()
    for _ in range(2):
        temporary = store.temporary()
        temporary.write_bytes(b"video")
        path = store.keep_video(temporary, sha256)
    assert path.read_bytes() == b"video"
    store.remove_video(sha256)
    store.remove_video(sha256)
    assert not path.exists()


def test_sweep_removes_what_nobody_refers_to(store, tmp_path):
    kept, lost = (hashlib.sha256(text).hexdigest() for text in (b"kept", b"lost"))
    for sha256 in (kept, lost):
        temporary = store.temporary()
        temporary.write_bytes(b"video")
        store.keep_video(temporary, sha256)
    for name in ("f2l-kept", "f2l-lost"):
        store.publish_adapter(name, write("weights"), {})
    store.sweep({kept, "f2l-kept"}.intersection)  # too young to be called lost
    assert len(list((tmp_path / "adapters").iterdir())) == 2
    store.sweep({kept, "f2l-kept"}.intersection, older_than_s=-1)
    assert [p.name for p in (tmp_path / "adapters").iterdir()] == ["f2l-kept"]
    assert [p.name for p in (tmp_path / "videos").glob("*/*")] == [kept]


@pytest.mark.parametrize("name", ["../escape", "", "A", "f2l/1", ".", "x" * 200])
def test_names_cannot_leave_the_folder(store, name):
    with pytest.raises(ValueError, match="not an adapter name"):
        store.adapter_path(name)
    with pytest.raises(ValueError, match="not a sha-256"):
        store.video_path(name)


@pytest.mark.parametrize("total", [12 << 20, 64 << 20, 1 << 40])
def test_adapters_do_not_take_the_room_that_a_catalog_gives_up_for_deletions(total, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_total", lambda _folder: total)
    store, given_up = Store(tmp_path), room.Headroom(tmp_path / "catalog.sqlite3")._size
    monkeypatch.setattr(room, "_free", lambda _folder: given_up)
    with pytest.raises(StoreUnavailable, match="no room"):
        store.check_room_for_adapters()
