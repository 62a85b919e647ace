#!/usr/bin/env bash
# Training on a TPU VM slice: make it, install, run on all its hosts, go on after preemption, give it back.
#
#   bash launch/tpu_pod.sh [--dry-run] create            # a queued resource; spot unless SPOT=no
#   bash launch/tpu_pod.sh [--dry-run] wait              # until the slice is there
#   bash launch/tpu_pod.sh [--dry-run] setup             # copy this repository to all hosts and install it
#   bash launch/tpu_pod.sh [--dry-run] run ARGUMENT…     # msr train ARGUMENT… on all hosts, in the foreground
#   bash launch/tpu_pod.sh [--dry-run] resume ARGUMENT…  # run; whenever the slice is lost, make it anew and go on
#   bash launch/tpu_pod.sh [--dry-run] ssh COMMAND…      # on all hosts
#   bash launch/tpu_pod.sh [--dry-run] delete
#
# Set: NAME, ZONE, TYPE (such as v5litepod-64), and PROJECT if gcloud has none; VERSION of the TPU software; ATTEMPTS of resume.
# Hosts share no disk: give --config.train.checkpoints=gs://… and data and init_from folders that every host has.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=no
if [ "${1:-}" = --dry-run ]; then
  dry=yes
  shift
fi
action=${1:-help}
[ $# -eq 0 ] || shift
: "${NAME:=msr}" "${ZONE:=}" "${TYPE:=}" "${VERSION:=v2-alpha-tpuv5-lite}" "${SPOT:=yes}" "${ATTEMPTS:=20}"
place=(--zone "$ZONE")
[ -z "${PROJECT:-}" ] || place+=(--project "$PROJECT")

fail() {
  echo "tpu_pod.sh: $1" >&2
  exit 2
}

do_it() { # shows the command; runs it unless dry
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [ "$dry" = yes ] || "$@"
}

on_all() { # one line of shell
  do_it gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command "$1"
}

create() {
  local spot=()
  [ "$SPOT" != yes ] || spot=(--spot)
  do_it gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" "${place[@]}" \
    --accelerator-type "$TYPE" --runtime-version "$VERSION" "${spot[@]}"
}

delete() {
  do_it gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format 'value(state.state)'
}

await() {
  local now
  while [ "$dry" = no ]; do
    now=$(state)
    echo "$NAME is $now"
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | "") return 1 ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

setup() {
  local archive
  archive=$(mktemp --suffix .tar.gz)
  do_it git archive --format tar.gz -o "$archive" HEAD
  do_it gcloud compute tpus tpu-vm scp "$archive" "$NAME:msr.tar.gz" "${place[@]}" --worker=all
  rm -f "$archive"
  on_all "mkdir -p msr && tar -xzf msr.tar.gz -C msr && python3 -m venv msr/.venv && msr/.venv/bin/pip install -q './msr[tpu]'"
}

run() {
  local words
  words=$(printf ' %q' "$@")
  # If one host ends, its peers would wait for it: --distributed makes JAX end them.
  on_all "cd msr && .venv/bin/msr train --distributed$words"
}

resume() {
  local attempt code
  for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    code=0
    run "$@" || code=$?
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
      return "$code"
    fi
    echo "tpu_pod.sh: ended with code $code; going on (attempt $attempt of $ATTEMPTS)"
    if [ "$(state || true)" != ACTIVE ]; then # the slice was taken away: what is left of it goes first
      delete || true
      create
      await
      setup
    fi
  done
  return 1
}

case $action in
  create | wait | setup | run | resume | ssh | delete)
    [ -n "$ZONE" ] || fail "set ZONE, such as us-central1-a"
    [ -n "$TYPE" ] || fail "set TYPE, such as v5litepod-64"
    ;;&
  run | resume | ssh) [ $# -gt 0 ] || fail "$action needs arguments; see the head of this file" ;;&
  create) create ;;
  wait) await ;;
  setup) setup ;;
  run) run "$@" ;;
  resume) resume "$@" ;;
  ssh) on_all "$*" ;;
  delete) delete ;;
  *) fail "unknown action '$action'; known are create, wait, setup, run, resume, ssh, delete" ;;
esac
