"""Measure how many SynPairs of the portrait world are built per second, end to end into shards: `make bench-pairs`.

With --ray, Ray with the same number of workers and a single process build the same pairs too, and the report compares
all three. Each executor first builds a fifth of the people and then all of them; the speed is that of the additional
people. It therefore excludes costs that are the same in both builds: starting workers, loading models and compiling
the renderer. It includes writing the shards, the manifest and the card. Times are valid for one machine only, so tests
never assert them.
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
    """Measure the build with each executor, print the report, and return the exit code."""
    options = _options()
    executors = ("single", "local", "ray") if options.ray else ("local",)
    report: dict[str, Any] = {name: measured(name, options) for name in executors}
    records = [report[name].pop("records") for name in executors]
    if options.ray:
        speeds = {name: report[name]["pairs_per_second"] for name in executors}
        report["ratio"] = round(speeds["ray"] / speeds["local"], 2)
        report["ratio_to_single"] = round(speeds["ray"] / speeds["single"], 2)
        report["same_records"] = all(each == records[0] for each in records)
    print(json.dumps(report) if options.json else _formatted(report))
    return 0


def measured(executor: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the pairs and targets per second without the start, and the seconds of the start."""
    if executor == "ray":  # both builds share one cluster, so its start is not measured
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
    """Build the pairs of `identities` people in a new folder and return its time, counts and shard hashes.

    executor: "single" (this process), "local" (`workers` processes) or "ray".
    """
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


def _formatted(report: dict[str, Any]) -> str:
    lines = [f"{os.cpu_count()} cores"]
    for name, numbers in report.items():
        if isinstance(numbers, dict):
            lines.append(
                f"{name:>6}: {numbers['pairs_per_second']:>7} pairs/s ({numbers['targets_per_second']} targets/s), "
                f"{numbers['seconds_to_start']} s to start; {numbers['pairs']} pairs in {numbers['seconds']} s"
            )
    if "ratio" in report:
        lines.append(f"ray / local: {report['ratio']}, ray / single: {report['ratio_to_single']}")
        lines.append(f"identical shards: {report['same_records']}")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the pairs per second of the portrait world's build.")
    parser.add_argument("--identities", type=int, default=1000, help="number of people, each with four targets")
    parser.add_argument("--workers", type=int, default=2, help="number of processes, or of workers on Ray")
    parser.add_argument("--plain", dest="compiled", action="store_false", help="do not compile the renderer")
    parser.add_argument("--ray", action="store_true", help="also build with Ray and with one process, and compare")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
