"""The archive of an adapter holds what was published; only its config names the base as others can load it."""

import io
import json
import tarfile
from types import SimpleNamespace

from f2l_vllm.catalog.tables import AdapterRecord
from f2l_vllm.hypernetwork.adapter import peft_config
from f2l_vllm.server.videos.routes import _tar
from f2l_vllm.store.manifest import MANIFEST_FILE


def test_the_archive_names_the_base_and_changes_nothing_else(tmp_path):
    adapter = AdapterRecord(1, "f2l-0a", 4, 1, {}, 0.0, generation="0123456789abcdef")
    directory = tmp_path / adapter.object
    directory.mkdir()
    config = peft_config(4, ["down_proj"], "f2l-tiny")
    stored = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": b"weights"}
    for name, content in {**stored, MANIFEST_FILE: b"{}"}.items():
        (directory / name).write_bytes(content)
    size, pieces = _tar(SimpleNamespace(load_path=lambda name: tmp_path / name), adapter, "owner/model")
    content = b"".join(pieces)
    assert len(content) == size
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
    assert set(found) == {f"f2l-0a/{name}" for name in stored}
    assert json.loads(found["f2l-0a/adapter_config.json"]) == config | {"base_model_name_or_path": "owner/model"}
    assert found["f2l-0a/adapter_model.safetensors"] == b"weights"
    assert {name: (directory / name).read_bytes() for name in stored} == stored
