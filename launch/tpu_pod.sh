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
# Set: NAME, ZONE, TYPE (such as v5litepod-64), and PROJECT if gcloud has none; VERSION of the TPU software (default: by TYPE);
# ATTEMPTS of resume.
# Hosts share no disk, and a slice that is made anew has an empty one: give --config.train.checkpoints=gs://…, and data and init_from
# folders that every host has (a mounted disk or bucket).
set -euo pipefail
cd "$(dirname "$0")/.."

dry=no
if [ "${1:-}" = --dry-run ]; then
  dry=yes
  shift
fi
action=${1:-help}
[ $# -eq 0 ] || shift
: "${NAME:=msr}" "${ZONE:=}" "${TYPE:=}" "${SPOT:=yes}" "${ATTEMPTS:=20}"
if [ -z "${VERSION:-}" ]; then
  case $TYPE in
    v5p-*) VERSION=v2-alpha-tpuv5 ;;
    v6e-*) VERSION=v2-alpha-tpuv6e ;;
    v5*) VERSION=v2-alpha-tpuv5-lite ;;
    *) VERSION=tpu-ubuntu2204-base ;;
  esac
fi
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
    --accelerator-type "$TYPE" --runtime-version "$VERSION" ${spot[@]+"${spot[@]}"}
}

delete() {
  do_it gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
}

pause() {
  sleep "${POLL_SECONDS:-30}"
}

state() { # of the request, such as ACTIVE; GONE where there is none; fails where gcloud does not answer
  local try told
  for try in 1 2 3; do
    told=$(mktemp)
    if gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format 'value(state.state)' 2>"$told"; then
      rm -f "$told"
      return 0
    fi
    if grep -q NOT_FOUND "$told"; then
      rm -f "$told"
      echo GONE
      return 0
    fi
    cat "$told" >&2
    rm -f "$told"
    [ "$try" = 3 ] || pause
  done
  return 1
}

await() {
  local now unknown=0
  while [ "$dry" = no ]; do
    now=$(state) || now=unknown
    echo "$NAME is $now"
    case $now in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | GONE) return 1 ;;
      unknown | "") unknown=$((unknown + 1)) && [ "$unknown" -lt 10 ] || return 1 ;;
      *) unknown=0 ;;
    esac
    pause
  done
}

setup() {
  local archive code=0
  archive=$(mktemp)
  do_it git archive --format tar.gz -o "$archive" HEAD &&
    do_it gcloud compute tpus tpu-vm scp "$archive" "$NAME:msr.tar.gz" "${place[@]}" --worker=all &&
    on_all "mkdir -p msr && tar -xzf msr.tar.gz -C msr && bash msr/launch/tpu_host.sh" || code=$?
  rm -f "$archive"
  return "$code"
}

run() {
  local words
  words=$(printf ' %q' "$@")
  # If one host ends, its peers would wait for it: --distributed makes JAX end them.
  on_all "cd msr && .venv/bin/msr train --distributed$words"
}

restore() { # the slice, ready to run; fails where that did not work this time
  local now
  now=$(state) || now=unknown
  case $now in
    unknown | "" | SUSPENDING | DELETING) return 1 ;; # nothing is deleted that may be well, or is being deleted
    ACTIVE) ;;
    ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING) await || return ;;
    GONE) { create && await; } || return ;;
    *) # taken away: what is left of it goes first
      delete || true
      { create && await; } || return
      ;;
  esac
  setup
}

resume() {
  local attempt code is_ready=yes
  for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    if [ "$is_ready" = no ] && ! restore; then
      echo "tpu_pod.sh: $NAME is not back yet (attempt $attempt of $ATTEMPTS)"
      pause
      continue
    fi
    is_ready=yes code=0
    run "$@" || code=$?
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
      return "$code"
    fi
    echo "tpu_pod.sh: ended with code $code; going on (attempt $attempt of $ATTEMPTS)"
    pause # a slice that was taken away is called active for a while
    [ "$(state || true)" = ACTIVE ] || is_ready=no
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
