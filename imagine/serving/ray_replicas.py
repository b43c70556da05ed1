"""The server on Ray Serve: the same application, and one denoising replica per device of the cluster.

    serve deploy configs/serving/ray.yaml

Ray routes requests to replicas of the application, and starts and restarts the replicas of both kinds. It does no
batching: each denoising replica claims jobs from the database and batches by itself, as a worker of `imagine serve`
does. All replicas need the same PostgreSQL database and a folder that all nodes share; on one machine the SQLite
database of the folder is enough.
"""

import threading
from collections.abc import Mapping
from typing import Any

from ray import serve

from imagine.errors import ConfigError
from imagine.serving.settings import ServeSettings
from imagine.serving.store.store import Store

SHARES = ("replicas", "web_replicas", "gpus", "cpus")


class Denoiser:
    """One worker with its pipeline. Ray starts another replica if its loop has ended."""

    def __init__(self, settings: str) -> None:
        from imagine.serving.logs import log_as_json
        from imagine.serving.worker.loading import load_pipeline
        from imagine.serving.worker.process import Worker

        read = ServeSettings.model_validate_json(settings)
        log_as_json()
        self.worker = Worker(load_pipeline(read), Store.open(read), read)
        self._thread = threading.Thread(target=self.worker.run, daemon=True)
        self._thread.start()

    def name(self) -> str:
        """Return the worker's name, as the database knows it."""
        return self.worker.name

    def check_health(self) -> None:
        """Raise an error if the loop has ended, by which Ray knows that this replica is of no use."""
        if not self._thread.is_alive():
            raise RuntimeError("The denoising loop has ended.")

    def __del__(self) -> None:
        if hasattr(self, "worker"):
            self.worker.stop()
            self._thread.join(self.worker.settings.drain + 5)


def application(args: Mapping[str, Any]) -> Any:
    """Return the Ray Serve application for these settings.

    args: the settings of a server, and `replicas` (of the denoiser, 1), `web_replicas` (1), and `gpus` and `cpus` that
    each denoiser takes (0 and 1). Raises ConfigError without an API key if Ray listens on a public address.
    """
    shares = {name: args.get(name, default) for name, default in zip(SHARES, (1, 1, 0, 1), strict=True)}
    settings = ServeSettings(**{name: value for name, value in args.items() if name not in SHARES})
    _check_keys(settings)
    as_json = settings.model_dump_json()

    def build() -> Any:
        from imagine.serving.api.app import create_app

        read = ServeSettings.model_validate_json(as_json)
        return create_app(Store.open(read), read)

    denoiser = serve.deployment(
        num_replicas=shares["replicas"],
        ray_actor_options={"num_gpus": shares["gpus"], "num_cpus": shares["cpus"]},
        graceful_shutdown_timeout_s=settings.drain + 10,
    )(Denoiser)
    web = serve.deployment(
        name="Web", num_replicas=shares["web_replicas"], ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000
    )(serve.ingress(build)())
    return web.bind(denoiser.bind(as_json))


def _check_keys(settings: ServeSettings) -> None:
    store = Store.open(settings)
    try:
        if not settings.on_loopback and not store.access.has_keys():
            raise ConfigError(
                "There is no API key yet: make one with imagine serve --create-key NAME, with the same --folder and "
                "--database."
            )
    finally:
        store.close()
