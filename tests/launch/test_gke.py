"""launch/gke_jobset.sh: the JobSet that it applies."""

import re

import pytest
import yaml

from tests.reference.launch import (
    CASES,
    DATA,
    GKE,
    GPU_NODES,
    OVERRIDE,
    ROOT,
    SNAPSHOTS,
    TRAIN,
    launch,
)


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "name",
    [
        "gke_jobset_tpu",
        "gke_jobset_slices",
        "gke_jobset_gpu",
        "gke_jobset_prepare",
        "gke_jobset_embed",
    ],
)
def test_jobset_is_one_that_kubernetes_accepts(name):
    jobset = yaml.safe_load((SNAPSHOTS / f"{name}.txt").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job, pod = job_of(jobset)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == (0 if name.endswith("gpu") else 100)
    # Kubernetes rejects a podFailurePolicy with another restartPolicy; pods must not be retried.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        # The pattern of the field in JobSet's API.
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    for rule in job["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]["values"]
            assert codes == sorted(set(codes)) and 0 not in codes and len(codes) <= 255
            assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]


def action(jobset, status: int, *, disrupted: bool) -> str:
    """What JobSet does when a pod ends, by the documented rules of Job and JobSet."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job_of(jobset)[0]["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if "onExitCodes" in rule:
            codes, operator = rule["onExitCodes"]["values"], rule["onExitCodes"]["operator"]
            meets = (status in codes) == {"In": True, "NotIn": False}[operator]
            what = f"Container train for pod default/base failed with exit code {status}"
        else:
            meets = disrupted
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            what = "Pod default/base has condition DisruptionTarget"
        if meets:
            reason, message = "PodFailurePolicy", f"{what} matching FailJob rule at index {index}"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(x, message) for x in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_jobset_restarts_as_the_other_launchers_do():
    """After 75 and signals with a limit; after a lost machine without one; not after errors."""
    jobset = yaml.safe_load((SNAPSHOTS / "gke_jobset_tpu.txt").read_text())
    restarted = {x for x in range(1, 256) if action(jobset, x, disrupted=False) == "RestartJobSet"}
    assert restarted == {75, *range(129, 256)}
    assert action(jobset, 1, disrupted=False) == "FailJobSet"
    for status in (1, 75, 137, 143):
        assert action(jobset, status, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"


def test_jobset_of_a_tpu_slice():
    jobset = yaml.safe_load((SNAPSHOTS / "gke_jobset_tpu.txt").read_text())
    job, pod = job_of(jobset)
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in jobset["metadata"]["annotations"]
    assert pod["terminationGracePeriodSeconds"] == 600
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == ["python", "-m", "imagen_jax", "train", *TRAIN]
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    host = f"{jobset['metadata']['name']}-{jobset['spec']['replicatedJobs'][0]['name']}-0-0"
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{host}.{jobset['metadata']['name']}:8476"
    assert env["JAX_NUM_PROCESSES"] == "4"
    assert "job-completion-index" in env["JAX_PROCESS_ID"]["fieldRef"]["fieldPath"]


def test_jobset_of_several_slices():
    """GKE sets MEGASCALE_* and TPU_WORKER_*; a process number of each slice would repeat."""
    jobset = yaml.safe_load((SNAPSHOTS / "gke_jobset_slices.txt").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job, pod = job_of(jobset)
    assert replicated["replicas"] == 3 and job["parallelism"] == job["completions"] == 4
    assert pod["containers"][0]["env"] == []
    refused = launch(*GKE, *GPU_NODES, "--slices=2", "--dry_run")
    assert refused.returncode == 2 and "--slices is for TPUs" in refused.stderr


def test_jobsets_that_precede_a_training():
    """`prepare` in one pod without an accelerator, `embed` in all, none of which joins another."""
    found = {}
    for step in ("prepare", "embed"):
        jobset = yaml.safe_load((SNAPSHOTS / f"gke_jobset_{step}.txt").read_text())
        (replicated,) = jobset["spec"]["replicatedJobs"]
        job, pod = job_of(jobset)
        (container,) = pod["containers"]
        assert jobset["metadata"]["name"] == f"base-{step}"
        assert container["command"] == ["python", "-m", "imagen_jax", step, *DATA]
        environment = {e["name"]: e["value"] for e in container["env"]}
        assert not any(name.startswith("JAX_COORDINATOR") for name in environment)
        pods = replicated["replicas"] * job["completions"]
        found[step] = pods, container["resources"]["limits"], environment
    assert found["prepare"] == (1, {}, {"JAX_PLATFORMS": "cpu"})
    pods, limits, environment = found["embed"]
    assert pods == 12 and limits == {"google.com/tpu": 4}
    # JAX's own description of a host's chips apart from the slice.
    assert environment == {
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_VISIBLE_DEVICES": "0,1,2,3",
    }


def test_jobset_of_gpu_nodes():
    jobset = yaml.safe_load((SNAPSHOTS / "gke_jobset_gpu.txt").read_text())
    _, pod = job_of(jobset)
    (container,) = pod["containers"]
    assert jobset["metadata"]["annotations"] == {} and jobset["metadata"]["namespace"] == "n"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 0
    assert (pod["terminationGracePeriodSeconds"], pod["serviceAccountName"]) == (60, "s")
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    # Kubernetes reads $$ as $.
    assert container["command"][0] == "py"
    assert container["command"][-1] == OVERRIDE[0].replace("$", "$$")


def test_jobset_mounts_a_claim():
    jobset = yaml.safe_load((SNAPSHOTS / "gke_jobset_tpu.txt").read_text())
    _, pod = job_of(jobset)
    assert pod["volumes"] == pod["containers"][0]["volumeMounts"] == []
    result = launch(*GKE, *GPU_NODES, "--claim=disk", "--dry_run")
    _, pod = job_of(yaml.safe_load(result.stdout))
    (volume,), (mount,) = pod["volumes"], pod["containers"][0]["volumeMounts"]
    assert volume["persistentVolumeClaim"] == {"claimName": "disk"}
    assert mount == {"name": volume["name"], "mountPath": "/shared"}
    refused = launch(*GKE, *GPU_NODES, "--claim=disk", "--workdir=runs/base", "--dry_run")
    assert refused.returncode == 2 and "--workdir=runs/base must begin with /" in refused.stderr


def test_jobset_is_applied(recorder, tmp_path):
    folder, calls = recorder
    assert launch(*CASES["gke_jobset_tpu"], path=folder).returncode == 0
    assert calls() == [["kubectl", "apply", "-f", "-"]]
    snapshot = (SNAPSHOTS / "gke_jobset_tpu.txt").read_text()
    assert (tmp_path / "calls.stdin").read_text() == snapshot


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("${IMAGE}", "fixed", "the placeholder ${IMAGE} is missing"),
        ("${IMAGE}", "${IMAGE}${IMAEG}", "nothing fills the placeholder ${IMAEG}"),
    ],
)
def test_placeholders_are_checked(old, new, says, tmp_path, recorder):
    folder, calls = recorder
    template = tmp_path / "template.yaml"
    template.write_text((ROOT / "launch/gke_jobset.yaml").read_text().replace(old, new))
    result = launch(*CASES["gke_jobset_tpu"], f"--template={template}", path=folder)
    assert result.returncode == 2 and calls() == []
    assert result.stderr == f"gke_jobset.sh: {template}: {says}\n"


def test_a_placeholder_inside_a_value_is_not_expanded():
    result = launch(*GKE, *GPU_NODES, "--image=${NAME}", "--dry_run")
    _, pod = job_of(yaml.safe_load(result.stdout))
    assert pod["containers"][0]["image"] == "${NAME}"
