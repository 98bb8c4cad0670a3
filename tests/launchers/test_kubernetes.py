"""The manifest for Kubernetes."""

import copy
import functools
import subprocess

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils
from launching import done

from trainingcompiler.cli.job import Job
from trainingcompiler.launchers import kubernetes

# The oldest and the newest version of Kubernetes whose official schemas are at hand; all know podFailurePolicy.
VERSIONS = (utils.all_versions()[0], utils.latest_version())
MENDED = (1, 29)  # the version since which a rule's onPodConditions is as optional in the schema as in the server


def job(**given) -> Job:
    return Job(arguments=("script", "train.py", "--lr", "1e-3", "$HOME"), image="registry/image:1", **given)


def validate(part: dict, version: str) -> None:
    """Refuses unknown fields, missing ones, and other types, as the official schema of this version has them."""
    if tuple(map(int, version.split(".")[:2])) < MENDED and "podFailurePolicy" in part["spec"]:
        part = copy.deepcopy(part)
        for rule in part["spec"]["podFailurePolicy"]["rules"]:
            rule.setdefault("onPodConditions", [])  # the server takes "one of both", as the schema's own text says
    kubernetes_validate.validate(part, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("hosts", "kinds"), [(1, ["Job"]), (2, ["Service", "Job"])])
def test_the_official_schemas_accept_it(version, hosts, kinds):
    variables = {"TRAININGCOMPILER_ENGINE": "xla", "TRAININGCOMPILER_DEBUG": "1"}
    for more in ({}, {"gpus_per_node": 8, "master_port": 4711, "max_restarts": 3, "variables": variables}):
        parts = kubernetes.manifest(job(nproc_per_node=8, min_nodes=hosts, max_nodes=hosts, **more))
        assert [part["kind"] for part in parts] == kinds
        for part in parts:
            validate(yaml.safe_load("\n".join(kubernetes.yaml_lines(part))), version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", [("podFailurePolicy", "rules", 1), ("template", "spec", "containers", 0), ()])
def test_the_official_schemas_refuse_an_unknown_field(version, path):
    (training,) = kubernetes.manifest(job(nproc_per_node=1))
    functools.reduce(lambda place, key: place[key], path, training["spec"])["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="'comand' was unexpected"):
        validate(training, version)


def test_one_pod():
    (only,) = kubernetes.manifest(job(nproc_per_node=2, max_restarts=3))
    (container,) = only["spec"]["template"]["spec"]["containers"]
    assert container["command"] == [
        "python", "-m", "trainingcompiler.launch", "--nproc-per-node=2", "--max-restarts=3", "--rdzv-id=train", "--",
        "train.py", "--lr", "1e-3", "$$HOME",
    ]  # fmt: skip
    assert container["resources"] == {}


def test_several_pods_meet_at_the_first():
    variables = {"TRAININGCOMPILER_ENGINE": "xla", "GLIBC_TUNABLES": "x"}
    parts = kubernetes.manifest(
        job(nproc_per_node=8, min_nodes=2, max_nodes=2, gpus_per_node=8, rdzv_id="My_Run.2", variables=variables)
    )
    service, training = parts
    pods = training["spec"]["template"]["spec"]
    assert pods["subdomain"] == service["metadata"]["name"] == "my-run-2"
    assert service["spec"]["selector"] == {"job-name": training["metadata"]["name"]}
    (container,) = pods["containers"]
    assert "--rdzv-endpoint=my-run-2-0.my-run-2:29400" in container["command"]
    assert "--nnodes=2" in container["command"] and "--launcher=elastic" in container["command"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert container["env"] == [{"name": "TRAININGCOMPILER_ENGINE", "value": "xla"}]
    assert training["spec"]["completions"] == training["spec"]["parallelism"] == 2


def test_the_pods_command_is_one_that_the_launcher_understands():
    from trainingcompiler import launch
    from trainingcompiler.cli.job import job_of
    from trainingcompiler.cli.parser import parse

    for nodes in (1, 2):
        made = job(nproc_per_node=2, min_nodes=nodes, max_nodes=nodes, gpus_per_node=2)
        line = parse(kubernetes.pod_command(made, "x")[3:], launch.LAUNCH)
        found = job_of(line, [], {}, {"JAX_PLATFORMS": "cpu"})
        assert (found.nproc_per_node, found.max_nodes, line.target) == (2, nodes, "train.py")


@pytest.mark.parametrize("text", ["yes", "null", "1", "1e-3", "", "a: b", "- x", "#", "None", '"', "é\n", "registry/x"])
def test_yaml_is_read_as_it_was_written(text):
    content = {"a": text, text: {"b": [text, 1, True], "c": {}, "d": [], "e": [{"f": text, "g": [{"h": None}]}]}}
    assert yaml.safe_load("\n".join(kubernetes.yaml_lines(content))) == content


@pytest.mark.parametrize(("name", "label"), [("My_Run.2", "my-run-2"), ("7b", "job-7b"), ("x" * 80, "x" * 50)])
def test_names_are_labels(name, label):
    assert kubernetes._dns_label(name) == label


def test_dry_run_prints_the_manifest(launch):
    words = ("--launcher=kubernetes", "--image=image", "--nnodes=2", "--nproc-per-node=4", "--dry-run")
    ran = done(launch("", *words))
    assert ran.returncode == 0
    kinds = [part["kind"] for part in yaml.safe_load_all(ran.stdout)]
    assert kinds == ["Service", "Job"]


def test_kubectl_applies_it(monkeypatch):
    applied = []
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(
        "subprocess.run",
        lambda command, **options: applied.append((command, options)) or subprocess.CompletedProcess(command, 7),
    )
    with pytest.raises(SystemExit) as leaving:
        kubernetes.launch(job(nproc_per_node=1))
    assert leaving.value.code == 7
    ((command, options),) = applied
    assert command == ["kubectl", "apply", "-f", "-"] and yaml.safe_load(options["input"])["kind"] == "Job"


def test_without_kubectl(launch):
    ran = done(launch("", "--launcher=kubernetes", "--image=image", PATH=""))
    assert ran.returncode == 2
    assert "trainingcompiler.launch: --launcher=kubernetes needs kubectl, which is not on the PATH" in ran.stderr
