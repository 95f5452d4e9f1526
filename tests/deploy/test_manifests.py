"""The files of `deploy/` keep to their schemas, and set what kvkeep knows. None of them is run."""

from __future__ import annotations

import copy
import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from kvkeep.config import ENV_PREFIX, Settings
from kvkeep.disagg.places import RESOURCE
from kvkeep.server import app
from kvkeep.server.options import ServerOptions

DEPLOY = Path(__file__).parents[2] / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"


def schema(name: str) -> dict[str, Any]:
    loaded = json.loads(gzip.decompress((SCHEMAS / f"{name}.json.gz").read_bytes()))
    assert isinstance(loaded, dict)
    return loaded


def strict(node: Any) -> Any:
    """Return a Kubernetes schema that refuses fields it does not name, as the API server does."""
    if isinstance(node, list):
        return [strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    inside = {key: strict(value) for key, value in node.items()}
    open_ = node.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(node.get("properties"), dict) and node.get("type") == "object" and not open_:
        inside.setdefault("additionalProperties", False)
    return inside


def errors(kind: dict[str, Any], document: Any) -> list[str]:
    return [str(error) for error in jsonschema_rs.validator_for(kind).iter_errors(document)]


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def cluster_schema() -> dict[str, Any]:
    found = strict(schema("raycluster-v1"))
    assert isinstance(found, dict)
    # Every object has these two, and their fields are the API server's own to check.
    found["properties"] |= {"metadata": {"type": "object"}, "status": False}
    return found


COMPOSE = [path.name for path in sorted(DEPLOY.glob("compose*.yaml"))]


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_keep_to_the_specification(name: str) -> None:
    (document,) = documents(name)
    assert errors(schema("compose-spec"), document) == []
    wrong = copy.deepcopy(document)
    next(iter(wrong["services"].values()))["prots"] = ["8000"]
    assert "prots" in errors(schema("compose-spec"), wrong)[0]


def test_clusters_keep_to_kuberays_schema(cluster_schema: dict[str, Any]) -> None:
    clusters = [one for one in documents("kuberay.yaml") if one["kind"] == "RayCluster"]
    assert [one["apiVersion"] for one in clusters] == ["ray.io/v1"]
    for document in clusters:
        assert errors(cluster_schema, document) == []
        wrong = copy.deepcopy(document)
        container = wrong["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        container["readOnlyRoot"] = True
        assert "readOnlyRoot" in errors(cluster_schema, wrong)[0]


def settings_of(name: str) -> list[dict[str, str]]:
    """Return what each container of a file tells kvkeep by its environment."""
    found: list[dict[str, str]] = []

    def look(node: Any) -> None:
        if isinstance(node, list):
            if node and all(isinstance(one, dict) and "name" in one for one in node):
                told = {one["name"]: one.get("value", "") for one in node if "image" not in one}
                found.append({k: v for k, v in told.items() if k.startswith(ENV_PREFIX)})
            for one in node:
                look(one)
        elif isinstance(node, dict):
            if isinstance(node.get("environment"), dict):
                told = {k: str(v) for k, v in node["environment"].items()}
                found.append({k: v for k, v in told.items() if k.startswith(ENV_PREFIX)})
            for one in node.values():
                look(one)

    look(documents(name))
    return [told for told in found if told]


@pytest.mark.parametrize("name", [*COMPOSE, "kuberay.yaml"])
def test_what_they_set_is_what_kvkeep_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = settings_of(name)
    assert told
    for one in told:
        with monkeypatch.context() as patch:
            for variable, value in one.items():
                patch.setenv(variable, value)
            settings = Settings()
        for variable in one:
            assert variable.removeprefix(ENV_PREFIX).lower() in settings.model_fields_set


def values_of(node: Any, key: str) -> list[Any]:
    """Return what stands under a key, anywhere in a document."""
    inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    found = [node[key]] if isinstance(node, dict) and key in node else []
    return found + [one for part in inside for one in values_of(part, key)]


def test_they_are_probed_where_the_public_port_answers_without_a_key() -> None:
    (compose,) = documents("compose.yaml")
    probe = compose["services"]["server"]["healthcheck"]["test"][-1]
    paths = [re.findall(r"http://[^/]+(/[a-z]*)", probe)[0]]
    paths += [probe["path"] for probe in values_of(documents("kuberay.yaml"), "httpGet")]
    assert paths == ["/health"] * 2
    assert set(paths) <= app._open_paths(ServerOptions())


def test_ours_run_as_nobody_and_name_files_for_secrets() -> None:
    assert "USER kvkeep" in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    pods = values_of(documents("kuberay.yaml"), "template")
    assert len(pods) == 2
    assert all(pod["spec"]["securityContext"]["runAsNonRoot"] for pod in pods)
    told = [one for name in (*COMPOSE, "kuberay.yaml") for one in settings_of(name)]
    secret = {k: v for one in told for k, v in one.items() if re.search("KEY|TOKEN|CERT", k)}
    assert secret
    assert all(value.removeprefix("file:").startswith("/") for value in secret.values())


def test_workers_come_to_their_own_nodes() -> None:
    head, group = values_of(documents("kuberay.yaml"), "rayStartParams")
    assert "resources" not in head
    assert set(json.loads(json.loads(group["resources"]))) == set(RESOURCE.values())
