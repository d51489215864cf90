"""What is sent to Kubernetes: filled in as submit.sh does it, and true to the published schemas where they are at hand."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.contract import runs

SUBMIT = runs.ROOT / "launch" / "gke" / "submit.sh"
CRD = os.environ.get("ITJAX_JOBSET_CRD", "")  # config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of JobSet

ALWAYS = {"NAME": "mine", "IMAGE": "itjax:1", "CLAIM": "runs", "OVERRIDES": "--config.steps=100 --config.rows=64"}
SLICE = {**ALWAYS, "ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4", "HOSTS": "4"}
CASES = {
    "slice": ("tpu", SLICE),
    "slices": ("tpu", {**SLICE, "SLICES": "2"}),
    "nodes": ("gpu", {**ALWAYS, "ACCELERATOR": "nvidia-h100-80gb", "HOSTS": "2"}),
}


@pytest.fixture(params=CASES)
def jobset(request, tmp_path) -> dict:
    """What kubectl gets."""
    kind, variables = CASES[request.param]
    fake = tmp_path / "kubectl"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/sent.yaml\n')
    fake.chmod(0o755)
    subprocess.run(["bash", SUBMIT, kind], env={**os.environ, **variables, "KUBECTL": str(fake)}, check=True)
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    return yaml.safe_load((tmp_path / "sent.yaml").read_text())


def job(jobset: dict) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_python_gets_the_signals_and_the_settings(jobset):
    (container,) = job(jobset)["template"]["spec"]["containers"]
    line = "exec python -m itjax.main --config=configs/quickstart.py --config.run_dir=/runs/mine"
    assert container["command"] == ["bash", "-c", f"{line} --config.steps=100 --config.rows=64"]
    assert job(jobset)["template"]["spec"]["terminationGracePeriodSeconds"] == 120
    assert job(jobset)["template"]["spec"]["shareProcessNamespace"] is True


def test_a_lost_process_starts_all_again_and_a_fault_of_the_config_does_not(jobset):
    assert jobset["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 20
    assert job(jobset)["backoffLimit"] == 0
    (rule,) = job(jobset)["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 5])
    assert job(jobset)["template"]["spec"]["restartPolicy"] == "Never"  # what a podFailurePolicy asks for


def test_every_pod_sees_the_run(jobset):
    pod = job(jobset)["template"]["spec"]
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
    assert {"name": "runs", "mountPath": "/runs"} in pod["containers"][0]["volumeMounts"]


def test_all_is_filled_in_and_numbers_are_numbers(jobset):
    assert "${" not in yaml.safe_dump(jobset)
    assert isinstance(job(jobset)["parallelism"], int)
    assert job(jobset)["parallelism"] == job(jobset)["completions"]
    assert job(jobset)["completionMode"] == "Indexed"


@pytest.mark.parametrize("jobset", ["nodes"], indirect=True)
def test_gpu_nodes_find_the_first_pod(jobset):
    environment = {entry["name"]: entry for entry in job(jobset)["template"]["spec"]["containers"][0]["env"]}
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == "mine-node-0-0.mine:8476"
    assert environment["JAX_NUM_PROCESSES"]["value"] == "2"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == index


@pytest.mark.parametrize("jobset", ["slices"], indirect=True)
def test_every_slice_is_a_node_pool_of_its_own(jobset):
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    annotations = jobset["metadata"]["annotations"]
    assert annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "cloud.google.com/gke-nodepool"


def test_a_variable_that_is_missing_is_named():
    done = subprocess.run(["bash", SUBMIT, "tpu"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "NAME: of the run, e.g. NAME=mine" in done.stderr


def test_it_is_a_jobset(jobset):
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    if not CRD:
        pytest.skip("set ITJAX_JOBSET_CRD to the JobSet project's definition of the resource")
    (version,) = [entry for entry in yaml.safe_load(Path(CRD).read_text())["spec"]["versions"] if entry["served"]]
    assert jobset["apiVersion"] == f"jobset.x-k8s.io/{version['name']}"
    jsonschema.validate(jobset, strict(version["schema"]["openAPIV3Schema"]))


def test_its_jobs_are_jobs(jobset):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "mine"}, "spec": job(jobset)}
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def strict(schema: dict) -> dict:
    """The schema, which refuses fields that it does not know, as the server does when kubectl asks it to be strict."""
    out = {name: strict(part) if isinstance(part, dict) else part for name, part in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if out["properties"].keys() - {"metadata"} and schema["properties"].get("metadata") != {"type": "object"}:
            out.setdefault("additionalProperties", False)
    return out
