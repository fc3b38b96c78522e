"""The Kubernetes manifests: valid by the published schemas, with flags that the program accepts and meshes of the right size."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from discover_jax import config as settings
from discover_jax import formulas, machines, meshes
from discover_jax.models.families import SHAPES

_LAUNCH = Path(__file__).parents[2] / "launch"
_SCHEMAS = Path(__file__).with_name("schemas")
_FILES = {("JobSet", "jobset.x-k8s.io/v1alpha2"): "jobset-v1alpha2", ("RayCluster", "ray.io/v1"): "raycluster-v1"}
_FILES[("NetworkPolicy", "networking.k8s.io/v1")] = "networkpolicy-v1"
_GPU = ["gke-a3-high.yaml", "gke-a3-mega.yaml", "gke-a3-ultra.yaml"]
_TPU = ["gke-tpu-v5p.yaml", "gke-tpu-v6e.yaml", "gke-tpu7x.yaml"]
_CHIPS = {"2x2x2": 8, "4x4": 16, "2x2x4": 16, "4x8": 32}


def _strict(schema: Any) -> Any:
    """The schema with unknown fields forbidden, as `kubectl apply --validate=strict` has them."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def _problems(document: dict) -> list[str]:
    schema = _strict(json.loads((_SCHEMAS / f"{_FILES[document['kind'], document['apiVersion']]}.json").read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def _documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((_LAUNCH / name).read_text()))


def test_there_is_a_manifest_for_each_machine():
    assert sorted(path.name for path in _LAUNCH.glob("*.yaml")) == sorted([*_GPU, *_TPU, "gke-programs.yaml"])


@pytest.mark.parametrize("path", sorted(_LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_manifests_are_valid_by_the_published_schemas(path):
    for document in _documents(path.name):
        assert not _problems(document)


def test_the_schemas_find_errors():
    (jobset,) = _documents(_GPU[0])
    text = json.dumps(jobset)
    for wrong, named in {
        text.replace('"podFailurePolicy"', '"podFailurePolicies"'): "podFailurePolicies",
        text.replace('"completions": 2', '"completions": "two"'): "two",
        text.replace("FailJobSet", "FailTheJobSet"): "FailTheJobSet",
        text.replace('"containerPort"', '"port"'): "containerPort",
        text.replace('"mountPath"', '"path"'): "mountPath",
    }.items():
        assert named in " ".join(_problems(json.loads(wrong))), named


@pytest.mark.parametrize("path", sorted([*_LAUNCH.iterdir()]), ids=lambda path: path.name)
def test_the_first_line_says_what_was_tried(path):
    lines = path.read_text().splitlines()
    assert re.search(r"[Nn]ever (run|built)", lines[1] if lines[0].startswith("#!") else lines[0])


def _pod(name: str) -> tuple[dict, dict, dict, dict]:
    """The JobSet, its only job, its pod and its only container that is not a sidecar."""
    (jobset,) = _documents(name)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return jobset, job, job["template"], container


def _flags(container: dict) -> dict[str, str]:
    return dict(part.removeprefix("--").split("=", 1) for part in container["args"] if "=" in part)


def _config(flags: dict[str, str]) -> Any:
    file, argument = flags["config"].split(":")
    config = runpy.run_path(str(_LAUNCH.parent / file))["get_config"](argument)
    for flag, value in flags.items():
        if flag.startswith("config."):
            *path, last = flag.removeprefix("config.").split(".")
            section = config
            for part in path:
                section = section[part]
            section[last] = type(section[last])(value)
    return config


@pytest.mark.parametrize("name", [*_GPU, *_TPU])
def test_jobset_restarts_all_after_a_loss_and_ends_after_an_error(name):
    jobset, job, pod, container = _pod(name)
    assert job["completions"] == job["parallelism"] > 1
    assert job["completionMode"] == "Indexed"
    # A single restarted pod could not join the others, so JobSet restarts all, once the old ones are gone.
    assert job["backoffLimit"] == 0
    assert pod["spec"]["restartPolicy"] == "Never"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["restartStrategy"] == "BlockingRecreate"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [1, 2]}}
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


@pytest.mark.parametrize("name", [*_GPU, *_TPU])
def test_pods_use_the_images_entrypoint_with_valid_flags(name):
    _, _, pod, container = _pod(name)
    assert "command" not in container  # the image's entrypoint runs the preflight, then the run
    flags = _flags(container)
    assert flags["workdir"].startswith("/shared/")
    settings.validate(_config(flags), for_run=False)
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    containers = [*pod["spec"].get("initContainers", []), container]
    assert {mount["name"] for each in containers for mount in each["volumeMounts"]} == volumes


@pytest.mark.parametrize("name", [*_GPU, *_TPU])
def test_mesh_has_all_devices_and_rows_for_each_share(name):
    _, job, pod, container = _pod(name)
    flags = _flags(container)
    data, expert, tensor, rows = (int(flags.get(f"config.{key}", 1)) for key in ("mesh.data", "mesh.expert", "mesh.tensor", "train.rows"))
    assert rows % (data * expert) == 0
    hosts, limits = job["parallelism"], container["resources"]["limits"]
    if name in _GPU:
        assert limits["nvidia.com/gpu"] == 8
        assert (data, expert) == (hosts, 8)  # `expert` stays in a node, as docs/scaling.md says
        assert data * expert * tensor == hosts * limits["nvidia.com/gpu"]
        return
    topology = pod["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert container["securityContext"]["capabilities"]["add"] == ["SYS_RESOURCE"]  # for LOCKED_MEMORY
    assert "LOCKED_MEMORY" in [entry["name"] for entry in container["env"]]
    assert limits["google.com/tpu"] == 4 == _CHIPS[topology] / hosts
    assert data * expert * tensor == _CHIPS[topology] * (2 if "7x" in name else 1)  # jax counts two devices per chip of TPU7x


@pytest.mark.parametrize("name", _TPU)
def test_tpu_slices_have_the_recommended_mesh_and_the_documented_memory(name, monkeypatch):
    monkeypatch.setattr(machines, "_cpus", lambda count: [None] * count)
    _, _, pod, container = _pod(name)
    slice = f"{name.removeprefix('gke-').removeprefix('tpu-').removesuffix('.yaml')}:"
    slice += pod["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    config = _config(_flags(container))
    shape = Path(config.model.weights).name
    config.model.weights, config.model.shape = "random", shape
    machine = machines.find_machine(slice, 1)
    lengths = meshes.Lengths(config.sampling.max_prompt_tokens, config.sampling.max_new_tokens)
    best = meshes.recommend(config, SHAPES[shape], machine, lengths)[0]
    assert (best.mesh, best.rows) == ((config.mesh.data, config.mesh.expert, config.mesh.tensor), config.train.rows)
    assert best.kernels
    parts = formulas.parts(config, SHAPES[shape], machine, learn=True)
    largest = max(sum(part.values()) for part in parts.values()) / 1e9
    text, page = ((_LAUNCH.parent / path).read_text() for path in (f"launch/{name}", "docs/clusters.md"))
    said = rf"{largest:.0f}\s+(?:# )?of\s+(?:# )?{machine.memory / 1e9:.0f} GB"
    assert re.search(said, text)
    assert re.search(rf"`{re.escape(name)}`.*{shape.removeprefix('gpt-oss-')}, `expert` {config.mesh.expert}\b.*{said}", page)


@pytest.mark.parametrize("name", _GPU)
def test_processes_find_each_other(name):
    jobset, job, _, container = _pod(name)
    flags = _flags(container)
    host, port = flags["coordinator"].split(":")
    own = jobset["metadata"]["name"]
    assert host == f"{own}-{jobset['spec']['replicatedJobs'][0]['name']}-0-0.{own}"
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    assert int(port) in [entry["containerPort"] for entry in container["ports"]]
    assert int(flags["num_processes"]) == job["parallelism"]
    assert flags["process_id"] == "$(JOB_COMPLETION_INDEX)"
    # A pod takes a whole node, so nothing else must separate the pods.
    assert "annotations" not in jobset["metadata"]


@pytest.mark.parametrize(("name", "networks"), [("gke-a3-high.yaml", 4), ("gke-a3-mega.yaml", 8), ("gke-a3-ultra.yaml", 8)])
def test_gpu_pods_have_the_networks_and_the_driver_of_their_machine(name, networks):
    _, _, pod, container = _pod(name)
    interfaces = json.loads(pod["metadata"]["annotations"]["networking.gke.io/interfaces"])
    assert interfaces[0] == {"interfaceName": "eth0", "network": "default"}
    assert len({entry["network"] for entry in interfaces}) == networks + 1
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    for sidecar in pod["spec"].get("initContainers", []):
        assert sidecar["restartPolicy"] == "Always"  # a sidecar: a plain container would keep the pod running after the run
        devices = yaml.safe_load(pod["metadata"]["annotations"][f"devices.gke.io/container.{sidecar['name']}"])
        assert {"path": "/dev/nvidia0"} in devices


@pytest.mark.parametrize("name", [*_GPU, *_TPU])
def test_accelerator_pods_have_few_rights_and_send_programs_to_the_cpu_pods(name):
    _, _, pod, container = _pod(name)
    cluster, policy = _documents("gke-programs.yaml")
    assert set(container.get("securityContext", {}).get("capabilities", {}).get("add", [])) <= {"IPC_LOCK", "SYS_RESOURCE"}
    assert not pod["spec"]["automountServiceAccountToken"]
    assert _flags(container)["config.execution.backend"] == "ray"
    environment = {entry["name"]: entry for entry in container["env"]}
    own = cluster["metadata"]["name"]
    assert environment["RAY_HEAD"]["value"] == f"{own}-head-svc:6379"
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": own, "key": "auth_token"}
    assert cluster["spec"]["authOptions"] == {"mode": environment["RAY_AUTH_MODE"]["value"]}
    allowed = policy["spec"]["egress"][0]["to"][0]["podSelector"]["matchExpressions"][0]["values"]
    assert allowed == [pod["metadata"]["labels"]["app"], own]


def test_cpu_pods_have_what_their_sandbox_needs_and_no_volume():
    cluster, _ = _documents("gke-programs.yaml")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["command"] == ["mount", "-t", "proc", "proc", "/proc"]
    context = container["securityContext"]
    assert context["capabilities"]["add"] == ["SYS_ADMIN", "SYS_PTRACE"]
    assert context["seccompProfile"] == context["appArmorProfile"] == {"type": "Unconfined"}
    assert "volumes" not in group["template"]["spec"]
    assert int(group["rayStartParams"]["num-cpus"]) == container["resources"]["limits"]["cpu"]
    # KubeRay's own probes need ray's dashboard, which the package `ray` without extras lacks.
    for template in (cluster["spec"]["headGroupSpec"], group):
        (container,) = template["template"]["spec"]["containers"]
        assert container["readinessProbe"]["tcpSocket"]
        assert container["livenessProbe"]["tcpSocket"]
    constraint = (_LAUNCH.parent / "constraints" / "py311.txt").read_text()
    assert f"\nray=={cluster['spec']['rayVersion']}\n" in constraint
