"""Starts workers on Kubernetes: an indexed Job, one pod for each host, and a Service by which the pods meet.

https://kubernetes.io/docs/concepts/workloads/controllers/job/
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from trainingcompiler.cli.job import Job
from trainingcompiler.config import PREFIX
from trainingcompiler.errors import UsageError
from trainingcompiler.exit_codes import REQUEUE

_PORT = 29400
_CONTAINER = "trainer"
_LONGEST_NAME = 50  # of a DNS label, 63, leaving room for the pod's index
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9./_-]*")
_NOT_PLAIN = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def launch(job: Job) -> NoReturn:
    """Prints the manifest, or has `kubectl` apply it.

    Raises:
        UsageError: kubectl is not installed.
    """
    text = "---\n".join("\n".join(yaml_lines(part)) + "\n" for part in manifest(job))
    if job.dry_run:
        sys.stdout.write(text)
        sys.exit(0)
    if shutil.which("kubectl") is None:
        raise UsageError(
            "--launcher=kubernetes needs kubectl, which is not on the PATH; --dry-run prints the manifest, for whoever "
            "has it"
        )
    sys.exit(subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, check=False).returncode)


def manifest(job: Job) -> list[dict[str, Any]]:
    """The Service, where several pods have to meet, and the Job."""
    name = _dns_label(job.name)
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/managed-by": "trainingcompiler"}
    resources = {"limits": {"nvidia.com/gpu": job.gpus_per_node}} if job.gpus_per_node else {}
    variables = {key: value for key, value in job.variables.items() if key.startswith(PREFIX)}
    container = {
        "name": _CONTAINER,
        "image": job.image,
        "command": pod_command(job, name),
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "resources": resources,
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "containers": [container],
        # The default of 64 MB is too little for the workers of a DataLoader.
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    training = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.max_nodes,
            "parallelism": job.max_nodes,
            "backoffLimit": 0,  # a group is started again inside of its pods, by --max-restarts
            "podFailurePolicy": {
                "rules": [
                    # Neither a pod that was moved away, nor one that has saved and asks to go on later, has failed.
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "Ignore",
                        "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": [REQUEUE]},
                    },
                ]
            },
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    if job.max_nodes == 1:
        del pod["subdomain"]
        return [training]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the pods meet before any of them is ready
            "selector": {"job-name": name},
            "ports": [{"name": "rendezvous", "port": job.master_port or _PORT}],
        },
    }
    return [service, training]


def pod_command(job: Job, name: str) -> list[str]:
    """What each pod runs: this launcher, on its host."""
    options = [f"--nproc-per-node={job.nproc_per_node}", f"--max-restarts={job.max_restarts}", f"--rdzv-id={name}"]
    if job.max_nodes > 1:
        endpoint = f"{name}-0.{name}:{job.master_port or _PORT}"
        options += ["--launcher=elastic", f"--nnodes={job.max_nodes}", f"--rdzv-endpoint={endpoint}"]
    kind, target, *arguments = job.arguments
    script = ["-m", target] if kind == "module" else [target]
    # Kubernetes replaces $(NAME), and makes $$ a $.
    own = [word.replace("$", "$$") for word in (*script, *arguments)]
    return ["python", "-m", "trainingcompiler.launch", *options, "--", *own]


def yaml_lines(content: Any, indent: str = "") -> Iterator[str]:
    """Plain data as YAML, text being quoted wherever it could be read as something else."""
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(value, dict | list) and value:
                yield f"{indent}{_scalar(key)}:"
                yield from yaml_lines(value, f"{indent}  ")
            else:
                yield f"{indent}{_scalar(key)}: {_scalar(value)}"
    else:
        for value in content:
            if isinstance(value, dict) and value:
                first, *others = yaml_lines(value, f"{indent}  ")
                yield f"{indent}- {first.lstrip()}"
                yield from others
            else:
                yield f"{indent}- {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_PLAIN:
        return value
    return json.dumps(value)


def _dns_label(name: str) -> str:
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_LONGEST_NAME].rstrip("-")
    return label if label[:1].isalpha() else f"job-{label}".rstrip("-")
