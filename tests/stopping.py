"""A task of the trainer that stops its run once, as a user or a scheduler would."""

import os
import signal
from typing import Any, ClassVar


class StopsOnce:
    """Sends SIGTERM to the run before the batch at image `StopsOnce.stop_at`; name it before the task's class."""

    stop_at: ClassVar[int] = -1

    def batch(self, images_seen: int, size: int) -> Any:
        if images_seen == StopsOnce.stop_at:
            StopsOnce.stop_at = -1
            os.kill(os.getpid(), signal.SIGTERM)
        task: Any = super()
        return task.batch(images_seen, size)
