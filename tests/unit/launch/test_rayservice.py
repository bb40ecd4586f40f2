"""The RayService of `launch/kubernetes` is the Serve config of `launch/`, in pods that Kubernetes takes."""

import importlib.metadata
import re

import kubernetes_validate
import pytest
import yaml
from ray._raylet import Config as RayConfig

from f2l_vllm.cluster.local import environment
from f2l_vllm.settings import Settings, refuse_unknown
from tests.unit.launch.test_kubernetes import LAUNCH, SPARE_SECONDS, VERSIONS, documents

SERVICE, POLICY = documents("rayservice")
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
GROUPS = {"head": CLUSTER["headGroupSpec"]} | {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
CONFIG = yaml.safe_load((LAUNCH / "cluster.yaml").read_text())
ENGINE = next(one for one in CONFIG["applications"][0]["deployments"] if one["name"] == "Engine")


@pytest.fixture(params=GROUPS)
def pod(request):
    return GROUPS[request.param]["template"]["spec"]


def test_it_runs_the_serve_config_of_this_folder():
    assert yaml.safe_load(SERVICE["spec"]["serveConfigV2"]) == CONFIG


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_its_pods_and_its_policy(pod, version):
    wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": {"spec": pod}}
    assert kubernetes_validate.validate(wrapped, version, strict=True) == version
    assert kubernetes_validate.validate(POLICY, version, strict=True) == version


def test_its_ray_is_the_one_that_is_tested():
    assert CLUSTER["rayVersion"] == importlib.metadata.version("ray")


def test_every_setting_exists_and_every_value_is_taken(pod):
    [container] = pod["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    refuse_unknown(given)
    settings = {name: value for name, value in given.items() if name.startswith("F2L_")}
    assert Settings.read(settings).tenants == "catalog"
    assert pod["enableServiceLinks"] is False


def test_its_haproxy_is_set_as_one_machines(pod, tmp_path):
    given = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    usual = {name: value for name, value in environment(tmp_path, "0.0.0.0").items() if re.search("HA_?PROXY", name)}
    assert len(usual) == 3
    assert {name: given[name].split() for name in usual} == {name: value.split() for name, value in usual.items()}


def test_rays_head_gives_up_a_node_that_has_vanished_within_10_s():
    [head] = GROUPS["head"]["template"]["spec"]["containers"]
    given = {entry["name"]: entry.get("value") for entry in head["env"]}
    period, timeout, failures = (
        int(given[f"RAY_health_check_{name}"]) for name in ("period_ms", "timeout_ms", "failure_threshold")
    )
    assert (period + timeout) * failures < 10_000
    names = [name.removeprefix("RAY_") for name in given if name.startswith("RAY_health")]
    assert all(hasattr(RayConfig, name) for name in names), "Ray 2.60 has these settings; this version does not"
    assert all(f"{name}={given[name]}" in (LAUNCH / "cluster.yaml").read_text() for name in given if "health" in name)


def test_pods_are_as_the_restricted_standard_of_kubernetes_wants_them(pod):
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for one in (pod["containers"][0], CLUSTER["autoscalerOptions"]):
        assert one["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_a_pod_of_the_engines_holds_one_engine_and_there_may_be_as_many_as_serve_wants():
    group, options, scaling = GROUPS["engines"], ENGINE["ray_actor_options"], ENGINE["autoscaling_config"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["cpu"]) >= options["num_cpus"]
    assert limits["nvidia.com/gpu"] == options["num_gpus"] == 1
    assert (group["minReplicas"], group["maxReplicas"]) == (scaling["min_replicas"], scaling["max_replicas"])
    assert GROUPS["workers"]["maxReplicas"] == CONFIG["applications"][1]["args"]["most"]


@pytest.mark.parametrize(("group", "setting"), [("engines", "shutdown_seconds"), ("workers", "job_seconds")])
def test_what_is_in_work_ends_before_a_pod_is_killed(group, setting):
    grace = GROUPS[group]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= Settings.model_fields[setting].default + SPARE_SECONDS


def test_probes_and_the_policy_name_the_port_of_serve():
    port = CONFIG["http_options"]["port"]
    for name in ("engines", "fronts", "workers"):
        [container] = GROUPS[name]["template"]["spec"]["containers"]
        assert container["ports"] == [{"name": container["readinessProbe"]["httpGet"]["port"], "containerPort": port}]
    assert POLICY["spec"]["ingress"][-1] == {"ports": [{"port": port}]}
