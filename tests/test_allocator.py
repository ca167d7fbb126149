import gc
import sys
from pathlib import Path

import pytest

from oreo_jax import allocator


def resident_mib():
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * 4096 / 2**20


@pytest.mark.skipif(
  not sys.platform.startswith("linux"), reason="malloc_trim is glibc's"
)
def test_freed_memory_is_returned():
  pieces = [bytes(10_000) for _ in range(20_000)]
  # Without the last piece glibc would return the end of its pool by itself.
  last = bytes(10_000)
  pieces.append(last)
  full = resident_mib()
  del pieces
  gc.collect()
  before = resident_mib()
  allocator.return_freed_memory()
  assert full - before < 100 < before - resident_mib()
  assert last
