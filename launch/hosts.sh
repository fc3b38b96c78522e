#!/usr/bin/env bash
# Starts one process on each listed host, over ssh: launch/hosts.sh HOST[,HOST...] --config=configs/spaceship.py:run3 --config.mesh.expert=16 ...
#
# The first host leads: its output appears here; the others' goes to LOGS. The project and its environment must be at the same path on all
# hosts, and --workdir must be a shared folder. A host may be listed twice, for tests; `localhost` needs no ssh.
# Open MPI needs no list: mpirun --host=a,b --map-by ppr:1:node python -m discover_jax.main --distributed ... (one process per host; set
# JAX_LOCAL_DEVICE_IDS=0,1,... to all GPUs of a host, since jax takes one per process there by default).
#
# Environment:
#   COORDINATOR  HOST:PORT at which the others reach the first host (default: its name in the list, port 47101)
#   MODULE       module to run (default: discover_jax.main; discover_jax.search for the baseline)
#   PYTHON       interpreter, at the same path on all hosts (default: python)
#   LOGS         folder for the other hosts' output (default: launch-logs)
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: launch/hosts.sh HOST[,HOST...] --config=FILE [--config.NAME=VALUE ...] --workdir=SHARED_FOLDER" >&2
  exit 2
fi
IFS=',' read -r -a hosts <<< "$1"
shift
coordinator=${COORDINATOR:-${hosts[0]}:47101}
module=${MODULE:-discover_jax.main}
python=${PYTHON:-python}
logs=${LOGS:-launch-logs}
mkdir -p "$logs"

processes=()
for id in "${!hosts[@]}"; do
  command=("$python" -m "$module" "$@" "--coordinator=$coordinator" "--num_processes=${#hosts[@]}" "--process_id=$id")
  if [ "${hosts[$id]}" != localhost ]; then
    # -tt: the remote command ends when this script does. The command is quoted again for the remote shell.
    command=(ssh -tt -o BatchMode=yes "${hosts[$id]}" "cd $(printf '%q' "$PWD") && exec $(printf '%q ' "${command[@]}")")
  fi
  if [ "$id" = 0 ]; then
    "${command[@]}" < /dev/null &
  else
    "${command[@]}" < /dev/null > "$logs/process-$id.txt" 2>&1 &
  fi
  processes+=($!)
done
trap 'kill "${processes[@]}" 2> /dev/null || true' INT TERM

# A process that fails ends the others, with a message, so nothing needs to be killed here. The script returns the first nonzero code.
code=0
for process in "${processes[@]}"; do
  wait "$process" || { last=$?; [ "$code" != 0 ] || code=$last; }
done
exit "$code"
