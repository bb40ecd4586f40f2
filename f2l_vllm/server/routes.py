"""All routes of this server's own: each module enters its routes when it is imported."""

from __future__ import annotations

from f2l_vllm.server.batches import routes as batch_routes
from f2l_vllm.server.streams import watch_routes
from f2l_vllm.server.videos.routes import router

__all__ = ["batch_routes", "router", "watch_routes"]
