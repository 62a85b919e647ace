# shellcheck shell=bash
# Sourced by setup.sh and tpu_host.sh: which Python there is that is new enough. MSR_PYTHON names one to begin with.
find_python() {
  for candidate in ${MSR_PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer is needed; set MSR_PYTHON to one" >&2
  return 1
}
