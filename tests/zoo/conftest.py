"""The lists of the zoo lie beside the tests; benchmarks/zoo_table.py reads them too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
