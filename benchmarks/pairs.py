"""How many SynPairs of the portrait world are built in a second, end to end into shards: `python benchmarks/pairs.py`.

With --ray the same pairs are built by Ray with as many workers and by a single process, and all are compared. A build
of a fifth of the people comes first, and the speed is that of the people which the second one has more: starting
workers, loading models and compiling painters cost both the same and drop out, the writing of shards, manifest and card
does not. Times say something about one machine only, and are never asserted in tests.
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
    executors = ("single", "local", "ray") if options.ray else ("local",)
    report: dict[str, Any] = {name: measured(name, options) for name in executors}
    records = [report[name].pop("records") for name in executors]
    if options.ray:
        speeds = {name: report[name]["pairs_per_second"] for name in executors}
        report["ratio"] = round(speeds["ray"] / speeds["local"], 2)
        report["ratio_to_single"] = round(speeds["ray"] / speeds["single"], 2)
        report["same_records"] = all(each == records[0] for each in records)
    print(json.dumps(report) if options.json else _words(report))
    return 0


def measured(executor: str, options: argparse.Namespace) -> dict[str, Any]:
    """Pairs per second beyond what starting costs, and what starting costs."""
    if executor == "ray":  # a cluster is started once, whoever builds on it how often
        import ray

        ray.init(log_to_driver=False, include_dashboard=False)
    small, large = (_built(executor, count, options) for count in (options.identities // 5, options.identities))
    more = {name: large[name] - small[name] for name in ("seconds", "targets", "pairs")}
    return {
        "pairs": large["pairs"],
        "seconds": round(large["seconds"], 1),
        "pairs_per_second": round(more["pairs"] / more["seconds"], 1),
        "targets_per_second": round(more["targets"] / more["seconds"], 1),
        "seconds_to_start": round(small["seconds"] - small["pairs"] * more["seconds"] / more["pairs"], 1),
        "records": large["records"],
    }


def _built(executor: str, identities: int, options: argparse.Namespace) -> dict[str, Any]:
    """Build the pairs of so many people in a fresh folder: in this process alone, in `workers` beside it, or by Ray."""
    from data_synth.build import build
    from data_synth.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            ROOT / "configs" / "pairs_world.yaml",
            _overrides(identities, options, 0 if executor == "single" else options.workers),
        )
        started_at = time.perf_counter()
        built = build(config, folder, "ray" if executor == "ray" else "local", lambda *_: None)
        seconds = time.perf_counter() - started_at
    return {
        "seconds": seconds,
        "targets": built.funnel.targets,
        "pairs": built.manifest["counts"]["pairs"],
        "records": [shard["sha256"] for shard in built.manifest["shards"]],
    }


def _overrides(identities: int, options: argparse.Namespace, workers: int) -> list[str]:
    compiled = str(options.compiled).lower()
    return [
        f"references.identities={identities}",
        f"references.compiled={compiled}",
        f"generator.compiled={compiled}",
        f"workers={workers}",
        f"ray.concurrency={max(options.workers, 1)}",
    ]


def _words(report: dict[str, Any]) -> str:
    lines = [f"{os.cpu_count()} cores"]
    for name, numbers in report.items():
        if isinstance(numbers, dict):
            lines.append(
                f"{name:>6}: {numbers['pairs_per_second']:>7} pairs/s ({numbers['targets_per_second']} targets/s), "
                f"{numbers['seconds_to_start']} s to start; {numbers['pairs']} pairs in {numbers['seconds']} s"
            )
    if "ratio" in report:
        lines.append(f"ray / local: {report['ratio']}, ray / single: {report['ratio_to_single']}")
        lines.append(f"the same shards: {report['same_records']}")
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
