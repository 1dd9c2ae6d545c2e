"""`pytest -m soak tests/reliability`, again and again with other random moments: python tests/reliability/soak.py [HOURS] [arguments]

Two hours unless told otherwise. The first failure ends it; its round is printed, and SOAK_ROUND=that number repeats it.
"""

import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

if __name__ == "__main__":
    hours, arguments = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0, sys.argv[2:]
    end = time.monotonic() + 3600 * hours
    for number in count(1):
        command = [sys.executable, "-m", "pytest", "-m", "soak", "-x", "-o", "timeout=3600", str(Path(__file__).parent), *arguments]
        code = subprocess.run(command, env={**os.environ, "SOAK_ROUND": str(number)}, check=False).returncode
        told = "passed" if code == 0 else f"failed, repeat it with SOAK_ROUND={number}"
        sys.stdout.write(f"round {number}: {told}\n")
        sys.stdout.flush()
        if code or time.monotonic() > end:
            sys.exit(code)
