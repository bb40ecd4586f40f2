"""What is kept of an adapter is the same JSON in every version."""

import json

import pytest
from sqlalchemy import text

from f2l_vllm.catalog.catalog import Catalog
from f2l_vllm.store.adapter_info import AdapterInfo, Part
from tests.support.catalog_steps import add, claim

READ = AdapterInfo(
    frames=2,
    timestamps=(0.0, 1.5),
    duration_s=3.0,
    width=64,
    height=48,
    visual_tokens=8,
    merge_rate=0.0,
    prompt_tokens=20,
    seconds={"decode": 0.5, "vision": 0.25},
    chunks=2,
    rank=48,
    spans=((0.0, 1.5), (1.5, 3.0)),
    internalize_seconds=1.5,
    probe_effect=0.5,
    norm=3.0,
)
COMPOSED = AdapterInfo(visual_tokens=8, parts=(Part("f2l-1", (0, 1), ((0.0, 3.0),)),))
KEPT = {
    '{"frames": 2, "timestamps": [0.0, 1.5], "duration_s": 3.0, "width": 64, "height": 48, "visual_tokens": 8, '
    '"merge_rate": 0.0, "prompt_tokens": 20, "seconds": {"decode": 0.5, "vision": 0.25}, "chunks": 2, "rank": 48, '
    '"spans": [[0.0, 1.5], [1.5, 3.0]], "internalize_seconds": 1.5, "probe_effect": 0.5, "norm": 3.0}': READ,
    '{"visual_tokens": 8, "parts": [{"adapter": "f2l-1", "chunks": [0, 1], "covered": [[0.0, 3.0]]}]}': COMPOSED,
    "{}": AdapterInfo(),
}


@pytest.mark.parametrize("kept", KEPT)
def test_the_catalog_keeps_what_is_known_as_json(tmp_path, kept):
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    add(catalog)
    claim(catalog)
    adapter = catalog.finish_job("f2l-1", rank=48, size=9, info=KEPT[kept])
    assert adapter.info == KEPT[kept]
    with catalog._read() as connection:
        assert connection.scalar(text("SELECT info FROM adapters")) == kept
    catalog.close()


def test_entries_of_other_versions_are_left_out():
    assert AdapterInfo.of_json({"frames": 2, "weather": "fine"}) == AdapterInfo(frames=2)
    assert AdapterInfo.of_json(json.loads(json.dumps(READ.to_json()))) == READ
