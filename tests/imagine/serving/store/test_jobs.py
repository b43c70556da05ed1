"""The durable queue: accepting, claiming in turn, leases and fences, on SQLite and PostgreSQL."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from imagine.errors import ConfigError
from imagine.serving.store.database import Database
from imagine.serving.store.jobs import Admission, IdempotencyError, QueueFullError
from imagine.serving.store.records import Job, NewPicture, draw_id
from imagine.serving.store.store import Store
from imagine.serving.store.tables import metadata
from tests.imagine.serving.stores import Clock, admit, postgresql, settings_of

LEASE = 30.0


@pytest.fixture(scope="module")
def postgresql_url() -> Iterator[str | None]:
    with postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql_url")
        if url is None:
            pytest.skip("PostgreSQL is not installed")
        Database(url).engine.dispose()
    opened = Store.open(settings_of(tmp_path, database=url), clock)
    with opened.database.writing() as connection:
        for table in metadata.sorted_tables:
            connection.execute(table.delete())
    yield opened
    opened.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def picture(number: int = 0) -> NewPicture:
    return NewPicture(draw_id("pic"), number, "image/png", "0" * 64, 32, 32, 2**62, {"steps": 2})


def kinds(store: Store, job: Job) -> list[str]:
    return [event.kind for event in store.jobs.events_after(0, job.id)]


def test_migrations_make_the_tables_that_the_code_uses(store: Store) -> None:
    store.database.migrate()  # a second time changes nothing
    with store.database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_job_goes_from_the_queue_to_its_pictures(store: Store, clock: Clock) -> None:
    job = admit(store, count=2)
    assert (job.state, job.position, job.seeds) == ("queued", 1, [0, 1])
    (claimed,) = store.jobs.claim("w1", 4, LEASE)
    assert (claimed.id, claimed.state, claimed.attempt) == (job.id, "running", 1)
    store.jobs.report([(claimed, "denoising", 1, 4)], [(claimed, {"jpeg": "..."})])
    assert store.jobs.succeed(claimed, [picture(0), picture(1)])
    done = store.jobs.find(job.id, "ann")
    assert done is not None and done.state == "succeeded" and done.finished == clock.now
    assert [row.number for row in store.jobs.pictures_of(job.id)] == [0, 1]
    assert store.jobs.pictures_of(job.id)[0].seed == 2**62
    assert kinds(store, job) == ["queued", "started", "progress", "succeeded"]  # the preview is deleted
    assert store.jobs.find(job.id, "bob") is None


def test_the_result_of_a_worker_that_lost_its_lease_is_not_recorded(store: Store, clock: Clock) -> None:
    admit(store)
    (first,) = store.jobs.claim("w1", 1, LEASE)
    clock.now += LEASE - 1
    store.jobs.renew("w1", LEASE)
    clock.now += LEASE - 1
    assert store.jobs.release_lost(3) == 0
    clock.now += 2
    assert store.jobs.release_lost(3) == 1
    (second,) = store.jobs.claim("w2", 1, LEASE)
    assert (second.id, second.attempt) == (first.id, 2)
    store.jobs.report([(first, "denoising", 9, 9)], [])
    assert not store.jobs.succeed(first, [picture()]) and not store.jobs.fail(first, "x", "y")
    assert not store.jobs.end_canceled(first)
    found = store.jobs.find(first.id)
    assert found is not None and (found.state, found.step) == ("running", 0)
    assert store.jobs.succeed(second, [picture()]) and not store.jobs.succeed(second, [picture()])
    assert len(store.jobs.pictures_of(first.id)) == 1
    assert kinds(store, first) == ["queued", "started", "requeued", "started", "succeeded"]


def test_a_job_that_kills_its_workers_fails_and_one_whose_worker_stops_in_order_does_not(store: Store) -> None:
    deadly, patient = admit(store, "ann"), admit(store, "bob")
    for number in range(3):
        assert len(store.jobs.claim(f"w{number}", 2, LEASE)) == 2
        store.jobs.release(f"w{number}", 3, counted=number != 1)
    for _ in range(2):
        store.jobs.claim("w9", 2, LEASE)
        store.jobs.release("w9", 3, counted=True) if _ == 0 else None
    found = [store.jobs.find(job.id) for job in (deadly, patient)]
    assert [job.state for job in found if job] == ["failed", "failed"]
    assert found[0] is not None and found[0].error_code == "worker_lost" and "3 times" in str(found[0].error)


def test_owners_take_turns(store: Store, clock: Clock) -> None:
    for number in range(4):
        admit(store, "ann", request={"number": number})
    clock.now += 1  # of two jobs of the same moment any may be first
    late = admit(store, "bob")
    assert late.position == 2
    assert [job.owner for job in store.jobs.claim("w1", 3, LEASE)] == ["ann", "bob", "ann"]
    admit(store, "cat")
    assert [job.owner for job in store.jobs.claim("w1", 9, LEASE)] == ["cat", "ann", "ann"]


def test_a_large_job_is_not_overtaken_for_ever_and_short_jobs_come_first(store: Store, clock: Clock) -> None:
    large = admit(store, "ann", count=4)
    clock.now += 1  # of two jobs of the same moment any may be first
    small = admit(store, "bob", count=1)
    check = admit(store, "cat", kind="photo", seeds=[])
    assert [job.id for job in store.jobs.claim("w1", 0, LEASE)] == [check.id]
    assert store.jobs.claim("w1", 2, LEASE) == []
    assert [job.id for job in store.jobs.claim("w1", 2, LEASE, empty=True)] == [large.id]
    assert [job.id for job in store.jobs.claim("w1", 1, LEASE)] == [small.id]


def test_a_queued_job_is_canceled_at_once_and_a_running_one_at_its_next_step(store: Store) -> None:
    queued = admit(store)
    canceled = store.jobs.cancel(queued.id, "ann")
    assert canceled is not None and canceled.state == "canceled"
    running = admit(store)
    (claimed,) = store.jobs.claim("w1", 1, LEASE)
    assert store.jobs.cancel(running.id, "bob") is None and store.jobs.canceled_of("w1") == set()
    asked = store.jobs.cancel(running.id, "ann")
    assert asked is not None and asked.state == "running" and store.jobs.canceled_of("w1") == {(running.id, 1)}
    assert store.jobs.end_canceled(claimed) and not store.jobs.succeed(claimed, [picture()])
    again = store.jobs.cancel(running.id, "ann")
    assert again is not None and again.state == "canceled" and kinds(store, running)[-1] == "canceled"


def test_a_job_that_lost_its_worker_while_it_was_being_canceled_is_canceled(store: Store) -> None:
    job = admit(store)
    store.jobs.claim("w1", 1, LEASE)
    store.jobs.cancel(job.id, "ann")
    store.jobs.release("w1", 3)
    found = store.jobs.find(job.id)
    assert found is not None and found.state == "canceled"


def test_a_job_that_waits_too_long_expires(store: Store, clock: Clock) -> None:
    job = admit(store, deadline=5.0)
    clock.now += 4
    assert store.jobs.expire() == 0
    clock.now += 2
    assert store.jobs.expire() == 1 and store.jobs.claim("w1", 1, LEASE) == []
    found = store.jobs.find(job.id)
    assert found is not None and (found.state, found.error_code) == ("expired", "deadline")


def test_the_same_idempotency_key_returns_the_same_job(store: Store) -> None:
    wanted = Admission("ann", "pictures", {"prompt": "a"}, [1], 60, 600, "key")
    job, is_new = store.jobs.admit(wanted, 9, 9)
    again, is_new_again = store.jobs.admit(Admission("ann", "pictures", {"prompt": "a"}, [2], 60, 600, "key"), 9, 9)
    assert (is_new, is_new_again) == (True, False) and again.id == job.id and again.seeds == [1]
    other, _ = store.jobs.admit(Admission("bob", "pictures", {"prompt": "b"}, [1], 60, 600, "key"), 9, 9)
    assert other.id != job.id
    with pytest.raises(IdempotencyError):
        store.jobs.admit(Admission("ann", "pictures", {"prompt": "b"}, [1], 60, 600, "key"), 9, 9)
    found = store.jobs.retry_of("ann", Admission("ann", "pictures", {"prompt": "a"}, [5], 60, 600), 0)
    assert found is not None and found.id == job.id
    assert store.jobs.retry_of("bob", Admission("bob", "pictures", {"prompt": "a"}, [5], 60, 600), 0) is None


def test_a_full_queue_accepts_nothing(store: Store) -> None:
    admit(store, "ann", most=1)
    with pytest.raises(QueueFullError) as error:
        admit(store, "ann", most=1)
    assert error.value.own
    with pytest.raises(QueueFullError) as error:
        store.jobs.admit(Admission("bob", "pictures", {}, [1], 60, 600), 1, 5)
    assert not error.value.own


def test_two_workers_never_claim_the_same_job(store: Store) -> None:
    made = {admit(store, random.Random(number).choice("abc"), request={"n": number}).id for number in range(40)}
    claimed: list[str] = []

    def work(name: str) -> None:
        while some := store.jobs.claim(name, 3, LEASE):
            claimed.extend(job.id for job in some)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(claimed) == made and set(Counter(claimed).values()) == {1}


def test_jobs_are_listed_page_by_page(store: Store, clock: Clock) -> None:
    made = []
    for _ in range(5):
        clock.now += 1
        made.append(admit(store).id)
    admit(store, "bob")
    first = store.jobs.page("ann", None, None, 3)
    rest = store.jobs.page("ann", "queued", (first[-1].created, first[-1].id), 3)
    assert [job.id for job in [*first, *rest]] == made[::-1]


def test_deleting_a_job_leaves_nothing(store: Store) -> None:
    job = admit(store)
    (claimed,) = store.jobs.claim("w1", 1, LEASE)
    made = picture()
    path = store.files.picture(made.id, made.media)
    path.write_bytes(b"pixels")
    store.jobs.succeed(claimed, [made])
    assert store.jobs.picture(made.id, "ann") is not None and store.jobs.picture(made.id, "bob") is None
    store.delete_job(job.id)
    assert not path.exists() and store.jobs.find(job.id) is None and store.jobs.events_after(0, job.id) == []
    assert store.jobs.picture(made.id, "ann") is None


def test_a_database_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        Store.open(settings_of(tmp_path, database=f"sqlite:///{tmp_path}/none/x.db"))
    with pytest.raises(ConfigError, match=r"cannot be used.*postgresql\+psycopg"):
        Store.open(settings_of(tmp_path, database="nonsense://user:secret@host/x"))


def test_random_interleavings_never_finish_a_job_twice(store: Store, clock: Clock) -> None:
    """Admit, claim, lose, finish and cancel in random order; every job ends once, whatever happens."""
    rng, held, made = random.Random(5), list[Job](), list[Job]()
    for _ in range(150):
        action = rng.choice(("admit", "claim", "lose", "finish", "finish", "cancel", "wait"))
        if action == "admit":
            made.append(admit(store, rng.choice("abc"), rng.choice((1, 1, 2)), deadline=1e9, request={"n": len(made)}))
        elif action == "claim":
            held += store.jobs.claim(rng.choice(("w1", "w2")), 2, LEASE)
        elif action == "lose" and rng.random() < 0.5:
            store.jobs.release(rng.choice(("w1", "w2")), 3)
        elif action == "finish" and held:
            job = held.pop(rng.randrange(len(held)))
            store.jobs.succeed(job, [picture(number) for number in range(job.count)])
        elif action == "cancel" and made:
            job = rng.choice(made)
            store.jobs.cancel(job.id, job.owner)
        elif action == "wait":
            clock.now += rng.choice((1.0, LEASE + 1))
            store.jobs.release_lost(3)
    for _ in range(100):
        if not (claimed := store.jobs.claim("w3", 50, LEASE)):
            break
        for job in claimed:
            store.jobs.succeed(job, [picture(number) for number in range(job.count)])
    store.jobs.release(None, 1)
    ends = ("succeeded", "failed", "canceled", "expired")
    for job in made:
        found = store.jobs.find(job.id)
        assert found is not None and found.ended, found
        assert sum(kind in ends for kind in kinds(store, job)) == 1
        wanted = job.count if found.state == "succeeded" else 0
        assert len(store.jobs.pictures_of(job.id)) == wanted
    with store.database.reading() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM jobs")) == len(made) > 10
