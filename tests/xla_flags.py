"""Which of some XLA flags the installed XLA has. It ends a process, without a word, that sets one that it lacks."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence

ASK = "from jaxlib import xla_client; xla_client.CompileOptions()"  # reads XLA_FLAGS, and is ready in half a second


def known_flags(flags: Sequence[str]) -> list[str]:
    """Those of `flags` ("--xla_name=value") that XLA has: a process that sets them all dies with the others' names.

    Raises:
      RuntimeError: it dies of something else.
    """
    env = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    asked = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True)
    if asked.returncode == 0:
        return list(flags)
    found = re.search(r"Unknown flags? in XLA_FLAGS: (.*)", asked.stderr)
    if found is None:
        raise RuntimeError(f"XLA could not be asked for its flags: {asked.stderr}")
    return [flag for flag in flags if flag not in found[1].split()]
