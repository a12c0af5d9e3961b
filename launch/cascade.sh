#!/usr/bin/env bash
# Trains all stages of a cascade at the same time; they are independent of each other.
#   launch/cascade.sh --config=FILE --stages=NAME,NAME,... --workdir=DIR [--launcher=local]
#       [--logs=DIR] [options] [--config.a.b=value ...]
# Each stage trains with --config=FILE:NAME --workdir=DIR/NAME, writes to DIR/NAME.log (--logs: to
# another folder) and is reported when it ends. The exit status is the first that is not 0, or 0.
# SIGTERM and SIGINT are passed on.
#   --launcher=local   on this machine, restarted by launch/keep_running.sh
#              --gpus=0,1,...  the GPU of each stage, in order
#   --launcher=tpu_vm|slurm|xpk|gke   launch/tpu_vm.sh resume, launch/slurm.sh, launch/xpk.sh or
#              launch/gke_jobset.sh with --name=PREFIX-NAME (--name=PREFIX, imagen) and all
#              further options; these stages continue after their launchers end
#   --dry_run
set -euo pipefail
config='' stages='' workdir='' launcher=local logs='' gpus='' name=imagen
here=$(dirname "$0")
# shellcheck source=lib.sh
source "$here/lib.sh"
parse "config= stages= workdir= launcher= logs= gpus= name= *" "$@"
need config configs/shapes.py
need stages base,sr
need workdir runs/cascade
case $launcher in
  local)
    [ ${#words[@]} -eq 0 ] || refuse "${words[0]} is not an option of --launcher=local; see --help"
    ;;
  tpu_vm) script=("$here/tpu_vm.sh" resume) ;;
  slurm) script=("$here/slurm.sh") ;;
  xpk) script=("$here/xpk.sh") ;;
  gke) script=("$here/gke_jobset.sh") ;;
  *) refuse "--launcher=$launcher must be local, tpu_vm, slurm, xpk or gke" ;;
esac
[ -n "$logs" ] || [[ $workdir == *://* ]] || logs=$workdir
need logs runs/logs # when the working folder is a bucket
IFS=, read -ra names <<<"$stages"
IFS=, read -ra gpu_of <<<"$gpus"
[ -z "$gpus" ] || [ "$launcher" = local ] || refuse "--gpus is for --launcher=local"
[ -z "$gpus" ] || [ ${#gpu_of[@]} -eq ${#names[@]} ] ||
  refuse "--gpus=$gpus must name ${#names[@]} GPUs, one for each of --stages=$stages"

command_of() { # sets `command`
  local stage=${names[$1]} config=$config:${names[$1]} workdir=$workdir/${names[$1]}
  if [ "$launcher" = local ]; then
    train_line "$(default_python)"
    command=(bash "$here/keep_running.sh" "${train[@]}")
    [ -z "$gpus" ] || command=(env "CUDA_VISIBLE_DEVICES=${gpu_of[$1]}" "${command[@]}")
  else
    command=(bash "${script[@]}" "--name=$name-${stage//_/-}" "--config=$config"
      "--workdir=$workdir" "${words[@]}" "${overrides[@]}")
  fi
}

first=0
# shellcheck disable=SC2329 # each_end calls it
ended() {
  printf '%s: exit status %s (%s)\n' "${names[$1]}" "$2" "$logs/${names[$1]}.log"
  [ "$first" -ne 0 ] || first=$2
}

run mkdir -p "$logs"
forward_signals
pids=()
for index in "${!names[@]}"; do
  command_of "$index"
  log=$logs/${names[index]}.log
  if [ -n "$dry_run" ]; then
    printf '%s >>%s 2>&1 &\n' "$(quote "${command[@]}")" "$(quote "$log")"
  elif [ -z "$signalled" ]; then
    printf '%s: $ %s\n' "${names[index]}" "$(quote "${command[@]}")"
    start "${command[@]}" >>"$log" 2>&1
    pids+=($!)
  fi
done
if [ -n "$dry_run" ]; then
  echo wait
  exit
fi
each_end ended "${pids[@]}"
exit "$first"
