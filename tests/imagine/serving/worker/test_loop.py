"""The denoising loop: different people share steps, and one job's trouble is that job's only."""

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagine.people.persona import Persona
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.provenance.detection import detect
from imagine.serving.store.people import StoredPersona, Upload
from imagine.serving.store.records import Job, draw_id
from imagine.serving.store.store import Store
from imagine.serving.worker.failures import DeviceLostError, describe
from imagine.serving.worker.loop import Loop
from imagine.serving.worker.process import Worker
from imagine.serving.worker.saving import save_persona
from imagine.serving.worker_counts import Counts
from tests import tiny
from tests.imagine.serving.servers import opened
from tests.imagine.serving.stores import admit, settings_of

PROMPT = "a person smiling on a beach"


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


def loop_of(store: Store, pipe: Any, tmp_path: Path, **more: Any) -> Loop:
    return Loop(pipe, store, settings_of(tmp_path, **more), "w1", Counts())


def add_persona(store: Store, pipe: ImaginePipeline, seed: int, owner: str = "ann") -> str:
    persona = pipe.enroll(tiny.photo(seed))
    name = f"per_{seed:032x}"
    save_persona(store.files, persona, name)
    with store.database.writing() as connection:
        store.people.add_persona(
            connection, StoredPersona(name, owner, "x", persona.encoder, 1, None, [], 0, store.people.clock() + 1e6)
        )
    return name


def ask(store: Store, seed: int, persona: str | None = None, **request: Any) -> Job:
    people = {} if persona is None else {"": {"persona": persona, "uploads": []}}
    count = request.pop("n", 1)
    store.jobs.clock.now += 0.001  # type: ignore[attr-defined]
    whole = {"prompt": PROMPT, "steps": 3, "people": people, **request}
    return admit(store, request=whole, seeds=[seed + number for number in range(count)])


def drain(loop: Loop) -> None:
    for _ in range(500):
        loop.tick()
        if not loop.busy and not loop.store.jobs.count_by_state().get(("pictures", "queued")):
            break
    loop._saver.shutdown(wait=True)


def state(store: Store, job: Job) -> tuple[str, str | None]:
    found = store.jobs.find(job.id)
    assert found is not None
    return found.state, found.error_code


def result(store: Store, job: Job) -> Any:
    found = store.jobs.find(job.id)
    assert found is not None and found.result is not None
    return found.result


def pixels(store: Store, job: Job) -> list[Any]:
    rows = store.jobs.pictures_of(job.id)
    return [np.asarray(opened(store.files.picture(row.id, row.media).read_bytes()), dtype=int) for row in rows]


def test_different_people_share_steps_and_every_picture_is_the_persons_own(
    store: Store, pipe: ImaginePipeline, tmp_path: Path
) -> None:
    people = [add_persona(store, pipe, seed) for seed in range(1, 5)]
    jobs = [ask(store, seed, persona, steps=2 + seed) for seed, persona in enumerate(people)]
    loop = loop_of(store, pipe, tmp_path)
    drain(loop)
    for seed, (job, persona) in enumerate(zip(jobs, people, strict=True)):
        assert state(store, job) == ("succeeded", None)
        reference = str(store.files.persona(persona))
        alone = pipe(PROMPT, reference=reference, num_inference_steps=2 + seed, generator=tiny.generator(seed)).images[
            0
        ]
        (picture,) = pixels(store, job)
        difference = np.abs(picture - np.asarray(alone, dtype=int)).max()
        assert difference <= 1
        assert '"shared_steps_with": 4' in store.jobs.pictures_of(job.id)[0].settings
    assert loop.counts.steps == 5 and loop.counts.pictures_in_steps == 2 + 3 + 4 + 5


def test_jobs_join_at_any_step_and_other_sizes_take_turns(store: Store, pipe: ImaginePipeline, tmp_path: Path) -> None:
    loop = loop_of(store, pipe, tmp_path)
    first = ask(store, 1, steps=6)
    loop.tick()
    loop._next_look = 0
    second, wide = ask(store, 2, steps=2), ask(store, 3, steps=2, width=64)
    loop.tick()
    assert sorted(len(group.work) for group in loop.groups) == [1, 2]
    drain(loop)
    assert [state(store, job)[0] for job in (first, second, wide)] == ["succeeded"] * 3
    assert store.jobs.pictures_of(wide.id)[0].width == 64


