#!/usr/bin/env bash
# The 8B run on TPU VMs (tpu_vm.md): a unit of systemd trains on every host, whatever becomes of this terminal.
#
#   NAME=varedit ZONE=us-east5-a BUCKET=gs://my-varedit experiments/launch/tpu_vm.sh start
#
#   start         creates the machine where there is none, installs the repository, starts the unit on all hosts
#   status        a line per host: what its unit does, its exit code, restarts, the last line of its log
#   logs [HOST]   follows the log of a host (0); from the bucket if the machine is gone
#   stop          ends the run on all hosts, saved; the machine stays
#   keep          start, and again on a new machine whenever the machine is gone, until the run is finished or failed
set -euo pipefail

CONFIG=${CONFIG:-experiments/configs/varedit_8b_512.py:v5p_256}
RUN=${RUN:-varedit_8b_512}
BUCKET=${BUCKET:?bucket of weights, data and runs, as in gs://my-varedit}
CACHE=${CACHE:-/tmp/varedit_data} # on a disk of each host, for a copy of the data
POLL=${POLL:-60}                  # seconds between two looks at the machine, and between two uploads of a log
LOGS=$BUCKET/runs/$RUN/logs

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# On a host, by the unit.

upload() {
  gcloud storage cp --quiet ~/varedit.log "$LOGS/$(hostname).log" >/dev/null 2>&1 || true
}

train() {
  cd "$here"
  while sleep "$POLL"; do upload; done & # which ends with the unit
  export JAX_COMPILATION_CACHE_DIR=$BUCKET/cache
  exec ../venv/bin/python -m experiments.train --config="$CONFIG" --workdir="$BUCKET/runs/$RUN" \
    --config.tokenizer_weights="$BUCKET/weights/bsq_14bit" --config.text_weights="$BUCKET/weights/flan_t5_xl" \
    --config.init_from="$BUCKET/weights/infinity_8b" --config.data.directory="$BUCKET/data" \
    --config.data.cache_directory="$CACHE" \
    --config.cadence.save_minutes=15
}

case ${1:-} in
train | upload) "$1" && exit ;;
esac

# On the user's machine.

NAME=${NAME:?name of the TPU, and of the request for it}
ZONE=${ZONE:?zone, as in us-east5-a}
ACCELERATOR=${ACCELERATOR:-v5p-256} # 128 chips
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}
SPOT=${SPOT---spot}        # empty: not a spot machine
MACHINES=${MACHINES:-100}  # that `keep` creates at most
UNIT='varedit@$(id -un)'   # for a shell on a host

on_hosts() { # which of them, command
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

state() {
  gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null || true
}

make_machine() {
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --quiet --force 2>/dev/null || true
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${SPOT:+"$SPOT"}
  until [[ $(state) == READY ]]; do sleep "$POLL"; done
}

set_up() {
  # The machine's own Python is 3.10.
  on_hosts all "sudo add-apt-repository -y ppa:deadsnakes/ppa >/dev/null && \
    sudo apt-get install -qq -y python3.11-venv && rm -rf varedit_jax"
  gcloud compute tpus tpu-vm scp --recurse "$here" "$NAME":varedit_jax --zone="$ZONE" --worker=all
  on_hosts all "cd varedit_jax && python3.11 -m venv ../venv && \
    ../venv/bin/pip install -q -c constraints.txt -e '.[tpu,gcs]'"
}

units() { # a line per host: "unit HOST ActiveState=... ExecMainStatus=... and so on | end of the log"
  on_hosts all "echo unit \$(hostname) \$(systemctl show $UNIT -p ActiveState -p ExecMainStatus -p NRestarts -p Result \
    -p ExecMainStartTimestampMonotonic) '|' \$(tail -n 1 varedit.log 2>/dev/null)" | grep '^unit '
}

start() {
  if [[ ! -f $here/setup.cfg ]]; then
    echo "$here is no checkout of the repository, which this script copies to the hosts; run that of a checkout" >&2
    exit 1
  fi
  if [[ $(state) != READY ]]; then
    make_machine
  elif units | grep -q ' ActiveState=\(active\|activating\) '; then
    echo "the run is under way on $NAME; see status, or stop it first" >&2
    return
  fi
  set_up
  on_hosts all "printf '%s\n' BUCKET='$BUCKET' CACHE='$CACHE' CONFIG='$CONFIG' RUN='$RUN' >varedit.env && \
    sudo cp varedit_jax/experiments/launch/varedit@.service /etc/systemd/system/ && sudo systemctl daemon-reload && \
    { sudo systemctl reset-failed $UNIT 2>/dev/null || true; } && sudo systemctl enable --now $UNIT"
}

stop() {
  on_hosts all "sudo systemctl disable --now $UNIT"
  echo "the run is stopped; the machine stays, and costs, until:" >&2
  echo "  gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force" >&2
}

logs() {
  if [[ $(state) == READY ]]; then
    on_hosts "$1" "tail -n 100 -f varedit.log"
  else
    gcloud storage cat "$LOGS/*-w-$1.log"
  fi
}

keep() {
  local machines=1 now
  start
  while true; do
    sleep "$POLL"
    if [[ $(state) != READY ]]; then
      if ((machines == MACHINES)); then
        echo "MACHINES=$MACHINES have been created, and the run is not finished" >&2
        exit 1
      fi
      machines=$((machines + 1))
      start
    elif now=$(units); then # without a network to the hosts: later
      case $now in
      *ActiveState=failed*) # one of them: the others wait for it
        echo "$now" >&2
        stop
        exit 1
        ;;
      *ActiveState=active* | *ActiveState=activating* | *ActiveState=deactivating*) ;;
      *ExecMainStartTimestampMonotonic=0*) ;; # a host that has just booted
      *ExecMainStatus=130* | *ExecMainStatus=143*)
        echo "the run was stopped" >&2
        return
        ;;
      *) # inactive, with code 0
        echo "the run is finished" >&2
        return
        ;;
      esac
    fi
  done
}

case ${1:-} in
start | stop | keep) "$1" ;;
status) echo "$NAME is $(state)" && units ;;
logs) logs "${2:-0}" ;;
*)
  echo "usage: NAME=... ZONE=... BUCKET=... $0 start|status|logs [HOST]|stop|keep" >&2
  exit 1
  ;;
esac
