"""Compare the planner with measurements on small networks of every family, on this machine's CPU.

    .venv/bin/python benchmarks/planner.py
    .venv/bin/python benchmarks/planner.py --bases flux2 sana --resolution 256 --json

For each family a small network of diffusers' own class, with an adapter, runs two steps and a training step (with and
without recomputation), and two people beside a native reference where there are any. Parameters and arithmetic are
counted by torch's FlopCounterMode, memory by the events of the allocator. docs/planner.md shows the result.
"""

import argparse
import json
import sys

from imagine.cli.printing import table_lines
from imagine.planning.check import SMALL_BASES, TOLERANCE, compare, small_base, small_transformer


def main() -> int:
    """Measure, print the table, and return the exit code: 1 if a plan is further off than the tolerance."""
    parser = argparse.ArgumentParser(description="compare the planner with small networks that run here")
    parser.add_argument("--bases", nargs="+", choices=SMALL_BASES, default=SMALL_BASES, help="default: all")
    parser.add_argument("--batch", type=int, default=2, help="pictures (default: 2)")
    parser.add_argument("--resolution", type=int, default=128, help="pixels a side (default: 128)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = {}
    for name in options.bases:
        print(f"measuring {name} ...", file=sys.stderr)
        base = small_base() if name == "unet" else small_transformer(name)
        rows[name] = compare(base, options.batch, options.resolution)
    if options.json:
        print(json.dumps(rows))
    else:
        cells = [
            [name, what, row["planned"], row["measured"], f"{row['off']:.1%}"]
            for name, each in rows.items() for what, row in each.items()
        ]  # fmt: skip
        print("\n".join(table_lines(["family", "quantity", "planned", "measured", "difference"], cells)))
    exact = all(row["off"] == 0 for each in rows.values() for what, row in each.items() if not what.endswith("memory"))
    return 0 if exact and max(row["off"] for each in rows.values() for row in each.values()) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
