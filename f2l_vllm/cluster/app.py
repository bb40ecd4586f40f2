"""The application for Ray Serve: `import_path: f2l_vllm.cluster.app:build` in a Serve config (launch/cluster.yaml)."""

# Annotations are not postponed here: Serve reads that of `build` to make `args` of a config an `Args`.

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application, Deployment

from f2l_vllm.cluster.engine import DEFAULT_COMMAND, LEAVE_SECONDS, Engine
from f2l_vllm.cluster.front import Front
from f2l_vllm.cluster.names import ENGINE, FRONT
from f2l_vllm.engine.defaults import HOST_ADAPTERS, SEQUENCES
from f2l_vllm.settings import Settings

_ROUTER: Any = "f2l_vllm.cluster.router:AffinityRouter"
_HEALTH_SECONDS = 2.5  # longer than an engine takes to find that its server hangs; three such checks are less than 10 s
_FRONT_REQUESTS = 4096  # at a time; engines queue questions, and refuse what is too much


class Args(BaseModel):
    """`args` of the application in a Serve config. Replicas, resources and autoscaling are Serve's own options of the
    deployments `Front` and `Engine`; settings are `F2L_*` in the environment of Ray's nodes, or in `runtime_env`."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("f2l-tiny", description="What `f2l-vllm serve` takes.")
    flags: list[str] = Field([], description="More flags for it: one word each, as in ['--max-loras', '8'].")
    command: str = Field(DEFAULT_COMMAND, description="What starts a server: `numactl -N 0 f2l-vllm serve`.")
    places: int = Field(HOST_ADAPTERS, ge=1, description="Adapters in an engine's memory: its --max-cpu-loras.")
    concurrency: int = Field(SEQUENCES, ge=1, description="Questions it answers at a time: its --max-num-seqs.")


def build(args: Args) -> Application:
    """Fronts before engines. Serve calls this with `args` of its config."""
    grace = Settings.read().shutdown_seconds + LEAVE_SECONDS
    engines: Deployment = serve.deployment(
        name=ENGINE,
        health_check_period_s=1,
        health_check_timeout_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=grace,
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER,
            request_router_kwargs={"places": args.places, "concurrency": args.concurrency},
        ),
    )(Engine)
    fronts: Deployment = serve.deployment(
        name=FRONT,
        max_ongoing_requests=_FRONT_REQUESTS,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=grace,
    )(serve.ingress()(Front))
    return fronts.bind(engines.bind(args.model, args.flags, args.command))
