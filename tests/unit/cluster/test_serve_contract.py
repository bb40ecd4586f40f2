"""Contracts with Ray 2.60: what `cluster/` leans on. Another version fails here first. Nothing is started."""

import inspect
from types import SimpleNamespace
from typing import get_type_hints
from unittest.mock import create_autospec

import pytest
import ray
import yaml
from ray import serve
from ray._common.utils import import_attr
from ray.serve import request_router, scripts
from ray.serve._private import constants, deployment_scheduler, replica, router
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built
from ray.serve._private.request_router.replica_wrapper import ReplicaSelection
from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.schema import (
    ApplicationStatus,
    DeploymentStatus,
    DeploymentStatusTrigger,
    ReplicaState,
    ServeDeploySchema,
    ServeInstanceDetails,
    ServeStatus,
)

from f2l_vllm.cluster import engine, local, names, state, workers
from f2l_vllm.cluster.app import Args, build
from f2l_vllm.cluster.engine_scaling import LoadPolicy
from f2l_vllm.cluster.router import AffinityRouter
from tests.support import ROOT

CHANGED = "Ray 2.60 {}; this version does not"


def test_this_is_the_supported_version():
    assert ray.__version__.startswith("2.60.")


def test_a_router_hears_of_replicas_and_chooses_among_them():
    base = request_router.RequestRouter
    for name in ("initialize_state", "update_replicas", "on_replica_actor_died", "choose_replicas"):
        given, ours = inspect.signature(getattr(base, name)), inspect.signature(getattr(AffinityRouter, name))
        assert list(given.parameters) == list(ours.parameters), CHANGED.format(f"calls {name} like this")
    assert isinstance(base.curr_replicas, property)
    assert "replica_metadata" in inspect.getsource(request_router.RunningReplica)
    assert {"kwargs", "routing_context"} <= set(request_router.PendingRequest.__dataclass_fields__)
    assert "should_backoff" in inspect.getsource(inspect.getmodule(request_router.PendingRequest))
    assert "request_router_kwargs" in inspect.getsource(router), CHANGED.format("gives a router its arguments")


def test_a_replica_may_be_chosen_without_a_place_in_it():
    assert 'request_kwargs.pop("_reserve", True)' in inspect.getsource(router.AsyncioRouter.choose_replica)
    assert "replica_metadata" in ReplicaSelection.__dataclass_fields__


def test_a_replica_says_where_it_is_and_how_much_it_has_to_do():
    assert constants.RECORD_REPLICA_METADATA_METHOD == "record_replica_metadata"
    assert "record_autoscaling_stats" in inspect.getsource(replica)
    for name in ("record_replica_metadata", "record_autoscaling_stats", "check_health"):
        assert hasattr(engine.Engine, name)
    assert "aggregated_metrics" in inspect.signature(AutoscalingContext.__init__).parameters


def test_a_replica_is_replaced_after_as_many_failed_checks_as_kill_its_server():
    assert constants.REPLICA_HEALTH_CHECK_UNHEALTHY_THRESHOLD == engine._STRIKES


def test_an_engine_that_is_out_of_reach_is_given_up_within_10_s():
    application = build(Args())
    (engines,) = application._bound_deployment.init_args
    deployment = engines._bound_deployment._deployment_config
    assert deployment.health_check_timeout_s > engine._HEALTH_SECONDS
    checks = constants.REPLICA_HEALTH_CHECK_UNHEALTHY_THRESHOLD * deployment.health_check_timeout_s
    assert checks + 1.1 * deployment.health_check_period_s < 10  # Serve varies the period by a tenth


def test_an_ingress_builds_its_app_in_the_replica():
    assert "__serve_build_asgi_app__" in inspect.getsource(ray.serve.ingress)


def test_arguments_of_a_config_are_checked():
    assert isinstance(built(build, {"model": "f2l-tiny", "flags": ["--max-loras", "8"]}), Application)
    with pytest.raises(ValueError, match="modell"):
        built(build, {"modell": "f2l-tiny"})


def test_a_front_may_share_its_replicas_loop():
    assert constants.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD is True
    assert 'get_env_bool(\n    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"' in inspect.getsource(constants)


@pytest.mark.parametrize("source", ["launch/cluster.yaml", "local"])
def test_serve_takes_the_configs(source):
    made = local.config("f2l-tiny", [], engines=2, fronts=2, workers=1, host="127.0.0.1", port=8000)
    given = made if source == "local" else yaml.safe_load((ROOT / source).read_text())
    config = ServeDeploySchema.model_validate(given)
    assert [one.name for one in config.applications] == [names.APP, names.WORKERS_APP]
    served = config.applications[0]
    assert {one.name for one in served.deployments} == {names.FRONT, names.ENGINE}
    for application in config.applications:
        assert isinstance(built(import_attr(application.import_path), application.args), Application)
    for one in served.deployments:
        if isinstance(one.autoscaling_config, dict):
            policy = AutoscalingConfig(**one.autoscaling_config).policy
            assert policy.policy_function == f"{LoadPolicy.__module__}:{LoadPolicy.__name__}"
            LoadPolicy(**policy.policy_kwargs)


def test_the_command_hands_its_config_over_as_operators_do():
    options = {name for param in scripts.run.params for name in (*param.opts, *param.secondary_opts)}
    assert {"--address", "--non-blocking"} <= options


