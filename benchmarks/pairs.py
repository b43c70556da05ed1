"""How many SynPairs of the portrait world are built in a second, end to end into shards: `python benchmarks/pairs.py`.

With --ray the same pairs are built by Ray with as many workers, and the two are compared. What is measured lasts from
the first finished chunk, when models are loaded and painters compiled, until shards, manifest and card are written;
what comes before it is told apart. Times say something about one machine only, and are never asserted in tests.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Build in a fresh folder, with each executor; returns the exit code."""
    options = _options()
    backends = ("local", "ray") if options.ray else ("local",)
    report: dict[str, Any] = {name: measured(name, options) for name in backends}
    if options.ray:
        speeds = [report[name]["pairs_per_second"] for name in ("ray", "local")]
        report["ratio"] = round(speeds[0] / speeds[1], 2)
        report["same_records"] = report["ray"].pop("records") == report["local"].pop("records")
    print(json.dumps(report) if options.json else _words(report))
    return 0


def measured(backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """Pairs per second, and what came before and after."""
    from data_synth.build import build
    from data_synth.config import load_config

    begun = time.perf_counter()
    first: list[tuple[float, int]] = []  # when the first chunk was done, and how many targets it had
    made: list[float] = []  # when the last target was made

    def watch(what: str, done: int, total: int) -> None:
        if what == "targets" and done and not first:
            first.append((time.perf_counter(), done))
        if what == "targets" and done == total:
            made.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(ROOT / "configs" / "pairs_world.yaml", _overrides(options))
        built = build(config, folder, backend, watch)
        end = time.perf_counter()
    total, pairs = built.funnel.targets, built.manifest["counts"]["pairs"]
    seconds = end - first[0][0]
    return {
        "pairs": pairs,
        "pairs_per_second": round(pairs * (1 - first[0][1] / total) / seconds, 1),
        "targets_per_second": round((total - first[0][1]) / seconds, 1),
        "seconds_before": round(first[0][0] - begun, 1),
        "seconds_measured": round(seconds, 1),
        "of_which_writing": round(end - made[0], 1),
        "records": [shard["sha256"] for shard in built.manifest["shards"]],
    }


def _overrides(options: argparse.Namespace) -> list[str]:
    compiled = str(options.compiled).lower()
    return [
        f"references.identities={options.identities}",
        f"references.compiled={compiled}",
        f"generator.compiled={compiled}",
        f"workers={options.workers}",
        f"ray.concurrency={max(options.workers, 1)}",
    ]


def _words(report: dict[str, Any]) -> str:
    lines = [f"{os.cpu_count()} cores"]
    for name, numbers in report.items():
        if isinstance(numbers, dict):
            lines.append(
                f"{name:>6}: {numbers['pairs_per_second']:>7} pairs/s ({numbers['targets_per_second']} targets/s, "
                f"{numbers['seconds_measured']} s, of which {numbers['of_which_writing']} s for writing; "
                f"{numbers['seconds_before']} s before that)"
            )
    if "ratio" in report:
        lines.append(f"ray / local: {report['ratio']}, the same shards: {report['same_records']}")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pairs per second of the world's build.")
    parser.add_argument("--identities", type=int, default=1000, help="people, each with four targets")
    parser.add_argument("--workers", type=int, default=2, help="processes, or copies on Ray")
    parser.add_argument("--plain", dest="compiled", action="store_false", help="do not compile the painters")
    parser.add_argument("--ray", action="store_true", help="build with Ray too, and compare")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
