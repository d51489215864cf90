#!/usr/bin/env bash
# Fills in a JobSet of this folder and sends it to the cluster that kubectl points to.
#
#   NAME=mine IMAGE=... CLAIM=runs ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 launch/gke/submit.sh tpu
#   NAME=mine IMAGE=... CLAIM=runs ACCELERATOR=nvidia-h100-80gb HOSTS=2 launch/gke/submit.sh gpu
#
#   NAME          of the run
#   IMAGE         what launch/gke/Dockerfile makes
#   CLAIM         a volume claim that all pods can write (Filestore, or a bucket); it is /runs there
#   CONFIG        a config file of the image
#   OVERRIDES     more settings, e.g. "--config.steps=1000"
#   ACCELERATOR   the nodes' label: cloud.google.com/gke-tpu-accelerator, or cloud.google.com/gke-accelerator
#   TOPOLOGY      of a slice; HOSTS is the number of its machines, CHIPS that of the chips (or GPUs) of each
#   SLICES        of that topology
#   GRACE         seconds from SIGTERM to SIGKILL, in which the step is saved
#   MAX_RESTARTS  after preemptions and lost nodes; the run goes on from its last checkpoint
set -euo pipefail

kind=${1:?which JobSet: tpu or gpu}
export NAME=${NAME:?of the run, e.g. NAME=mine}
export IMAGE=${IMAGE:?what launch/gke/Dockerfile makes}
export CLAIM=${CLAIM:?a volume claim that all pods can write, e.g. CLAIM=runs}
export CONFIG=${CONFIG:-configs/quickstart.py} OVERRIDES=${OVERRIDES:-} RUN_DIR=${RUN_DIR:-/runs/$NAME}
export ACCELERATOR=${ACCELERATOR:?label of the nodes, e.g. tpu-v5-lite-podslice or nvidia-h100-80gb}
export HOSTS=${HOSTS:?machines of a slice, or nodes} SLICES=${SLICES:-1}
export GRACE=${GRACE:-120} MAX_RESTARTS=${MAX_RESTARTS:-20}
if [ "$kind" = tpu ]; then
  export TOPOLOGY=${TOPOLOGY:?of a slice, e.g. TOPOLOGY=4x4} CHIPS=${CHIPS:-4}
else
  export CHIPS=${CHIPS:-8}
fi

fill='import os, string, sys; sys.stdout.write(string.Template(sys.stdin.read()).substitute(os.environ))'
"${PYTHON:-python3}" -c "$fill" <"$(dirname "$0")/$kind.yaml" | "${KUBECTL:-kubectl}" apply -f -
