"""Steps that tests of the catalog share."""

from f2l_vllm.catalog.states import VideoState
from f2l_vllm.store.adapter_info import AdapterInfo

STAGES = (VideoState.DECODING, VideoState.ENCODING, VideoState.PUBLISHING)


def add(catalog, adapter="f2l-1", sha="a", tenant="t", expires_at=None, limit=10, filename="v.mp4", **options):
    """Enter a file."""
    return catalog.add_file(
        tenant=tenant,
        filename=filename,
        purpose="vision",
        size=3,
        sha256=sha * 64,
        adapter_name=adapter,
        expires_at=expires_at,
        queue_limit=limit,
        **options,
    )


def claim(catalog):
    """The oldest waiting job, or None."""
    return next(iter(catalog.claim_jobs(1)), None)


def publish(catalog, adapter="f2l-1"):
    """Do the oldest waiting job."""
    assert claim(catalog).adapter_name == adapter
    for stage in STAGES:
        catalog.advance(adapter, stage, 0.5)
    return catalog.finish_job(adapter, rank=16, size=100, info=AdapterInfo(frames=8))
