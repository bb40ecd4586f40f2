"""A collector of OpenTelemetry's spans: OTLP over HTTP, on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from f2l_vllm import tracing


class Collector:
    """`spans` are those that arrived so far."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.environment = {
            tracing.ENDPOINT: f"http://127.0.0.1:{self._server.server_port}/v1/traces",
            tracing.PROTOCOL: "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "200",  # ms
        }
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def of_trace(self, trace: str, done: Callable[[dict[str, Span]], bool], seconds: float = 30.0) -> dict[str, Span]:
        """The spans of a trace by name, once `done` says that they are there."""
        until = time.monotonic() + seconds
        while not done(found := {span.name: span for span in self.spans if span.trace_id.hex() == trace}):
            assert time.monotonic() < until, sorted(found)
            time.sleep(0.05)
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def attributes(span: Span) -> dict[str, str | int]:
    """A span's texts and whole numbers."""
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}
