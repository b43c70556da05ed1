"""Everything that the server keeps, behind one object, and the sweep that removes what is over."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from imagine.serving.settings import DAY, ServeSettings
from imagine.serving.store.access import Access
from imagine.serving.store.database import Database
from imagine.serving.store.files import LEFT_OVER, Files
from imagine.serving.store.jobs import Jobs
from imagine.serving.store.people import People


@dataclass(frozen=True)
class Store:
    """The parts of the store of one server."""

    database: Database
    files: Files
    jobs: Jobs
    people: People
    access: Access

    @classmethod
    def open(cls, settings: ServeSettings, clock: Callable[[], float] = time.time) -> "Store":
        """Open the store of these settings, and create what is missing. Raises ConfigError if that fails."""
        files = Files(settings.folder)
        files.create()
        database = Database(settings.database_url)
        database.migrate()
        return cls(database, files, Jobs(database, clock), People(database, files, clock), Access(database, clock))

    def close(self) -> None:
        self.database.dispose()

    def delete_job(self, job: str) -> None:
        """Delete a job with its pictures and their files."""
        self.files.remove_pictures(self.jobs.delete(job))

    def delete_picture(self, picture: str, owner: str) -> bool:
        """Delete an owner's picture with its file; return whether there was one."""
        found = self.jobs.delete_picture(picture, owner)
        if found:
            self.files.remove_pictures([picture])
        return found

    def sweep(self, settings: ServeSettings) -> dict[str, int]:
        """Give back lost jobs, expire late ones, and delete what is over; return how many of each."""
        done = {"lost": self.jobs.release_lost(settings.max_attempts), "late": self.jobs.expire()}
        outdated = self.jobs.outdated()
        for job in outdated:
            self.delete_job(job)
        self.access.forget_silent(DAY)
        return {**done, "jobs": len(outdated), "files": self.people.delete_outdated()}

    def remove_left_over_files(self, older: float = LEFT_OVER) -> int:
        """Remove files that a killed process left without a row; return how many."""
        return self.files.remove_left_over(self.people.is_known, older)
