#!/usr/bin/env bash
# Trains on GKE: fills in launch/gke_jobset.yaml and applies it.
#   launch/gke_jobset.sh [STEP] --name=NAME --image=IMAGE --accelerator=TYPE --nodes=N --chips=N
#       --config=FILE:NAME --workdir=gs://BUCKET/RUN [options] [--config.a.b=value ...]
# Steps, before a training; their JobSet is NAME-STEP, and they need no --workdir without --claim:
#   prepare   index the data in one pod without an accelerator: [--config.data.path=gs://... ...]
#   embed     encode the captions in all pods, each for itself; they share the work
# --accelerator is a node label: tpu-v6e-slice (then also --topology=4x4), nvidia-h100-80gb, ...
# --nodes: machines of a slice, or GPU machines; --chips: TPU chips or GPUs of each.
#   --slices=1              TPU slices, connected by the data-centre network
#   --spot                  on Spot nodes
#   --max_restarts=100      after status 75 and signals
#   --grace=SECONDS         time to save when a node is drained (600)
#   --namespace=default --service_account=default
#   --python=python         interpreter in the image
#   --claim=CLAIM           a PersistentVolumeClaim, mounted at the first folder of --workdir
#   --template=FILE         another file than launch/gke_jobset.yaml, with the same placeholders
#   --dry_run               print the JobSet instead of applying it
# Lost and drained nodes restart the run without limit, unless another process of the run ends first.
# Any other exit status ends it. JobSet restarts without a delay.
set -euo pipefail
name='' image='' accelerator='' topology='' nodes='' chips='' config='' workdir='' spot='' slices=1
max_restarts=100 grace=600 namespace=default service_account=default python=python claim=''
template=$(dirname "$0")/gke_jobset.yaml
# shellcheck source=lib.sh
source "$(dirname "$0")/lib.sh"
parse "name= image= accelerator= topology= nodes= chips= config= workdir= spot max_restarts= grace=
  slices= namespace= service_account= python= claim= template=" "$@"
take_step
need_name base
need image us-docker.pkg.dev/my-project/images/imagen_jax:1
need accelerator tpu-v6e-slice
need_number nodes 4
need_number chips 4
need_number slices 2
need_number grace 600
need_number max_restarts 100 0
step_line "$python" "$step"

# A JSON string, which is YAML too.
json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//$'\t'/\\t}"
}

command='' selector=() annotations='{}'
# Kubernetes expands $(NAME); $$ is a plain $.
for word in "${line[@]}"; do command+=", $(json "${word//\$/\$\$}")"; done
case $accelerator in
  tpu*)
    need topology 4x4
    selector=("cloud.google.com/gke-tpu-accelerator: $(json "$accelerator")"
      "cloud.google.com/gke-tpu-topology: $(json "$topology")")
    limits="{google.com/tpu: $chips}" privileged=true
    # All pods on one slice, also when the cluster has several of this kind.
    annotations='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
    ;;
  *)
    [ -z "$topology" ] || refuse "--topology is for TPUs, not for $accelerator"
    [ "$slices" -eq 1 ] || refuse "--slices is for TPUs, not for $accelerator; set --nodes"
    selector=("cloud.google.com/gke-accelerator: $(json "$accelerator")")
    limits="{nvidia.com/gpu: $chips}" privileged=false
    ;;
esac
[ -z "$spot" ] || selector+=('cloud.google.com/gke-spot: "true"')
printf -v selector_list ', %s' "${selector[@]}"

# With several slices, GKE describes the processes: MEGASCALE_COORDINATOR_ADDRESS and others.
environment='[]'
if [ "$step" = prepare ]; then
  nodes=1 slices=1 annotations='{}' selector_list='' limits='{}' privileged=false
  environment='[{name: JAX_PLATFORMS, value: cpu}]'
elif [ "$step" = embed ]; then
  # A pod's own chips, without the others of the slice.
  case $accelerator:$nodes:$chips in
    tpu*:1:*) ;;
    tpu*:*:4)
      environment='[{name: TPU_CHIPS_PER_PROCESS_BOUNDS, value: "2,2,1"},
                        {name: TPU_PROCESS_BOUNDS, value: "1,1,1"},
                        {name: TPU_VISIBLE_DEVICES, value: "0,1,2,3"}]'
      ;;
    tpu*) refuse "--chips=$chips: embed on several machines of a slice is for 4 chips each" ;;
  esac
elif [ "$slices" -eq 1 ]; then
  index="metadata.annotations['batch.kubernetes.io/job-completion-index']"
  environment="[{name: JAX_COORDINATOR_ADDRESS, value: \"$name-worker-0-0.$name:8476\"},
                        {name: JAX_NUM_PROCESSES, value: \"$nodes\"},
                        {name: JAX_PROCESS_ID, valueFrom: {fieldRef: {fieldPath: \"$index\"}}}]"
fi

# Without a claim, what a container writes is lost with it.
volumes='[]' mounts='[]'
if [ -n "$claim" ]; then
  need workdir /shared/base
  [[ $workdir == /* ]] || refuse "--claim=$claim: --workdir=$workdir must begin with /"
  first=${workdir#/}
  volumes="[{name: shared, persistentVolumeClaim: {claimName: $(json "$claim")}}]"
  mounts="[{name: shared, mountPath: $(json "/${first%%/*}")}]"
fi

[ "$step" = train ] || name+=-$step
restarted=''
for ((status = 1; status < 256; status++)); do
  if restartable "$status"; then restarted+=", $status"; fi
done

declare -A values=(
  [NAME]=$name
  [NAMESPACE]=$(json "$namespace")
  [ANNOTATIONS]=$annotations
  [MAX_RESTARTS]=$max_restarts
  [RESTARTED]="[${restarted:2}]"
  [NODES]=$nodes
  [GRACE]=$grace
  [SERVICE_ACCOUNT]=$(json "$service_account")
  [NODE_SELECTOR]="{${selector_list#, }}"
  [IMAGE]=$(json "$image")
  [COMMAND]="[${command:2}]"
  [SLICES]=$slices
  [ENVIRONMENT]=$environment
  [PRIVILEGED]=$privileged
  [LIMITS]=$limits
  [VOLUMES]=$volumes
  [MOUNTS]=$mounts
)

# From left to right, so that a value that contains a placeholder stays as it is.
render() {
  local text rendered='' key
  local -A unused=()
  text=$(<"$template")
  for key in "${!values[@]}"; do unused[$key]=1; done
  while [[ $text =~ "\${"([A-Z_]+)"}" ]]; do
    key=${BASH_REMATCH[1]}
    [ -n "${values[$key]-}" ] || refuse "$template: nothing fills the placeholder \${$key}"
    rendered+=${text%%"\${$key}"*}${values[$key]}
    text=${text#*"\${$key}"}
    unset "unused[$key]"
  done
  for key in "${!unused[@]}"; do refuse "$template: the placeholder \${$key} is missing"; done
  printf '%s\n' "$rendered$text"
}

[ -r "$template" ] || refuse "--template=$template: no such file"
manifest=$(render)
if [ -n "$dry_run" ]; then
  printf '%s\n' "$manifest"
else
  run kubectl apply -f - <<<"$manifest"
fi
