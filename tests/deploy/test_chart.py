"""The Helm chart, rendered by Helm's own engine (`pip install helm-python-sdk`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm.entrypoints.args.cli_args import make_arg_parser
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.version import __version__

CHART = Path(__file__).parents[2] / "deploy" / "helm"


def render(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Objects by kind and name."""
    helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk")
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="r")
    objects = [found for text in dict(files).values() for found in yaml.safe_load_all(text) if found]
    return {f"{found['kind']}/{found['metadata']['name']}": found for found in objects}


def test_its_version_is_the_package_s():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def test_the_defaults_render():
    objects = render({})
    assert set(objects) == {"Deployment/r-default", "Service/r-default"}
    pod = objects["Deployment/r-default"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["containers"][0]["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}


def test_a_model_on_gpus_with_keys_and_a_disk_renders_and_its_flags_are_taken():
    model = {
        "name": "llama3", "repository": "registry/vllm", "tag": "cuda", "modelURL": "org/model", "replicaCount": 2,
        "requestCPU": 6, "requestMemory": "16Gi", "requestGPU": 2, "pvcStorage": "50Gi",
        "hf_token": {"secretName": "hub", "secretKey": "token"}, "env": [{"name": "A", "value": "b"}],
        "vllmConfig": {"maxModelLen": 8192, "dtype": "bfloat16", "tensorParallelSize": 2,
                       "extraArgs": ["--system-prompt-cache-fraction=0.6"]},
    }  # fmt: skip
    spec = {"modelSpec": [model, {**model, "name": "other"}], "apiKeySecret": "keys", "adminApiKeySecret": "admin"}
    objects = render({"servingEngineSpec": spec})
    assert len(objects) == 6
    container = objects["Deployment/r-llama3"]["spec"]["template"]["spec"]["containers"][0]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(container["args"])
    assert (args.model, args.max_model_len, args.system_prompt_cache_fraction) == ("org/model", 8192, 0.6)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert {env["name"] for env in container["env"]} == {"VLLM_API_KEY", "VLLM_ADMIN_API_KEY", "HF_TOKEN", "A"}
    assert objects["PersistentVolumeClaim/r-llama3"]["spec"]["accessModes"] == ["ReadWriteMany"]
    selector = objects["Service/r-llama3"]["spec"]["selector"]
    labels = objects["Deployment/r-llama3"]["spec"]["template"]["metadata"]["labels"]
    assert selector.items() <= labels.items()
    assert selector != objects["Service/r-other"]["spec"]["selector"]
