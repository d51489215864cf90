#!/usr/bin/env bash
# Trains on TPU VMs: asks for a slice, waits for it, installs itjax on every worker and starts the run on all of them.
#
#   NAME=mine ZONE=us-central2-b TYPE=v4-32 CONFIG=configs/sft_llama31_8b.py RUN_DIR=/shared/runs/mine launch/tpu_vm/train.sh up
#   ... launch/tpu_vm/train.sh setup      copies this repository there and installs it
#   ... launch/tpu_vm/train.sh run        trains, and goes on from the last checkpoint; SIGTERM and Ctrl-C save and end it
#   ... launch/tpu_vm/train.sh stop       asks the run to save and end
#   ... launch/tpu_vm/train.sh down       gives the slice back
#   ... launch/tpu_vm/train.sh all        up, setup, run; again after every preemption, until the run is done
#
#   NAME      of the slice and of the request for it
#   ZONE      where; PROJECT too, where it is not gcloud's own
#   TYPE      accelerator type, e.g. v5litepod-16, v6e-64
#   RUNTIME   software version of the machines
#   SPOT      yes: cheaper, and can be taken away
#   CONFIG    the config file
#   RUN_DIR   on a disk that all workers see (Filestore, or a bucket mounted on each)
#   OVERRIDES more settings, e.g. "--config.steps=1000"
set -euo pipefail

NAME=${NAME:?of the slice, e.g. NAME=mine}
ZONE=${ZONE:?e.g. ZONE=us-central2-b}
RUNTIME=${RUNTIME:-tpu-ubuntu2204-base}
GCLOUD=${GCLOUD:-gcloud}
place=("--zone=$ZONE")
if [ -n "${PROJECT:-}" ]; then place+=("--project=$PROJECT"); fi

on_all() { # a line of shell, on every worker
  "$GCLOUD" compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}

state() {
  "$GCLOUD" compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)' 2>/dev/null || echo NONE
}

up() {
  local flags=()
  if [ "${SPOT:-no}" = yes ]; then flags+=(--spot); fi
  if [ "$(state)" = NONE ]; then
    "$GCLOUD" compute tpus queued-resources create "$NAME" "${place[@]}" --node-id="$NAME" \
      --accelerator-type="${TYPE:?e.g. TYPE=v5litepod-16}" --runtime-version="$RUNTIME" "${flags[@]}"
  fi
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in
      FAILED | SUSPENDED | NONE)
        echo "the request $NAME is $(state); see: $GCLOUD compute tpus queued-resources describe $NAME ${place[*]}" >&2
        return 1
        ;;
    esac
    sleep "${POLL:-30}"
  done
}

setup() {
  local folder
  folder=$(cd "$(dirname "$0")/../.." && pwd)
  "$GCLOUD" compute tpus tpu-vm scp --recurse "$folder" "$NAME:itjax" "${place[@]}" --worker=all
  on_all "python3 -m venv ~/venv && ~/venv/bin/pip install --quiet './itjax[tpu]'"
}

run() {
  local command code=0
  command="--config=$(printf '%q' "${CONFIG:?the config file}")"
  command+=" --config.run_dir=$(printf '%q' "${RUN_DIR:?a folder that all workers see}") ${OVERRIDES:-}"
  trap stop TERM INT
  # exec: the number in the file is that of the process that trains.
  on_all "cd itjax && echo \$\$ > /tmp/itjax-run && exec ~/venv/bin/python -m itjax.main $command" &
  local pid=$!
  while true; do # a signal ends the wait, and not the run
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  return "$code"
}

stop() {
  # shellcheck disable=SC2016  # expanded there
  on_all 'kill -TERM "$(cat /tmp/itjax-run)"' || true
}

down() {
  "$GCLOUD" compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

all() {
  local code tries=0
  while true; do
    if [ "$(state)" = SUSPENDED ] || [ "$(state)" = FAILED ]; then down; fi
    up
    setup
    code=0
    run || code=$?
    # 0 is done, 2 a fault in the config, 5 a loss that is not finite: another try would end alike.
    case $code in 0 | 2 | 5) return "$code" ;; esac
    tries=$((tries + 1))
    if [ "$tries" -ge "${MAX_RESTARTS:-20}" ]; then return "$code"; fi
    sleep "${POLL:-30}"
  done
}

case ${1:-} in
  up | setup | run | stop | down | all) "$1" ;;
  *)
    sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p;}' "$0" >&2
    exit 2
    ;;
esac
