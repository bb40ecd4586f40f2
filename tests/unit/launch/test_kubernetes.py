"""The manifests of `launch/` are what Kubernetes takes, and agree with the server, its settings and its image."""

import copy
import os
import re
import subprocess
import tomllib

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from f2l_vllm.cli.main import app
from f2l_vllm.cli.serve import plan
from f2l_vllm.server.videos.routes import router
from f2l_vllm.settings import PREFIX, Settings, refuse_unknown
from tests.support import ROOT
from tests.support.balancers import find

LAUNCH = ROOT / "launch"
VERSIONS = ["1.30", "1.37"]  # the first with all that is used here, and the newest whose schemas are installed
SPARE_SECONDS = 5  # between the end of a grace and a kill


def documents(name):
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / f"{name}.yaml").read_text()))


MANIFESTS = {
    f"{one['kind']} {one['metadata']['name']}": one
    for name in ("namespace", "servers", "workers", "balancer")
    for one in documents(name)
}
TEMPLATES = {name: one["spec"]["template"] for name, one in MANIFESTS.items() if one["kind"] == "Deployment"}
SERVERS, WORKERS, BALANCER = (f"Deployment f2l-{name}" for name in ("servers", "workers", "balancer"))
OURS = [SERVERS, WORKERS]  # of our image
SHARED = dict(
    line.split("=", 1)
    for line in (LAUNCH / "kubernetes" / "settings.env").read_text().splitlines()
    if not line.startswith("#")
)


def container(name):
    [one] = TEMPLATES[name]["spec"]["containers"]
    return one


def environment(name):
    """What the container's processes see, but for secrets."""
    shared = SHARED if any("configMapRef" in source for source in container(name).get("envFrom", [])) else {}
    return shared | {entry["name"]: entry["value"] for entry in container(name)["env"] if "value" in entry}


def settings_of(name):
    return {key: value for key, value in environment(name).items() if key.startswith(PREFIX)}


def arguments(name):
    """As Kubernetes fills them in."""
    return [re.sub(r"\$\((\w+)\)", lambda found: SHARED[found[1]], word) for word in container(name)["args"]]


def port_of(name):
    [port] = container(name)["ports"]
    return port["containerPort"]


def probes(name):
    return {kind: probe for kind, probe in container(name).items() if kind.endswith("Probe")}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_kubernetes_takes_every_manifest(manifest, version):
    assert kubernetes_validate.validate(manifest, version, strict=True) == version


@pytest.mark.parametrize("fault", ["a misspelt field", "a number as text", "a missing field"])
def test_a_faulty_manifest_is_noticed(fault):
    manifest = copy.deepcopy(MANIFESTS[SERVERS])
    pod = manifest["spec"]["template"]["spec"]
    if fault == "a misspelt field":
        pod["terminationGracePeriod"] = pod.pop("terminationGracePeriodSeconds")
    elif fault == "a number as text":
        pod["containers"][0]["ports"][0]["containerPort"] = "8000"
    else:
        del manifest["spec"]["selector"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[0], strict=True)


