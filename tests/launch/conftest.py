"""The folder of the tests is not a package: let them import each other."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
