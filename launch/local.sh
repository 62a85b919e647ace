#!/usr/bin/env bash
# One run of several processes on this machine, on CPUs or with one process per GPU.
#
#   bash launch/local.sh [-n PROCESSES] [--restarts N] [--gpus] [--dry-run] -- train --config … --workdir … [--config.a.b=v …]
#   bash launch/local.sh [-n PROCESSES] … -- separate SONG … -o DIR …
#
# If a process ends otherwise than well, the others are ended and all are started again, at most N times (default 3); they go
# on from the last checkpoint. Exit code 2, bad input, is final. SIGTERM and Ctrl-C are passed on: the run saves and stops.
# Processes that separate share the songs and need not each other: those that are left go on, and code 1, bad songs, is final.
# $MSR is the command that is run (default: msr).
set -euo pipefail

processes=2 restarts=3 gpus=no dry=no
while [ $# -gt 0 ]; do
  case $1 in
    -n) processes=${2:-} && shift $(($# > 1 ? 2 : 1)) ;;
    --restarts) restarts=${2:-} && shift $(($# > 1 ? 2 : 1)) ;;
    --gpus) gpus=yes && shift ;;
    --dry-run) dry=yes && shift ;;
    -h | --help) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --) shift && break ;;
    *) echo "local.sh: unknown option '$1'; the command for msr follows --" >&2 && exit 2 ;;
  esac
done
if [ $# -eq 0 ]; then
  echo "local.sh: nothing to run; write the command after --, such as: -- train --config … --workdir …" >&2
  exit 2
fi
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "local.sh: -n is followed by a number of processes, not '$processes'" >&2 && exit 2; }
[[ $restarts =~ ^[0-9]+$ ]] || { echo "local.sh: --restarts is followed by a number, not '$restarts'" >&2 && exit 2; }
read -ra msr <<< "${MSR:-msr}"

# GPUs that are to be used: all, or those that the variable names.
IFS=, read -ra given <<< "${CUDA_VISIBLE_DEVICES:-}"
if [ "$gpus" = yes ] && [ "${#given[@]}" -gt 0 ] && [ "${#given[@]}" -lt "$processes" ]; then
  echo "local.sh: CUDA_VISIBLE_DEVICES names ${#given[@]} GPUs, fewer than the $processes processes of -n" >&2
  exit 2
fi

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

command_of() { # process, port
  printf '%q ' "${msr[@]}" "${@:3}" --coordinator "127.0.0.1:$2" --processes "$processes"
  printf '%s %s\n' --process "$1"
}

pids=() asked=no
pass_on() {
  asked=yes
  kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap pass_on TERM INT

end_all() { # to be called when one is gone: the others wait for it in vain
  kill -KILL "${pids[@]}" 2>/dev/null || true
  wait "${pids[@]}" 2>/dev/null || true
}

run_once() {
  local port k code
  port=$(free_port) || return 2
  pids=()
  for ((k = 0; k < processes; k++)); do
    [ "$asked" = no ] || break # a signal that came before there was anybody to pass it on to
    if [ "$gpus" = yes ]; then
      CUDA_VISIBLE_DEVICES=${given[k]:-$k} "${msr[@]}" "$@" --coordinator "127.0.0.1:$port" --processes "$processes" --process "$k" &
    else
      "${msr[@]}" "$@" --coordinator "127.0.0.1:$port" --processes "$processes" --process "$k" &
    fi
    pids+=($!)
  done
  [ "${#pids[@]}" -gt 0 ] || return 143
  [ "$asked" = no ] || { pass_on && asked=passed; }
  local left=${#pids[@]} last=0
  while [ "$left" -gt 0 ]; do
    code=0
    wait -n || code=$?
    if [ "$asked" = yes ] && [ "$code" -gt 128 ]; then # the trap interrupted the wait
      asked=passed
      continue
    fi
    left=$((left - 1))
    if [ "$1" = separate ] && [ "$code" -ne 2 ]; then # each has songs of its own
      [ "$code" -lt "$last" ] || last=$code
      continue
    fi
    if [ "$code" -ne 0 ] && [ "$code" -ne 75 ]; then
      sleep 1 # a sentence that all of them have to say gets said
      end_all
      return "$code"
    fi
    last=$code
  done
  return "$last"
}

if [ "$dry" = yes ]; then
  for ((k = 0; k < processes; k++)); do
    [ "$gpus" = no ] || printf 'CUDA_VISIBLE_DEVICES=%s ' "${given[k]:-$k}"
    command_of "$k" PORT "$@"
  done
  exit 0
fi

attempt=0
while true; do
  code=0
  run_once "$@" || code=$?
  if [ "$code" -eq 1 ] && [ "$1" = separate ]; then
    exit 1
  fi
  if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ "$asked" != no ] || [ "$attempt" -ge "$restarts" ]; then
    exit "$code"
  fi
  attempt=$((attempt + 1))
  echo "local.sh: a process ended with code $code; starting again ($attempt of $restarts)" >&2
done
