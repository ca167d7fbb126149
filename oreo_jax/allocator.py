"""The memory that the C library holds for this process."""

from __future__ import annotations

import ctypes
import gc


def return_freed_memory() -> None:
  """Gives freed memory back to the operating system, where glibc keeps it.

  Compiling a training step leaves some hundred MB behind in small pieces, which
  would count in the size of the process from then on.
  """
  gc.collect()
  try:
    trim = ctypes.CDLL(None).malloc_trim
  except (AttributeError, OSError, TypeError):
    return  # a C library other than glibc
  trim(0)