@pytest.mark.skipif(find("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_puts_them_together():
    command = ["kubectl", "kustomize", str(LAUNCH)]
    rendered = list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    maps = {one["metadata"]["name"]: one["data"] for one in rendered if one["kind"] == "ConfigMap"}
    assert [*maps.values()] == [{"haproxy.cfg": (LAUNCH / "haproxy.cfg").read_text()}, SHARED]
    assert {f"{one['kind']} {one['metadata']['name']}" for one in rendered if one["kind"] != "ConfigMap"} == {
        *MANIFESTS
    }
    pods = [one["spec"]["template"]["spec"] for one in rendered if one["kind"] == "Deployment"]
    named = {volume["configMap"]["name"] for pod in pods for volume in pod["volumes"] if "configMap" in volume}
    sources = [source for pod in pods for source in pod["containers"][0].get("envFrom", [])]
    assert named | {source["configMapRef"]["name"] for source in sources if "configMapRef" in source} == {*maps}
    assert {pod["containers"][0]["image"].partition(":")[0] for pod in pods} == {"registry.example/f2l-vllm", "haproxy"}
    for one in rendered:
        kubernetes_validate.validate(one, VERSIONS[0], strict=True)


@pytest.mark.parametrize("name", OURS)
def test_every_setting_exists_and_every_value_is_taken(name):
    refuse_unknown(environment(name))
    assert Settings.read(settings_of(name)).tenants == "catalog"


def test_the_image_runs_the_command(hypernetwork_model):
    image = (LAUNCH / "Dockerfile").read_text()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    [program] = re.findall(r'^ENTRYPOINT \["([^"]+)"\]$', image, re.MULTILINE)
    assert program in scripts
    command, model, *words = arguments(SERVERS)
    assert command in get_command(app).commands
    assert model == SHARED["MODEL"]
    launch = plan(str(hypernetwork_model), settings_of(SERVERS), words)
    assert launch.argv[3:5] == ["serve", str(hypernetwork_model)]
    assert launch.workers is None


def test_workers_take_their_arguments_and_are_asked_how_they_are():
    command, model, *words = arguments(WORKERS)
    parsed = get_command(app).commands[command].make_context(command, [model, *words]).params
    assert (parsed["model"], parsed["host"], parsed["port"]) == (SHARED["MODEL"], "0.0.0.0", port_of(WORKERS))
    asked = {kind: probe["httpGet"]["path"] for kind, probe in probes(WORKERS).items()}
    assert asked == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}


def test_the_video_in_work_is_finished_before_a_worker_is_killed():
    grace = TEMPLATES[WORKERS]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= Settings.model_fields["job_seconds"].default + SPARE_SECONDS


def test_servers_listen_where_they_are_asked():
    words = arguments(SERVERS)
    assert "--host=0.0.0.0" in words
    assert f"--port={port_of(SERVERS)}" in words
    assert environment(BALANCER)["BIND"] == f":{port_of(BALANCER)}"
    service = MANIFESTS["Service f2l-servers"]["spec"]
    assert service["clusterIP"] == "None"  # its name stands for every server's own address
    name = environment(BALANCER)["SERVERS"]
    assert name == f"f2l-servers.$(NAMESPACE).svc.cluster.local:{port_of(SERVERS)}"


@pytest.mark.skipif(find("haproxy") is None, reason="haproxy is not installed")
def test_haproxy_takes_its_configuration_in_the_environment_of_the_balancer():
    given = {name: value.replace("$(NAMESPACE)", "f2l") for name, value in environment(BALANCER).items()}
    program, *words = arguments(BALANCER)
    words = [str(LAUNCH / "haproxy.cfg") if word.endswith("haproxy.cfg") else word for word in words]
    command = [find(program), "-c", *words]
    done = subprocess.run(command, env=dict(os.environ) | given, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert container(BALANCER)["volumeMounts"] == [{"name": "config", "mountPath": "/etc/haproxy"}]


def test_probes_ask_routes_that_need_no_key():
    asked = {kind: probe["httpGet"]["path"] for kind, probe in probes(SERVERS).items()}
    assert asked == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    assert {*asked.values()} <= {*Settings.model_fields["open_routes"].default.split(",")}
    assert "/ready" in {route.path for route in router.routes}


@pytest.mark.parametrize("name", TEMPLATES)
def test_ports_go_by_names_that_the_containers_have(name):
    known = {port["name"] for port in container(name).get("ports", [])}
    asked = [probe.get("httpGet") or probe.get("tcpSocket") for probe in probes(name).values()]
    assert {one["port"] for one in asked if one} <= known


@pytest.mark.parametrize("name", [SERVERS, BALANCER])
def test_answers_may_end_before_a_pod_is_killed(name):
    pod = TEMPLATES[name]["spec"]
    pause = container(name).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    grace = pod["terminationGracePeriodSeconds"] - pause
    assert grace >= Settings.model_fields["shutdown_seconds"].default + SPARE_SECONDS


@pytest.mark.parametrize("name", TEMPLATES)
def test_pods_are_as_the_restricted_standard_of_kubernetes_wants_them(name):
    pod = TEMPLATES[name]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(name)["securityContext"]["allowPrivilegeEscalation"] is False
    assert container(name)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    kinds = {kind for volume in pod["volumes"] for kind in volume} - {"name"}
    assert kinds <= {"configMap", "emptyDir", "ephemeral"}
    assert not any(key.startswith("host") for key in pod)


@pytest.mark.parametrize("name", OURS)
def test_the_image_and_its_folders_belong_to_the_user_of_the_pods(name):
    image = (LAUNCH / "Dockerfile").read_text()
    security = TEMPLATES[name]["spec"]["securityContext"]
    assert re.findall(r"^USER (\d+)$", image, re.MULTILINE) == [str(security["runAsUser"])]
    folders = set(re.findall(r"^VOLUME (.+)$", image, re.MULTILINE)[0].split())
    mounts = {mount["mountPath"] for mount in container(name)["volumeMounts"]}
    assert mounts == folders | {"/dev/shm"}
    assert security["fsGroup"] == security["runAsUser"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_service_puts_variables_into_the_environment(name):
    assert (
        TEMPLATES[name]["spec"]["enableServiceLinks"] is False
    )  # F2L_VLLM_PORT is no setting: the server would not start
    with pytest.raises(ValueError, match="F2L_VLLM_SERVICE_HOST is no setting"):
        refuse_unknown({"F2L_VLLM_SERVICE_HOST": "10.0.0.1"})


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.split()[0] not in ("Namespace",)])
def test_everything_selects_pods_that_are_there(name):
    spec = MANIFESTS[name]["spec"]
    selector = spec["selector"] if "selector" in spec else spec["podSelector"]
    wanted = selector.get("matchLabels", selector).items()
    rules = spec.get("ingress", [])
    peers = [
        source["podSelector"]["matchLabels"] for rule in rules for source in rule["from"] if "podSelector" in source
    ]
    for labels in (wanted, *(peer.items() for peer in peers)):
        assert [one for one in TEMPLATES.values() if labels <= one["metadata"]["labels"].items()]


def test_nobody_but_the_balancer_reaches_a_server_and_prometheus_all():
    [rule] = MANIFESTS["NetworkPolicy f2l-servers"]["spec"]["ingress"]
    assert rule["from"] == [
        {"podSelector": {"matchLabels": {"app": "f2l-balancer"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
    ]
    assert rule["ports"] == [{"port": "http"}]
    [rule] = MANIFESTS["NetworkPolicy f2l-workers"]["spec"]["ingress"]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
