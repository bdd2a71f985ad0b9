"""The energy that the processor has used, from Linux's powercap counters.

Counters count microjoules of a package (a socket: cores, caches, memory controller) or of its memory, and
start again from 0 at their maximum. On many machines only root may read them; virtual machines have none.
"""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules between two moments.

    Args:
        folder: with a folder for each counter.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._counters: list[tuple[Path, int]] = []
        for zone in sorted(folder.glob("*")):
            try:
                name = (zone / "name").read_text(encoding="ascii").strip()
                maximum = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
                int((zone / "energy_uj").read_text(encoding="ascii"))
            except (OSError, ValueError):
                continue
            # "core" and "uncore" are parts of a package, "psys" is the whole machine; "intel-rapl-mmio" is
            # the same package behind another interface.
            if (name.startswith("package") or name == "dram") and "mmio" not in zone.name:
                self._counters.append((zone / "energy_uj", maximum))

    def read(self) -> list[int]:
        """The counters now."""
        return [int(file.read_text(encoding="ascii")) for file, _ in self._counters]

    def joules_since(self, before: list[int]) -> float | None:
        """Joules since `read` gave ``before``; None without a counter."""
        if not self._counters:
            return None
        used = 0
        for (_, maximum), old, new in zip(self._counters, before, self.read(), strict=True):
            used += new - old if new >= old else new - old + maximum
        return used / 1e6