def test_room_limits_how_many_pictures_are_denoised_together(
    store: Store, pipe: ImaginePipeline, tmp_path: Path
) -> None:
    jobs = [ask(store, seed, n=2) for seed in range(3)] + [ask(store, 9, n=7)]
    loop = loop_of(store, pipe, tmp_path, max_batch=4)
    loop.tick()
    assert sum(work.pictures for group in loop.groups for work in group.work) == 4
    drain(loop)
    assert [state(store, job)[0] for job in jobs] == ["succeeded"] * 4
    assert len(store.jobs.pictures_of(jobs[3].id)) == 7


def test_a_step_that_needs_too_much_memory_is_split(
    store: Store, pipe: ImaginePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [ask(store, seed) for seed in range(5)]
    forward, sizes = pipe.unet.forward, list[int]()

    def limited(sample: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(sample))
        if len(sample) > 4:  # two pictures with two passes each
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(sample, *args, **options)

    monkeypatch.setattr(pipe.unet, "forward", limited)
    loop = loop_of(store, pipe, tmp_path)
    drain(loop)
    assert [state(store, job)[0] for job in jobs] == ["succeeded"] * 5
    assert sizes[0] == 10 and max(sizes[1:]) <= 4 and loop.counts.out_of_memory == 1
    monkeypatch.undo()
    fresh = [ask(store, seed) for seed in range(5)]
    drain(loop_of(store, pipe, tmp_path))
    for job, other in zip(jobs, fresh, strict=True):
        assert np.abs(pixels(store, job)[0] - pixels(store, other)[0]).max() <= 1


def test_a_picture_that_never_fits_fails_with_its_reason(
    store: Store, pipe: ImaginePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = pipe.unet.forward

    def limited(sample: torch.Tensor, *args: Any, **options: Any) -> Any:
        if sample.shape[-1] > 4:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")
        return forward(sample, *args, **options)

    monkeypatch.setattr(pipe.unet, "forward", limited)
    wide, small = ask(store, 1, width=64), ask(store, 2)
    drain(loop_of(store, pipe, tmp_path))
    assert state(store, wide) == ("failed", "out_of_memory") and state(store, small) == ("succeeded", None)


def test_a_job_that_cannot_be_drawn_fails_alone(
    store: Store, pipe: ImaginePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ask(store, 1, "per_" + "0" * 32)
    wrong = ask(store, 2, width=33)
    decode = pipe._decode

    def broken(latents: torch.Tensor, output_type: str) -> Any:
        if broken.count == 0:  # type: ignore[attr-defined]
            broken.count = 1  # type: ignore[attr-defined]
            raise KeyError("a bug")
        return decode(latents, output_type)

    broken.count = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(pipe, "_decode", broken)
    faulty, good = ask(store, 3), ask(store, 4)
    drain(loop_of(store, pipe, tmp_path))
    assert state(store, gone) == ("failed", "gone") and state(store, wrong) == ("failed", "invalid_request")
    assert state(store, faulty) == ("failed", "internal") and state(store, good) == ("succeeded", None)
    found = store.jobs.find(faulty.id)
    assert found is not None and "a bug" not in str(found.error)  # which is for the log


def test_a_persona_that_is_deleted_is_not_used_even_if_it_is_cached(
    store: Store, pipe: ImaginePipeline, tmp_path: Path
) -> None:
    persona, loop = add_persona(store, pipe, 7), loop_of(store, pipe, tmp_path)
    first = ask(store, 1, persona)
    for _ in range(20):
        loop.tick()
    store.people.delete_persona(persona, "ann")
    second = ask(store, 1, persona)
    drain(loop)
    assert state(store, first) == ("succeeded", None) and state(store, second) == ("failed", "gone")


def test_a_lost_device_ends_the_worker_and_its_jobs_go_to_another_one(
    store: Store, pipe: ImaginePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ask(store, 1)

    def lost(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.unet, "forward", lost)
        with pytest.raises(DeviceLostError):
            drain(loop_of(store, pipe, tmp_path))
    assert state(store, job)[0] == "running"
    store.jobs.release("w1", 3)
    drain(loop_of(store, pipe, tmp_path))
    found = store.jobs.find(job.id)
    assert found is not None and (found.state, found.attempt) == ("succeeded", 2)


def test_the_result_of_a_lost_attempt_leaves_no_file(store: Store, pipe: ImaginePipeline, tmp_path: Path) -> None:
    loop = loop_of(store, pipe, tmp_path)
    job = ask(store, 1)
    loop.tick()
    store.jobs.release("w1", 3)
    store.jobs.claim("w2", 1, 30.0)
    for _ in range(20):
        loop.tick(admit=False)
    loop._saver.shutdown(wait=True)
    assert state(store, job)[0] == "running" and list(store.files.pictures.iterdir()) == []


def test_a_worker_that_is_stopped_ends_what_it_began_and_gives_back_the_rest(
    store: Store, pipe: ImaginePipeline, tmp_path: Path
) -> None:
    jobs = [ask(store, seed, steps=40) for seed in range(3)]
    worker = Worker(pipe, store, settings_of(tmp_path, max_batch=1, drain=20.0))
    thread = threading.Thread(target=worker.run)
    thread.start()
    for _ in range(600):
        if worker.loop.busy:
            break
        thread.join(0.01)
    worker.stop()
    thread.join(60)
    states = sorted(state(store, job)[0] for job in jobs)
    assert states in (["queued", "queued", "succeeded"], ["queued", "succeeded", "succeeded"])
    assert store.access.living_workers(1e9) == []


def test_reasons_are_sentences_and_faults_are_not_shown() -> None:
    assert describe(torch.OutOfMemoryError("x"))[0] == "out_of_memory"
    code, sentence = describe(KeyError("secret"))
    assert code == "internal" and "secret" not in sentence and sentence.endswith(".")


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_pictures_carry_their_marks_and_the_job_says_which(
    store: Store, pipe: ImaginePipeline, tmp_path: Path, form: str
) -> None:
    persona = add_persona(store, pipe, 1)
    job = ask(store, 5, persona, format=form)
    drain(loop_of(store, pipe, tmp_path))
    (row,) = store.jobs.pictures_of(job.id)
    found = detect(store.files.picture(row.id, row.media))
    assert found.record is not None and found.record["seed"] == 5 and found.record["prompt"] == PROMPT
    assert found.record["people"] == [{"persona": pipe.enroll(tiny.photo(1)).hash, "consent": "not recorded"}]
    (marks,) = result(store, job)["marks"]
    assert marks["settings"] == marks["credentials"] == "on" and found.credentials is not None
    assert marks["watermark"] == "off: unreliable at this size"


def test_an_operator_can_switch_marks_off(store: Store, pipe: ImaginePipeline, tmp_path: Path) -> None:
    job = ask(store, 5)
    drain(loop_of(store, pipe, tmp_path, marks={"settings": False, "credentials": False, "watermark": False}))
    (row,) = store.jobs.pictures_of(job.id)
    found = detect(store.files.picture(row.id, row.media))
    assert found.record is None and found.credentials is None


class FlagsTheFirst:
    """A classifier that flags the first picture that it sees."""

    name = "first"

    def __init__(self) -> None:
        self.seen = 0

    def check_prompt(self, prompt: str, people: int) -> str:
        return ""

    def check_photo(self, image: Any) -> str:
        return ""

    def check_picture(self, image: Any, prompt: str, people: int) -> str:
        self.seen += 1
        return "It is the first." if self.seen == 1 else ""


def test_a_flagged_picture_is_not_saved_and_the_job_says_why(store: Store, tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.safety = FlagsTheFirst()
    job = ask(store, 5, n=2)
    loop = loop_of(store, pipe, tmp_path)
    drain(loop)
    assert state(store, job) == ("succeeded", None)
    assert [row.number for row in store.jobs.pictures_of(job.id)] == [1]
    said = result(store, job)
    assert said["flags"] == ["It is the first.", ""] and said["marks"][0] is None
    pipe.safety.seen = 0
    alone = ask(store, 6)
    drain(loop_of(store, pipe, tmp_path))
    assert state(store, alone) == ("failed", "flagged") and store.jobs.pictures_of(alone.id) == []


def test_a_persona_of_the_server_records_the_consent(store: Store, pipe: ImaginePipeline, tmp_path: Path) -> None:
    upload = Upload(draw_id("upl"), "ann", "photo", "", 64, 64, store.people.clock(), store.people.clock() + 60)
    store.people.add_upload(upload)
    tiny.photo(1).save(store.files.photo(upload.id), "PNG")
    request = {"name": "a", "uploads": [upload.id], "consent": "agreed", "keep": 86_400.0, "temporary": [upload.id]}
    job = admit(store, kind="persona", request=request, seeds=[])
    drain(loop_of(store, pipe, tmp_path))
    assert state(store, job) == ("succeeded", None)
    persona = Persona.load(store.files.persona(result(store, job)["persona"]))
    assert persona.consent is not None and persona.consent.basis == "agreed"
    assert persona.consent.expires == persona.consent.given + timedelta(days=1)
