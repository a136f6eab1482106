"""What this machine has."""

import os
import pathlib


def host_bytes() -> int:
  """Memory of this machine, or of the container that the process runs in."""
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = pathlib.Path("/sys/fs/cgroup/memory.max")
  text = limit.read_text().strip() if limit.is_file() else "max"
  return total if text == "max" else min(total, int(text))
