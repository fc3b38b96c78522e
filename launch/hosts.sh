#!/usr/bin/env bash
# Tested with an imitation of ssh, and with real processes on one host; never run on several hosts.
#
# Starts one process on each listed host, over ssh:
#   launch/hosts.sh HOST[,HOST...] --config=configs/spaceship.py:run3 --config.mesh.data=2 --config.mesh.expert=8 ... --workdir=SHARED_FOLDER
#
# The first host leads: its output appears here; the others' goes to LOGS. The project and its environment must be at the same path on all
# hosts, and --workdir must be a shared folder. Each process runs the preflight first (entrypoint.sh). A host may be listed twice, for tests;
# `localhost` needs no ssh. Keep this script running (tmux, nohup): the processes end with it.
# Open MPI needs no list: mpirun --host=a,b --map-by ppr:1:node launch/entrypoint.sh --distributed ... (one process per host; set
# JAX_LOCAL_DEVICE_IDS=0,1,... to all GPUs of a host, since jax takes one per process there by default).
#
# Environment:
#   COORDINATOR  HOST:PORT at which the others reach the first host (default: its name in the list without USER@, port 47101)
#   MODULE       module to run (default: discover_jax.main; discover_jax.search for the baseline)
#   PYTHON       interpreter, at the same path on all hosts (default: python)
#   PREFLIGHT    0: skip the preflight
#   LOGS         folder for the other hosts' output (default: launch-logs)
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: launch/hosts.sh HOST[,HOST...] --config=FILE [--config.NAME=VALUE ...] --workdir=SHARED_FOLDER" >&2
  exit 2
fi
IFS=',' read -r -a hosts <<< "$1"
shift
coordinator=${COORDINATOR:-${hosts[0]#*@}:47101} # without the user's name, which is only for ssh
entrypoint=$(realpath "$(dirname "${BASH_SOURCE[0]}")")/entrypoint.sh
settings=("MODULE=${MODULE:-discover_jax.main}" "PYTHON=${PYTHON:-python}" "PREFLIGHT=${PREFLIGHT:-1}")
logs=${LOGS:-launch-logs}
mkdir -p "$logs"

processes=()
for id in "${!hosts[@]}"; do
  command=(env "${settings[@]}" "$entrypoint" "$@" "--coordinator=$coordinator" "--num_processes=${#hosts[@]}" "--process_id=$id")
  if [ "${hosts[$id]}" != localhost ]; then
    # -tt: the remote command ends when this script does. ServerAlive: a host that is gone ends ssh after a minute. The command is quoted
    # again for the remote shell.
    command=(ssh -tt -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 "${hosts[$id]}"
      "cd $(printf '%q' "$PWD") && exec $(printf '%q ' "${command[@]}")")
  fi
  if [ "$id" = 0 ]; then
    "${command[@]}" < /dev/null &
  else
    "${command[@]}" < /dev/null > "$logs/process-$id.txt" 2>&1 &
  fi
  processes+=($!)
done
trap 'kill "${processes[@]}" 2> /dev/null || true' INT TERM

# A process that fails ends the others, with a message, so nothing needs to be killed here. The script returns 2 (something that you must
# change) if any process does, otherwise the first nonzero code.
code=0
for id in "${!processes[@]}"; do
  last=0
  wait "${processes[$id]}" || last=$?
  if [ "$last" != 0 ]; then
    where="above"
    [ "$id" = 0 ] || where="in $logs/process-$id.txt"
    echo "launch/hosts.sh: process $id (${hosts[$id]}) ended with code $last; its messages are $where" >&2
  fi
  if [ "$last" = 2 ] || [ "$code" = 0 ]; then code=$last; fi
done
if [ "$code" = 3 ]; then echo "launch/hosts.sh: a process was lost. The same command resumes the run from its checkpoint." >&2; fi
exit "$code"
