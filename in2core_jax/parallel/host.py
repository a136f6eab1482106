"""What this machine has."""

import os
import pathlib


def host_bytes() -> int:
  """Memory of this machine, or of the container that the process runs in."""
  return _in_container(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def available_bytes() -> int:
  """Memory that is free for this process, by what Linux and its container say; without an answer, all there is."""
  try:
    free = next(line for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
  except (OSError, StopIteration):
    return host_bytes()
  return _in_container(int(free.split()[1]) * 1024)


def _in_container(found: int) -> int:
  limit = pathlib.Path("/sys/fs/cgroup/memory.max")
  text = limit.read_text().strip() if limit.is_file() else "max"
  return min(found, int(text)) if text.isdecimal() else found
