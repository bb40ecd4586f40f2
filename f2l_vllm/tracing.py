"""Spans of OpenTelemetry: an upload, what becomes of it, and every question, in one trace with vLLM's own.

Off unless `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` names a collector; nothing is imported then. Context travels as W3C's
`traceparent`: in headers between client, this server and vLLM, in the catalog's jobs between servers and workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.trace import Span

ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"  # grpc or http/protobuf, as vLLM reads it
SERVICE = "OTEL_SERVICE_NAME"
HEADER = "traceparent"
_NAME = "f2l_vllm"


def is_on() -> bool:
    """Whether spans are made in this process."""
    return bool(os.environ.get(ENDPOINT))


def environment(given: Mapping[str, str], endpoint: str) -> dict[str, str]:
    """Variables that make a server and all that it starts send their spans to this collector."""
    return {ENDPOINT: endpoint, SERVICE: given.get(SERVICE) or "f2l-vllm"}


def start(part: str) -> None:
    """Export the spans of this process. vLLM does it in its own."""
    if not is_on():
        return
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

    exporter: SpanExporter
    if os.environ.get(PROTOCOL, "grpc") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        exporter = OverGrpc(insecure=True)
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

        exporter = OverHttp(endpoint=os.environ[ENDPOINT])
    provider = TracerProvider(resource=Resource.create({"f2l.part": part}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def begin(name: str, parent: str | None, **attributes: Any) -> Span:
    """A span that its caller ends; only while `is_on`.

    Args:
        parent: a `traceparent`; None: the span that is current here, if there is one.
        attributes: `job` is `f2l.job`.
    """
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = None if parent is None else TraceContextTextMapPropagator().extract({HEADER: parent})
    named = {f"f2l.{key}": value for key, value in attributes.items() if value is not None}
    return trace.get_tracer(_NAME).start_span(name, context, attributes=named)


@contextmanager
def span(name: str, parent: str | None = None, **attributes: Any) -> Iterator[Span | None]:
    """A span around a block, in which it is the current one; None while tracing is off. An exception is noted."""
    if not is_on():
        yield None
        return
    from opentelemetry import trace

    with trace.use_span(begin(name, parent, **attributes), end_on_exit=True) as current:
        yield current


def traceparent() -> str | None:
    """The current span's, to be its parent elsewhere; None while tracing is off, or without one."""
    if not is_on():
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(HEADER)
