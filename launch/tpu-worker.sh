#!/usr/bin/env bash
# Tested with an imitation of systemd; never run on a real TPU VM.
#
# What tpu-pod.sh does on each worker of a TPU VM, in the project's folder: launch/tpu-worker.sh setup | start TOKEN FLAG... | status | stop
# The run is a service of the user's systemd, so it outlives the connection. systemd restarts it after a loss; the workers find each other
# again, and the run resumes from its checkpoint. Log: run.log.
#
# Environment:
#   MODULE    module to run (default: discover_jax.main)
#   RESTARTS  maximum number of restarts after lost workers, per day (default: 20)
set -euo pipefail

unit=discover_jax
cd "$(dirname "${BASH_SOURCE[0]}")/.."
XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/run/user/$(id -u)} # not set in every ssh session
export XDG_RUNTIME_DIR

case "${1:-}" in
  setup)
    if systemctl --user --quiet is-active "$unit"; then
      echo "launch/tpu-worker.sh: a run is active on this worker. End it first: launch/tpu-pod.sh stop NAME ZONE" >&2
      exit 2
    fi
    # The TPU images have Python 3.10. uv installs its own Python 3.11 in the home folder.
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --clear --seed --python 3.11 .venv
    python3 -m uv pip install --quiet --python .venv -c constraints/py311.txt -e '.[tpu]'
    sudo loginctl enable-linger "$USER" # keeps the user's services after the logout
    .venv/bin/python -c 'import jax, discover_jax; print("installed: jax", jax.__version__)'
    ;;
  start)
    token=${2:?"usage: launch/tpu-worker.sh start TOKEN FLAG..."}
    shift 2
    if [ ! -x .venv/bin/python ]; then # otherwise the service would restart in vain
      echo "launch/tpu-worker.sh: this worker has no environment. Run launch/tpu-pod.sh setup NAME ZONE, and look for its errors." >&2
      exit 2
    fi
    # gcloud repeats a command when its connection breaks. The first one may have succeeded.
    if [ "$(cat .run-token 2> /dev/null)" = "$token" ] && systemctl --user --quiet is-active "$unit"; then exit 0; fi
    systemctl --user stop "$unit" 2> /dev/null || true # an old process would hold the TPU and the lock of the run directory
    systemctl --user reset-failed "$unit" 2> /dev/null || true
    echo "$token" > .run-token
    printf '#!/usr/bin/env bash\nexport PYTHON=%q MODULE=%q\nexec launch/entrypoint.sh --distributed %s\n' \
      "$PWD/.venv/bin/python" "${MODULE:-discover_jax.main}" "$(printf '%q ' "$@")" > .run-command
    mkdir -p "$HOME/.config/systemd/user"
    # Codes 1 and 2 (an unexpected error; something that you must change) and 130 (interrupted) are final. Delegate: control groups for the
    # memory of programs.
    cat > "$HOME/.config/systemd/user/$unit.service" << UNIT
[Unit]
Description=discover_jax
StartLimitIntervalSec=1d
StartLimitBurst=$((${RESTARTS:-20} + 1))

[Service]
WorkingDirectory=$PWD
ExecStart=/bin/bash $PWD/.run-command
Restart=on-failure
RestartSec=30
RestartPreventExitStatus=1 2 130
Delegate=yes
StandardOutput=append:$PWD/run.log
StandardError=append:$PWD/run.log
UNIT
    echo "=== $(date --iso-8601=seconds) start $token" >> run.log
    systemctl --user daemon-reload
    systemctl --user start "$unit"
    ;;
  status)
    systemctl --user show --property=ActiveState,SubState,Result,ExecMainStatus,NRestarts "$unit" | tr '\n' ' '
    echo
    tail -n "${LINES_OF_LOG:-5}" run.log 2> /dev/null || true
    ;;
  stop)
    systemctl --user stop "$unit" 2> /dev/null || true
    ;;
  *)
    echo "usage: launch/tpu-worker.sh setup | start TOKEN FLAG... | status | stop" >&2
    exit 2
    ;;
esac
