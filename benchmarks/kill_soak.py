"""How often does a killed run not resume bit by bit? A longer soak of the fault harness.

python benchmarks/kill_soak.py    # some minutes; writes one line per number of processes to kill_soak.jsonl
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HARNESS = Path(__file__).parents[1] / "tests" / "integration" / "faults.py"
RESULTS = Path(__file__).with_suffix(".jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill many training runs and resume them.")
    parser.add_argument("--points", type=int, default=100, help="random steps for each number of processes")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    lines = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(HARNESS), "--fixed", "--processes", str(processes)]
            command += ["--random", str(args.points), "--seed", str(args.seed), folder]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines.append(run.stdout.splitlines()[-1])
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    return int(any(json.loads(line)["failures"] for line in lines))


if __name__ == "__main__":
    sys.exit(main())
