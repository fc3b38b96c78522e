#!/usr/bin/env bash
# Tested with an imitation of gcloud; never run on a real TPU.
#
# A TPU slice of TPU VMs, through gcloud, from the repository's folder:
#   launch/tpu-pod.sh create NAME ZONE v5p-16   request the slice as a queued resource (more gcloud flags may follow: --spot, --reserved)
#   launch/tpu-pod.sh setup  NAME ZONE          copy the committed files of the repository to all workers, and install Python 3.11 and packages
#   launch/tpu-pod.sh run    NAME ZONE --config=configs/spaceship.py:run3 --config.mesh.expert=8 ... --workdir=SHARED_FOLDER
#   launch/tpu-pod.sh status NAME ZONE          state of the queued resource and of each worker, with the last lines of its log
#   launch/tpu-pod.sh stop   NAME ZONE          end the run on all workers; `run` resumes it
#   launch/tpu-pod.sh delete NAME ZONE          give the slice back
#
# `run` starts a service on each worker (tpu-worker.sh) and returns. The service begins with the preflight, and restarts after a loss.
# --workdir, the data and the weights must be on a file system that all workers mount at the same path (Filestore; for the weights, also a
# disk attached read-only to all). The product of config.mesh.data, .expert and .tensor must be the number of chips.
# Before: gcloud auth login; ssh-add ~/.ssh/google_compute_engine (gcloud connects to all workers at once).
#
# Environment:
#   FOLDER    of the project on each worker (default: discover_jax, in the home folder)
#   RUNTIME   software version of `create` (default: that of the TPU's kind)
#   IAP       1: connect through Identity-Aware Proxy, for workers without external addresses (needs gcloud's alpha component)
#   MODULE, RESTARTS  see tpu-worker.sh
set -euo pipefail

usage() {
  echo "usage: launch/tpu-pod.sh create NAME ZONE TYPE | setup NAME ZONE | run NAME ZONE --config=FILE ... --workdir=SHARED_FOLDER |" \
    "status NAME ZONE | stop NAME ZONE | delete NAME ZONE" >&2
  exit 2
}
[ $# -ge 3 ] || usage
verb=$1
name=$2
zone=$3
shift 3
folder=${FOLDER:-discover_jax}

tpu_vm=(gcloud compute tpus tpu-vm)
tunnel=()
if [ "${IAP:-0}" = 1 ]; then
  tpu_vm=(gcloud alpha compute tpus tpu-vm)
  tunnel=(--tunnel-through-iap)
fi
queued=(gcloud compute tpus queued-resources)

on_workers() { # VERB ARGUMENT...: tpu-worker.sh on all workers
  local settings=() code=2
  if [ "$1" = status ]; then code=0; fi
  [ -z "${MODULE:-}" ] || settings+=("MODULE=$MODULE")
  [ -z "${RESTARTS:-}" ] || settings+=("RESTARTS=$RESTARTS")
  "${tpu_vm[@]}" ssh "$name" --zone="$zone" --worker=all "${tunnel[@]}" \
    --command="[ -e $(printf '%q' "$folder/launch/tpu-worker.sh") ] || {
      echo 'launch/tpu-pod.sh: this worker is not set up. Run launch/tpu-pod.sh setup first.' >&2; exit $code; }
      cd $(printf '%q' "$folder") && $(printf '%q ' env "${settings[@]}" launch/tpu-worker.sh "$@")"
}

case "$verb" in
  create)
    type=${1:?"usage: launch/tpu-pod.sh create NAME ZONE TYPE, such as v5p-16 or v6e-16"}
    shift
    case "$type" in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      *) runtime=tpu-ubuntu2204-base ;;
    esac
    "${queued[@]}" create "$name" --node-id="$name" --zone="$zone" --accelerator-type="$type" --runtime-version="${RUNTIME:-$runtime}" "$@"
    echo "launch/tpu-pod.sh: requested. When launch/tpu-pod.sh status $name $zone says ACTIVE, continue with setup."
    ;;
  setup)
    archive=$(mktemp -d)
    trap 'rm -rf "$archive"' EXIT
    git archive --format=tar.gz --output="$archive/discover_jax.tar.gz" HEAD
    "${tpu_vm[@]}" scp "$archive/discover_jax.tar.gz" "$name:" --zone="$zone" --worker=all "${tunnel[@]}"
    "${tpu_vm[@]}" ssh "$name" --zone="$zone" --worker=all "${tunnel[@]}" \
      --command="mkdir -p $(printf '%q' "$folder") && tar -xzf discover_jax.tar.gz -C $(printf '%q' "$folder")"
    on_workers setup
    ;;
  run)
    [ $# -ge 1 ] || usage
    on_workers start "run-$(date +%s)-$$" "$@"
    echo "launch/tpu-pod.sh: started on all workers. launch/tpu-pod.sh status $name $zone shows the preflight and the run."
    ;;
  status)
    state=$("${queued[@]}" describe "$name" --zone="$zone" --format='value(state.state)')
    echo "$state"
    if [ "$state" = ACTIVE ]; then on_workers status; fi # before that, there are no workers
    ;;
  stop) on_workers stop ;;
  delete) "${queued[@]}" delete "$name" --zone="$zone" --force ;;
  *) usage ;;
esac
