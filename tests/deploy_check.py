"""The deployment files against the schemas of the tools that read them: ``make deploy-check``.

Needs check-jsonschema and kubernetes-validate (requirements-deploy.lock), which bring the schemas.
"""

import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES = "1.31"
COMPOSE = ("-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec")


def main() -> None:
    """Check every file; exit status 1 where one is wrong."""
    wrong = [*compose(), *kubernetes(), *kuberay(), *slurm(), *dockerfile()]
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"deploy: {'wrong' if wrong else 'all files as their schemas want them'}")
    sys.exit(bool(wrong))


def compose() -> list[str]:
    """compose.yaml by the Compose specification; every variable of it is in env.example."""
    file = DEPLOY / "compose.yaml"
    done = subprocess.run([sys.executable, *COMPOSE, str(file)], capture_output=True, text=True)
    wrong = [done.stdout] if done.returncode else []
    used = set(re.findall(r"\$\{([A-Z_0-9]+)", file.read_text()))
    given = set(re.findall(r"^([A-Z_0-9]+)=", (DEPLOY / "env.example").read_text(), re.M))
    wrong += [f"{file}: ${{{name}}} is not in env.example" for name in sorted(used - given)]
    for name, service in yaml.safe_load(file.read_text())["services"].items():
        for port in service.get("ports", []):
            if not str(port).startswith("127.0.0.1:"):
                wrong.append(f"{file}: service {name} publishes {port} beyond loopback")
    return wrong


def kubernetes() -> list[str]:
    """Every object of rollflow.yaml by Kubernetes' own schema; no secret stands in it."""
    file = DEPLOY / "kubernetes/rollflow.yaml"
    return [
        problem
        for document in yaml.safe_load_all(file.read_text())
        for problem in _valid(file, document)
    ]


def kuberay() -> list[str]:
    """The pod template in kuberay.yaml, as Kubernetes sees it, and the Ray that it names."""
    file = DEPLOY / "kubernetes/kuberay.yaml"
    job = yaml.safe_load(file.read_text())
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "head"}, "spec": head["spec"]}
    wrong = _valid(file, pod)
    locked = re.search(r"^ray==(.*)$", (DEPLOY.parent / "requirements.lock").read_text(), re.M)
    if locked and cluster["rayVersion"] != locked[1].split()[0]:
        wrong.append(f"{file}: rayVersion {cluster['rayVersion']}, requirements.lock {locked[1]}")
    return wrong


def slurm() -> list[str]:
    """The batch scripts parse."""
    return [
        f"{file}: {done.stderr}"
        for file in (DEPLOY / "slurm").iterdir()
        if (
            done := subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
        ).returncode
    ]


def dockerfile() -> list[str]:
    """What the Dockerfile copies is there, and both targets are."""
    text = (DEPLOY / "Dockerfile").read_text()
    wrong = [
        f"Dockerfile: no target {t}"
        for t in ("cpu", "gpu")
        if not re.search(rf"AS {t}$", text, re.M)
    ]
    for line in re.findall(r"^COPY --chown=\S+ (.*)$", text, re.M):
        *sources, _ = line.split()
        wrong += [f"Dockerfile: no {s}" for s in sources if not (DEPLOY.parent / s).exists()]
    return wrong


def _valid(file: Path, document: dict[str, object]) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{file}: {document['kind']}: {error.message}"]
    return []


if __name__ == "__main__":
    main()
