"""Prometheus metrics `f2l_*`, on vLLM's own `/metrics` page. Labels are bounded: no file, adapter or tenant names."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

READY = Gauge("f2l_ready", "Whether this part of the server is ready.", ["part"], multiprocess_mode="mostrecent")
VIDEOS = Gauge("f2l_videos", "Files in the catalog by state.", ["state"], multiprocess_mode="mostrecent")
JOBS = Gauge("f2l_jobs", "Internalization jobs, waiting or running.", ["state"], multiprocess_mode="mostrecent")
QUEUE_LIMIT = Gauge("f2l_queue_limit", "Videos that may wait for a worker.", multiprocess_mode="mostrecent")
WORKERS = Gauge("f2l_workers", "Hypernetwork workers loaded and alive.", multiprocess_mode="mostrecent")
RESIDENT = Gauge("f2l_adapters_resident", "Adapters registered with the engine.", multiprocess_mode="livesum")
LOADED = Counter("f2l_adapters_loaded", "Loads of adapters into the engine's memory, for questions.")
LEASES = Gauge("f2l_adapter_leases", "Questions that hold an adapter now.", multiprocess_mode="livesum")
UPLOADS = Counter("f2l_uploads", "Videos accepted, by whether their adapter existed already.", ["reused"])
UPLOAD_BYTES = Counter("f2l_upload_bytes", "Bytes of video accepted.")
STORED_BYTES = Gauge("f2l_stored_bytes", "Bytes of the files in the catalog.", multiprocess_mode="mostrecent")
FREE_BYTES = Gauge("f2l_disk_free_bytes", "Free on the disk of the data folder.", multiprocess_mode="mostrecent")
LEFTOVERS = Gauge("f2l_leftovers", "Deleted copies still in the store.", multiprocess_mode="mostrecent")
LEFTOVER_SECONDS = Gauge("f2l_leftover_seconds", "Age of the oldest of them.", multiprocess_mode="mostrecent")
INTERNALIZED = Counter("f2l_internalized", "Internalization jobs ended, by outcome.", ["outcome"])
STAGE_SECONDS = Histogram("f2l_stage_seconds", "Seconds per stage of an internalization.", ["stage"], buckets=_SECONDS)
QUESTIONS = Counter("f2l_questions", "Questions about videos, by mode and outcome.", ["mode", "outcome"])
WAIT_SECONDS = Histogram("f2l_question_wait_seconds", "Time questions waited for their video.", buckets=_SECONDS)
TOKENS_AVOIDED = Counter("f2l_visual_tokens_avoided", "Visual tokens that questions did not have to carry.")
ERRORS = Counter("f2l_errors", "Requests answered with an error of this server's own, by code.", ["code"])
BATCH_LINES = Counter("f2l_batch_lines", "Requests of batches that have an answer, by outcome.", ["outcome"])
STREAMS = Gauge("f2l_streams", "Streams that are live.", multiprocess_mode="mostrecent")
STREAM_FRESHNESS = Histogram(
    "f2l_stream_freshness_seconds", "From a segment's arrival to being answerable.", buckets=_SECONDS
)
STREAM_SEGMENTS = Counter("f2l_stream_segments", "Segments of streams, by what became of them.", ["outcome"])
STREAM_SOURCES = Counter("f2l_stream_sources", "What became of connections to sources that are pulled.", ["state"])
COMPOSED = Counter("f2l_composed", "Adapters composed of several videos, or of some chunks of one.")

# Shown as 0 before they happen first: Prometheus takes no growth from a series that was not there.
for _outcome in ("published", "failed"):
    INTERNALIZED.labels(_outcome)
for _become in ("read", "coarser", "repeated", "failed"):
    STREAM_SEGMENTS.labels(_become)
for _state in ("connected", "reconnecting", "failed"):
    STREAM_SOURCES.labels(_state)
for _reused in ("true", "false"):
    UPLOADS.labels(_reused)


def count_outcome(outcome: str, seconds: dict[str, float]) -> None:
    """Count the end of a job in the metrics: the outcome `published` or `failed`, and seconds by stage."""
    INTERNALIZED.labels(outcome).inc()
    for stage, value in seconds.items():
        STAGE_SECONDS.labels(stage).observe(value)
