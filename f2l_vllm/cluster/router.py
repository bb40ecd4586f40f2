"""Which engine a front asks: Ray Serve's router, with the policy of `policy.py`.

Serve pickles a router by value and sends it to the processes that use it. So its methods import what belongs to the
process that they run in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

if TYPE_CHECKING:
    from f2l_vllm.cluster.membership import Affinity, Membership


class AffinityRouter(RequestRouter):
    """Chooses as `Affinity` does, and tells this process's `ENGINES` which engines there are."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Begin without engines. The arguments, `request_router_kwargs`, are `Affinity`'s."""
        from f2l_vllm.cluster.membership import ENGINES, Affinity

        self._engines: Membership = ENGINES
        self._affinity: Affinity = Affinity(ENGINES, **kwargs)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve says which engines are ready."""
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve has found an engine's process gone."""
        super().on_replica_actor_died(replica_id)
        self._tell()

    def _tell(self) -> None:
        self._engines.update({name: str(one.replica_metadata["url"]) for name, one in self._by_name().items()})

    def _by_name(self) -> dict[str, RunningReplica]:
        return {str(one.replica_metadata["name"]): one for one in self.curr_replicas.values()}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The engine for a question: `key` names its videos, `tried` the engines that were asked."""
        asked: dict[str, Any] = {} if pending_request is None else pending_request.kwargs
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where nobody is, it waits and does not spin
        name = self._affinity.choose(asked.get("key", ""), asked.get("tried", ()))
        chosen = self._by_name().get(name or "")
        return [] if chosen is None else [[chosen]]
