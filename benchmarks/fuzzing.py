"""Make requests from the description of a running server's API (schemathesis), and report wrong answers.

    imagine serve --create-key fuzzing
    imagine serve --port 8188 &
    python benchmarks/fuzzing.py http://127.0.0.1:8188 --key KEY --examples 200

Without a key, that the server needs none is reported.

Checks: no 5xx except 503, and status codes, content types and bodies as the API's description says. Prints one line per
kind of failure, and ends with exit code 1 if there is any.
"""

import argparse
import sys
import time
import warnings
from typing import Any

import hypothesis
import schemathesis
from schemathesis.checks import CHECKS
from schemathesis.core.failures import FailureGroup

LEFT_OUT = {
    # The sentence of a prompt must fit its people, which a schema cannot say.
    "positive_data_acceptance",
    # A form and a JSON body hold the same fields in other ways; the tests of the contract check what is refused.
    "negative_data_rejection",
    "missing_required_header",
}


def fuzz(url: str, examples: int, seed: int = 0, key: str | None = None) -> tuple[int, list[str]]:
    """Try every route with so many requests; return how many routes there are, and what failed."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    checks = [check for check in CHECKS.get_all() if check.__name__ not in LEFT_OUT]
    failures: dict[str, str] = {}
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        count += 1
        _try_route(operation, examples, seed, headers, checks, failures)
    return count, sorted(failures.values())


def _try_route(
    operation: Any, examples: int, seed: int, headers: dict[str, str], checks: list[Any], failures: dict[str, str]
) -> None:
    """Try one route with requests that fit its description, and with others that do not."""
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
        try:
            strategy = operation.as_strategy(generation_mode=mode)
        except Exception as error:  # a route without parameters has no requests that do not fit
            if mode is schemathesis.GenerationMode.POSITIVE:
                failures[f"{operation.label} strategy"] = f"{operation.label}: {error}"
            continue

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(case=strategy)
        def attempt(case: Any) -> None:
            answer = case.call(headers=headers, timeout=30)
            try:
                case.validate_response(answer, checks=checks, headers=headers)
            except FailureGroup as group:
                for error in group.exceptions:
                    name = f"{operation.label} {type(error).__name__} {answer.status_code}"
                    sent = f"{case.method} {case.formatted_path} {case.query} {case.body!r}"[:300]
                    told = " ".join(str(error).split())[:300]
                    failures.setdefault(name, f"{name}: {told} | sent {sent} | got {answer.text[:200]}")

        try:
            attempt()
        except hypothesis.errors.Unsatisfiable:
            pass
        except Exception as error:  # a request that cannot be made, or a server that is gone
            failures[f"{operation.label} {type(error).__name__}"] = f"{operation.label}: {error}"


def main() -> int:
    """Fuzz the server, print what failed, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--examples", type=int, default=100, help="requests per route and kind (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.monotonic()
    routes, failures = fuzz(options.url, options.examples, options.seed, options.key)
    for failure in failures:
        print(failure)
    print(f"{routes} routes, {options.examples} requests of each kind: {len(failures)} failures in "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
