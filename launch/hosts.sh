#!/usr/bin/env bash
# One process on each host of a list, over ssh: launch/hosts.sh HOST[,HOST...] --config=configs/spaceship.py:run3 --config.mesh.expert=16 ...
#
# The first host leads: its output is shown here, that of the others goes to LOGS. The project and its environment lie at the same path on
# all hosts, as does --workdir, which they share. A host may be named twice (for trying things out); `localhost` needs no ssh.
# Under Open MPI no list is needed: mpirun --host=a,b --map-by ppr:1:node python -m discover_jax.main --distributed ... (one process a host;
# set JAX_LOCAL_DEVICE_IDS=0,1,... to all GPUs of a host, of which jax takes one a process by default there).
#
# Environment:
#   COORDINATOR  HOST:PORT of the first host as the others reach it (its name in the list, port 47101)
#   MODULE       what to run (discover_jax.main; discover_jax.search for the baseline)
#   PYTHON       interpreter, a path that holds on all hosts (python)
#   LOGS         folder of the other hosts' output (launch-logs)
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
    # -tt: what runs there ends when this script does. The command is quoted once more for the other host's shell.
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

# Whoever fails ends the others, with a message, so that nothing is left to be ended here. The first code that is not 0 is this script's.
code=0
for process in "${processes[@]}"; do
  wait "$process" || { last=$?; [ "$code" != 0 ] || code=$last; }
done
exit "$code"
