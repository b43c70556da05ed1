"""Numbers for Prometheus: requests of this process, and jobs and workers as the store knows them.

Labels are routes, states, codes and workers; never prompts, names or keys.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from imagine.serving.settings import ServeSettings
from imagine.serving.store.store import Store
from imagine.serving.worker_counts import ROWS


class HttpMetrics:
    """The metrics of one application."""

    def __init__(self, store: Store, settings: ServeSettings) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(StoreCollector(store, settings))
        self._requests = Counter(
            "imagine_http_requests", "Requests by route and status.", ("method", "route", "status"),
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "imagine_http_seconds", "Time of requests by route.", ("route",), registry=self.registry
        )
        self.streams = Gauge("imagine_event_streams", "Clients that follow events.", registry=self.registry)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        known = method if method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS") else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class StoreCollector(Collector):
    """Reads the numbers of jobs and workers when they are asked for."""

    def __init__(self, store: Store, settings: ServeSettings) -> None:
        self.store, self.settings = store, settings

    def describe(self) -> Iterator[Metric]:
        """Describe nothing, so that registering reads nothing."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Read the store."""
        jobs = GaugeMetricFamily("imagine_jobs", "Jobs that are kept, by kind and state.", labels=("kind", "state"))
        for (kind, state), count in self.store.jobs.count_by_state().items():
            jobs.add_metric((kind, state), count)
        yield jobs
        yield GaugeMetricFamily(
            "imagine_queue_seconds", "Age of the oldest queued job.", value=self.store.jobs.oldest_queued()
        )
        workers = self.store.access.living_workers(self.settings.lease)
        yield GaugeMetricFamily("imagine_workers", "Workers that are alive.", value=len(workers))
        names = {"steps": "Denoising steps.", "pictures_in_steps": "Pictures in denoising steps, added up.",
                 "seconds": "Seconds in denoising steps.", "out_of_memory": "Steps that were split for memory.",
                 "decoded": "Decoded pictures.", "decode_seconds": "Seconds of decoding."}  # fmt: skip
        for name, text in names.items():
            family = CounterMetricFamily(f"imagine_worker_{name}", text, labels=("worker",))
            for worker in workers:
                family.add_metric((worker["id"],), worker["counts"][name])
            yield family
        ended = CounterMetricFamily("imagine_worker_jobs", "Jobs that ended, by state.", labels=("worker", "state"))
        rows = HistogramMetricFamily("imagine_worker_batch", "Pictures that shared a step.", labels=("worker",))
        for worker in workers:
            counts = worker["counts"]
            for state, count in counts["ended"].items():
                ended.add_metric((worker["id"], state), count)
            total, buckets = 0, []
            for limit in (*map(str, ROWS), "+Inf"):
                total += counts["rows"].get(limit, 0)
                buckets.append((limit, total))
            rows.add_metric((worker["id"],), buckets, counts["pictures_in_steps"])
        yield ended
        yield rows
