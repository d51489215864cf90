#!/usr/bin/env bash
# Trains on hosts that plain ssh reaches, one process a host; the first one is where the others find each other.
#
#   HOSTS="node1 node2" RUN_DIR=/shared/runs/mine launch/ssh/train.sh --config=configs/quickstart.py
#
#   HOSTS    names that ssh knows, separated by spaces
#   RUN_DIR  on a disk that all hosts see; the run goes on from what it holds
#   FOLDER   where this repository lies on each host (default: the same path as here)
#   PYTHON   the interpreter there that itjax is installed for
#   ADDRESS  of the first host, as the others reach it (default: its name)
#   PORT     of the first host
#
# SIGTERM and Ctrl-C go to every host: the run saves the step that it is at and ends with 143.
set -euo pipefail

read -r -a hosts <<<"${HOSTS:?names that ssh knows, e.g. HOSTS=\"node1 node2\"}"
RUN_DIR=${RUN_DIR:?a folder that all hosts see, e.g. RUN_DIR=/shared/runs/mine}
FOLDER=${FOLDER:-$PWD}
PYTHON=${PYTHON:-python}
address=${ADDRESS:-${hosts[0]}}:${PORT:-8476}
name=itjax-$(date +%s)-$$ # of the file on each host that holds the number of the process there
SSH=${SSH:-ssh}

arguments=$(printf '%q ' "$@" "--config.run_dir=$RUN_DIR")
read -r -a shell <<<"$SSH"

on() { # a line of shell, on a host
  "${shell[@]}" -o BatchMode=yes "$1" "$2"
}

pids=()
for number in "${!hosts[@]}"; do
  # exec keeps the number of the shell, which is the one that gets the signal.
  on "${hosts[$number]}" "cd $(printf '%q' "$FOLDER") && echo \$\$ > /tmp/$name-$number && \
    JAX_COORDINATOR_ADDRESS=$address JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$number \
    exec $(printf '%q' "$PYTHON") -m itjax.main $arguments" </dev/null &
  pids+=($!)
done

stop() {
  for number in "${!hosts[@]}"; do
    # shellcheck disable=SC2016  # expanded there
    on "${hosts[$number]}" 'kill -TERM "$(cat /tmp/'"$name-$number"')"' </dev/null || true
  done
}
trap stop TERM INT

finished() { # waits for a process, also when a signal ends the wait
  local code
  while true; do
    code=0
    wait "$1" || code=$?
    kill -0 "$1" 2>/dev/null || return "$code"
  done
}

first=0
for pid in "${pids[@]}"; do
  code=0
  finished "$pid" || code=$?
  if [ "$first" = 0 ]; then first=$code; fi
done
for number in "${!hosts[@]}"; do
  on "${hosts[$number]}" "rm -f /tmp/$name-$number" </dev/null || true
done
exit "$first"
