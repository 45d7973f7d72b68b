"""Every benchmark, one after the other at sizes for a short look; docs/benchmarks.md keeps the tables of larger runs.

python -m benchmarks
"""

from __future__ import annotations

import subprocess
import sys

RUNS = (
    ("ingest", "--rows", "1000000"),
    ("batches",),
    ("scent",),
    ("scent_answer",),
    ("aroma",),
    ("parity_aroma",),
    ("dsq_floors",),
    ("senseiver",),
    ("parity_senseiver",),
    ("biased_attention",),
    ("bsa_tnp",),
    ("parity_bsa_tnp",),
    ("cst",),
    ("parity_cst",),
    ("sparqt",),
    ("fno",),
    ("convcnp",),
    ("training_share",),
    ("budgets",),
    ("unrolling", "50", "ns_s5"),
    ("overhead",),
)


def main() -> int:
    """Run each in a process of its own, so that none inherits another's threads or memory; 1 if one of them failed."""
    failed = []
    for name, *arguments in RUNS:
        print(f"\n{name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments]).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
