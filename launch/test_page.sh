#!/usr/bin/env bash
# Tests the page of `msr serve` in Chromium, which has to be installed (Debian: apt-get install chromium); pictures of it go to
# page_out/. With --load, fifty jobs of twenty clients follow, and a server that is killed; with --fuzz MINUTES, the API is given what
# its description allows and forbids, by schemathesis.
minutes=0 load=no
while [ $# -gt 0 ]; do
  if [ "$1" = --load ]; then
    load=yes
  elif [ "$1" = --fuzz ] && [ $# -gt 1 ]; then
    minutes=$2
    shift
  else
    echo "usage: bash launch/test_page.sh [--load] [--fuzz MINUTES]" >&2 && exit 2
  fi
  shift
done
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
command -v chromium > /dev/null || { echo "chromium is not installed; on Debian: apt-get install chromium" >&2 && exit 2; }
python -m pip install --quiet --disable-pip-version-check -e '.[web]' playwright==1.65.2 axe-playwright-python==0.1.8 schemathesis==4.32.5
python -m pytest -s -o addopts= tests/page/check_page.py
[ "$load" = no ] || python -m tests.page.load_jobs
[ "$minutes" = 0 ] || python -m tests.page.fuzz_api "$minutes"
