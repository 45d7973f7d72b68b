"""`python -m flows`: run the build flow once, here, on Prefect's own local server or on the one that PREFECT_API_URL names."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows", description=__doc__)
    parser.add_argument("--stages", nargs="*", help="kinds of stages to walk (default: all)")
    parser.add_argument("--sources", nargs="*", help="sources to fetch (default: all)")
    parser.add_argument("--no-publish", action="store_true")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    os.environ.setdefault("PREFECT_HOME", str(ROOT / ".prefect"))
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    from flows.build import build  # after the settings above: prefect reads them when it is imported

    state = build(options.stages, options.sources, not options.no_publish, return_state=True)
    print(f"\n{state.name}: {state.message}")
    index = Path("data/published/index.html")
    if index.exists():
        print(f"  pages   {index.resolve().as_uri()}")
        print("  serve   make serve            (pages, map and data on http://localhost:8000)")
    print("  scores  .venv/bin/dvc metrics show")
    print("  UI      make ui               (this run and every other, on http://localhost:4200)")
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
