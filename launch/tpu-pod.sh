#!/usr/bin/env bash
# A TPU pod, through gcloud: launch/tpu-pod.sh NAME ZONE --config=configs/spaceship.py:run3 --config.mesh.expert=16 --workdir=...
#
# Runs the command on all workers of the TPU VM at once; jax finds the process ids itself. The project must be in FOLDER on each worker
# (gcloud compute tpus tpu-vm scp --recurse --worker=all), with its environment in .venv there: make install EXTRAS=tpu. --workdir and
# model.weights must be on a file system that all workers share (Filestore, or, for the weights, a disk attached read-only to all).
# The product of config.mesh.data, .expert and .tensor must be the number of chips (cores on v3 and before, and on 7x).
#
# Environment:
#   FOLDER   of the project on each worker (default: discover_jax in the home folder)
#   MODULE   module to run (default: discover_jax.main)
#   RESTARTS maximum number of restarts after the loss of a worker (default: 20); the run resumes from its checkpoint
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: launch/tpu-pod.sh NAME ZONE --config=FILE [--config.NAME=VALUE ...] --workdir=SHARED_FOLDER" >&2
  exit 2
fi
name=$1
zone=$2
shift 2
command="cd ${FOLDER:-discover_jax} && exec .venv/bin/python -m ${MODULE:-discover_jax.main} $(printf '%q ' "$@") --distributed"

for ((start = 0; start <= ${RESTARTS:-20}; start++)); do
  code=0
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command" || code=$?
  # Restart only after a lost worker: 3, jax's own abort (134), a kill (137), or a broken connection (255).
  case "$code" in
    3 | 134 | 137 | 255) echo "launch/tpu-pod.sh: a worker was lost (code $code); restarting in 30 s" >&2 ;;
    *) exit "$code" ;;
  esac
  sleep 30
done
exit "$code"
