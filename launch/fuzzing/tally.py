"""What was done with a seed, over all starts of a campaign."""

import json
from collections import Counter
from pathlib import Path


class Tally:
    """Counts, faults and the next case and life, in a file that a next start reads."""

    def __init__(self, path: Path):
        told = json.loads(path.read_text()) if path.exists() else {}
        self.path, self.counts, self.faults = path, Counter(told.get("counts", {})), told.get("faults", [])
        self.next_case, self.next_life = told.get("next_case", 0), told.get("next_life", 0)
        self.minutes = Counter(told.get("minutes", {}))

    def save(self) -> None:
        told = {name: getattr(self, name) for name in ("next_case", "next_life", "minutes", "counts", "faults")}
        self.path.write_text(json.dumps(told, indent=1) + "\n")

    def total(self, what: str) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith(f"{what}, "))

    def __str__(self) -> str:
        sums = ", ".join(f"{self.total(what)} {what}" for what in ("files", "kills", "lives"))
        return f"{sums}; {len(self.faults)} faults; {sum(self.minutes.values()):.0f} min"
