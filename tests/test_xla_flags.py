"""XLA flags that the installed XLA lacks do not reach it."""

import pytest

from tests.xla_flags import known_flags


def test_flags_that_xla_lacks_are_left_out():
    has = ["--xla_backend_optimization_level=0", "--xla_cpu_multi_thread_eigen=false"]
    assert known_flags([*has[:1], "--xla_gone_since_yesterday=1", *has[1:], "--xla_never_was=a"]) == has


def test_another_failure_is_no_answer(monkeypatch):
    monkeypatch.setattr("tests.xla_flags.ASK", "raise SystemExit('no jaxlib here')")
    with pytest.raises(RuntimeError, match="no jaxlib here"):
        known_flags(["--xla_backend_optimization_level=0"])
