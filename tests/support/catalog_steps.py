"""Steps that tests of the catalog share."""

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.catalog.tables import Upload
from f2l_vllm.store.adapter_info import AdapterInfo

STAGES = (VideoState.DECODING, VideoState.ENCODING, VideoState.PUBLISHING)


def add(catalog, adapter="f2l-1", sha="a", tenant="t", limit=10, filename="v.mp4", **options):
    """Enter a file. `options`: of its `Upload`, or of `Catalog.add_file`."""
    of_upload = {name: options.pop(name) for name in set(options) & set(Upload.__dataclass_fields__)}
    upload = Upload(**{"purpose": "vision", **of_upload}, tenant=tenant, sha256=sha * 64, bytes=3, filename=filename)
    return catalog.add_file(upload, adapter, queue_limit=limit, **options)


def claim(catalog):
    """The oldest waiting job, or None."""
    return next(iter(catalog.claim_jobs(1)), None)


def publish(catalog, adapter="f2l-1"):
    """Do the oldest waiting job."""
    assert claim(catalog).adapter_name == adapter
    for stage in STAGES:
        catalog.advance(adapter, stage, 0.5)
    return catalog.finish_job(adapter, rank=16, size=100, info=AdapterInfo(frames=8))