def test_variables_of_serves_haproxy_are_those_that_it_reads(tmp_path):
    known = inspect.getsource(constants)
    files = local.haproxy_files("/tmp/f2l-ray-01234567")
    assert max(len(path) + len(f"/{'0' * 56}") for path in files.values()) <= 97  # of a socket, for HAProxy
    ours = [name for name in {**files, **local.environment(tmp_path, "0.0.0.0")} if name.startswith("RAY_SERVE_")]
    assert len(ours) > 5
    assert [name for name in ours if f'"{name}"' not in known] == []
    assert "RAY_SERVE_HTTP_KEEP_ALIVE_TIMEOUT_S" in known


@pytest.mark.parametrize(("loads", "wanted"), [([], 3), ([0, 0], 1), ([24], 1), ([25], 2), ([30, 30, 30], 4)])
def test_engines_are_as_many_as_keep_each_at_its_target(loads, wanted):
    context = SimpleNamespace(aggregated_metrics={"load": dict(enumerate(loads))}, target_num_replicas=3)
    assert LoadPolicy(target=24)(context)[0] == wanted


@pytest.fixture
def shown(monkeypatch):
    """`shown(status, replicas' states)`: what `serve.status()` says of our service, made by Ray's own code."""

    spec = serve.status

    def show(status, *states):
        front = SimpleNamespace(
            status=DeploymentStatus.UPDATING,
            status_trigger=DeploymentStatusTrigger.CONFIG_UPDATE_STARTED,
            message="",
            replicas=[SimpleNamespace(state=one) for one in states],
        )
        app = SimpleNamespace(status=status, message="why", last_deployed_time_s=0.0, deployments={names.FRONT: front})
        details = SimpleNamespace(target_capacity=None, proxies={}, applications={names.APP: app})
        told = ServeInstanceDetails._get_status(details)
        monkeypatch.setattr(serve, "status", create_autospec(spec, return_value=told))

    assert get_type_hints(serve.status)["return"] is ServeStatus, CHANGED.format("says this of applications")
    return show


def test_the_states_of_applications_and_replicas_are_read_as_serve_says_them(shown, monkeypatch):
    monkeypatch.setattr(ray, "nodes", list)
    shown(ApplicationStatus.DEPLOYING, ReplicaState.STARTING, ReplicaState.STARTING, ReplicaState.STOPPING)
    assert state.state().replicas == {names.FRONT: {"STARTING": 2, "STOPPING": 1}}
    with pytest.raises(local.ClusterFailed, match=r"not ready after 0 s: f2l: why"):
        state.wait_running(0)
    shown(ApplicationStatus.DEPLOY_FAILED)
    with pytest.raises(local.ClusterFailed, match=r"not deployed: f2l: why"):
        state.wait_running(60)
    shown(ApplicationStatus.RUNNING, ReplicaState.RUNNING)
    state.wait_running(0)
    monkeypatch.setattr(state, "engines", dict)
    assert state.state().replicas[names.FRONT]["RUNNING"] == 1


def test_an_application_is_deleted_by_name_and_waited_for(shown, monkeypatch):
    assert inspect.signature(serve.delete).parameters["_blocking"].default is True, CHANGED.format("waits")
    shown(ApplicationStatus.RUNNING)
    monkeypatch.setattr(serve, "delete", delete := create_autospec(serve.delete))
    state.end()
    delete.assert_called_once_with(names.APP)  # the workers' does not run


def test_a_front_is_asked_through_the_handle_of_its_deployment(monkeypatch):
    assert "timeout_s" in inspect.signature(DeploymentResponse.result).parameters
    handle = create_autospec(serve.get_deployment_handle)
    answer = create_autospec(DeploymentResponse, instance=True)
    answer.result.return_value = {"a/0": {"url": "http://a", "name": "a/0"}}
    handle.return_value.engines.remote.return_value = answer
    monkeypatch.setattr(serve, "get_deployment_handle", handle)
    assert state.engines() == {"a/0": "http://a"}
    given = inspect.signature(handle).bind(*handle.call_args.args).arguments
    assert (given["deployment_name"], given["app_name"]) == (names.FRONT, names.APP)
    assert hasattr(DeploymentHandle, "__getattr__"), CHANGED.format("finds a deployment's methods by name")


def test_a_replica_that_is_stopped_is_waited_for():
    source = inspect.getsource(replica.UserCallableWrapper.call_destructor)
    assert "await self._call_func_or_gen(\n                    self._callable.__del__," in source, CHANGED.format(
        "waits for `async def __del__`"
    )
    for one in (engine.Engine, workers.Hypernetwork):
        assert inspect.iscoroutinefunction(one.__del__)


def test_a_worker_is_placed_on_the_node_of_its_replica(monkeypatch):
    monkeypatch.setenv("F2L_WORKER_CPUS", "1")
    config = workers.build(workers.Args())._bound_deployment._replica_config
    assert config.placement_group_strategy == "STRICT_PACK"
    assert "strategy=placement_group_strategy" in inspect.getsource(deployment_scheduler), CHANGED.format("does this")


def test_workers_without_work_go_after_the_same_patience_the_last_one_too(monkeypatch):
    monkeypatch.setenv("F2L_WORKER_CPUS", "1")
    config = workers.build(workers.Args())._bound_deployment._deployment_config.autoscaling_config
    patience = workers._PATIENCE_SECONDS
    for before, after in ((3, 1), (1, 0)):
        kept, decided = {}, []
        for now in (0.0, patience - 1, patience):
            count, kept = _apply_delay_logic(after, before, config, kept, _now=now)
            decided.append(count)
        assert decided == [before, before, after]
