"""launch/gke_jobset.sh: the JobSet that it applies."""

import pytest
import yaml

from tests.reference.launch import CASES, GKE, GPU_NODES, OVERRIDE, ROOT, SNAPSHOTS, TRAIN, launch


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"], replicated["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", ["gke_jobset_tpu", "gke_jobset_slices", "gke_jobset_gpu"])
def test_jobset_restarts_with_a_limit_unless_a_machine_is_lost(name):
    jobset = yaml.safe_load((SNAPSHOTS / f"{name}.txt").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job, pod = job_of(jobset)
    # Status 75 is named by no rule, so maxRestarts counts it.
    (lost,) = job["podFailurePolicy"]["rules"]
    assert lost["action"] == "FailJob" and "onExitCodes" not in lost
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == (0 if name.endswith("gpu") else 50)
    assert lost["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    # Kubernetes rejects a podFailurePolicy with another restartPolicy; pods must not be retried.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)


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
