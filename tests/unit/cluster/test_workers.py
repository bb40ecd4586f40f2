"""What the deployment of workers asks of Ray Serve 2.60, without a cluster: a change there fails here."""

import inspect

import pytest
import ray
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from f2l_vllm.cluster.scaling import QueuePolicy
from f2l_vllm.cluster.workers import Args, Hypernetwork, build


@pytest.fixture
def deployment(monkeypatch):
    monkeypatch.setenv("F2L_WORKER_GPUS", "0.5")
    monkeypatch.setenv("F2L_JOB_SECONDS", "70")
    return build(Args(most=7, videos_per_worker=3))._bound_deployment


def test_rays_version_is_the_one_that_this_was_written_for():
    assert ray.__version__.startswith("2.60.")


def test_serve_makes_one_policy_of_the_class_and_its_arguments_after_pickling_it(deployment):
    sent = AutoscalingConfig(**deployment._deployment_config.autoscaling_config.model_dump())
    policy = _resolve_policy_callable(sent.policy)
    assert type(policy).__name__ == QueuePolicy.__name__
    assert policy._per_worker == 3
    nothing = dict.fromkeys(list(inspect.signature(AutoscalingContext).parameters))
    assert policy(AutoscalingContext(**{**nothing, "target_num_replicas": 5})) == (5, {})  # not counted yet


def test_a_replica_has_room_for_its_worker_beside_it_and_time_for_its_video(deployment):
    options = deployment._replica_config
    assert options.placement_group_bundles == [{"CPU": 1.0, "GPU": 0.5}]
    assert options.ray_actor_options["num_cpus"] == 0
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 80
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.initial_replicas) == (0, 7, 0)
    assert inspect.iscoroutinefunction(Hypernetwork.__del__)  # Serve waits for it


def test_workers_that_ray_could_place_anywhere_are_refused(monkeypatch):
    monkeypatch.setenv("F2L_WORKER_CPUS", "0")
    with pytest.raises(ValueError, match="set F2L_WORKER_CPUS or F2L_WORKER_GPUS above 0"):
        build(Args())


def test_workers_without_a_shared_catalog_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("F2L_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="set F2L_DATABASE_URL and F2L_STORE for all"):
        Hypernetwork("f2l-tiny", None)


def test_a_replica_refuses_a_rank_in_which_adapters_have_no_room(monkeypatch, tmp_path):
    monkeypatch.setenv("F2L_HOME", str(tmp_path))
    monkeypatch.setenv("F2L_DATABASE_URL", f"sqlite:///{tmp_path / 'catalog.sqlite3'}")
    monkeypatch.setenv("F2L_STORE", f"file://{tmp_path / 'store'}")
    with pytest.raises(ValueError, match="rank"):
        Hypernetwork("f2l-tiny", 8)
