#!/usr/bin/env bash
# Tests the page of `msr serve` in Chromium, which has to be installed (Debian: apt-get install chromium); pictures of it go to
# page_out/. With --fuzz MINUTES, the API is also given what its description allows and forbids, by schemathesis.
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
command -v chromium > /dev/null || { echo "chromium is not installed; on Debian: apt-get install chromium" >&2 && exit 2; }
minutes=0
case "$#,${1:-}" in
  0,) ;;
  2,--fuzz) minutes=$2 ;;
  *) echo "usage: bash launch/test_page.sh [--fuzz MINUTES]" >&2 && exit 2 ;;
esac
python -m pip install --quiet --disable-pip-version-check -e '.[web]' playwright==1.65.2 axe-playwright-python==0.1.8 schemathesis==4.32.5
python -m pytest -s -o addopts= tests/page/check_page.py
[ "$minutes" = 0 ] || python -m tests.page.fuzz_api "$minutes"
