#!/usr/bin/env bash
# Tested in an imitation of a pod; never run on a real cluster.
#
# One process of a run: launch/entrypoint.sh --config=configs/spaceship.py:run3 ... --workdir=SHARED_FOLDER
# First the preflight (python -m discover_jax.doctor) with the flags of the run, then the run. With --coordinator or --distributed, the
# preflight checks all hosts together. If it fails, the run does not start, and the exit code is the preflight's. The images and all scripts
# of this folder use this file.
#
# Environment:
#   FRESH_PROC     1: mount a new /proc first. A container masks parts of /proc, and then no sandbox starts in it. The container needs
#                  CAP_SYS_ADMIN and CAP_SYS_PTRACE, and no seccomp or AppArmor profile (docs/security.md)
#   LOCKED_MEMORY  KiB of memory that the TPU's driver may lock; GKE demands more than a container has. Needs CAP_SYS_RESOURCE
#   NCCL_SETUP     shell file with the settings of the network, sourced first (GKE: gke-a3-mega.yaml, gke-a3-ultra.yaml)
#   RAY_HEAD       HOST:PORT of a ray cluster's head. Process 0 joins the cluster and runs no programs itself (gke-programs.yaml)
#   PREFLIGHT      0: skip the preflight
#   MODULE         module to run (default: discover_jax.main; discover_jax.search for the baseline)
#   PYTHON         interpreter (default: python)
set -euo pipefail

python=${PYTHON:-python}

if [ "${FRESH_PROC:-0}" = 1 ]; then
  mount -t proc proc /proc || {
    echo "launch/entrypoint.sh: FRESH_PROC=1, but this container may not mount /proc. Give it CAP_SYS_ADMIN and CAP_SYS_PTRACE and run it" \
      "without a seccomp or AppArmor profile (docs/security.md, Sandbox in a pod), or run programs on other pods: --config.execution.backend=ray." >&2
    exit 2
  }
fi

if [ -n "${LOCKED_MEMORY:-}" ]; then
  ulimit -l "$LOCKED_MEMORY" || {
    echo "launch/entrypoint.sh: LOCKED_MEMORY=$LOCKED_MEMORY, but this container may not raise the limit. Give it the capability" \
      "SYS_RESOURCE." >&2
    exit 2
  }
fi

if [ -n "${NCCL_SETUP:-}" ]; then
  if [ ! -r "$NCCL_SETUP" ]; then
    echo "launch/entrypoint.sh: NCCL_SETUP=$NCCL_SETUP cannot be read. The installer of the network's plugin has not run on this node:" \
      "see the top of the manifest. Without the plugin, nodes exchange data over plain TCP, which is about 80 times slower." >&2
    exit 2
  fi
  set +eu # the vendor's file is not written for them
  # shellcheck disable=SC1090 # a file of the vendor
  source "$NCCL_SETUP"
  set -eu
fi

# JOB_COMPLETION_INDEX: of this pod, set by Kubernetes. Only process 0 sends programs to the cluster.
if [ -n "${RAY_HEAD:-}" ] && [ "${JOB_COMPLETION_INDEX:-0}" = 0 ]; then
  ray start --address="$RAY_HEAD" --num-cpus=0 --object-store-memory=1000000000 --disable-usage-stats || {
    echo "launch/entrypoint.sh: this pod cannot join the ray cluster at $RAY_HEAD. Start launch/gke-programs.yaml first; its pods must be" \
      "ready, have this image, and use the same token." >&2
    exit 3
  }
fi

if [ "${PREFLIGHT:-1}" = 1 ]; then
  "$python" -m discover_jax.doctor "$@"
fi
exec "$python" -m "${MODULE:-discover_jax.main}" "$@"
