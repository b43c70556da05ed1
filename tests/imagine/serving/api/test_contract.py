"""The native API against a real server with a tiny pipeline: every resource, waiting, events, limits and owners."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagine.pipeline.pipeline import ImaginePipeline
from imagine.serving.store.jobs import Admission
from tests import tiny
from tests.imagine.serving.servers import Running, ended, opened, photo, running

PROMPT: dict[str, Any] = {"prompt": "a person smiling on a beach", "steps": 2}
WAIT = {"prefer": "wait=60"}


@pytest.fixture(scope="module")
def pipe() -> ImaginePipeline:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def server(pipe: ImaginePipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server"), pipe) as found:
        yield found


@pytest.fixture(scope="module")
def ann(server: Running) -> str:
    """Return the id of a persona."""
    with server.client() as client:
        files = [("photos", ("a.png", photo(1))), ("photos", ("b.png", photo(2)))]
        made = client.post("/v1/personas", data={"name": "Ann", "consent": "self"}, files=files)
        assert made.status_code == 201, made.text
        assert made.headers["location"] == f"/v1/personas/{made.json()['id']}" and made.json()["photos"] == 2
        return str(made.json()["id"])


def events(client: Any, job: str, **headers: str) -> list[dict[str, Any]]:
    """Return the events of a job that has ended, or that ends."""
    found = []
    for block in client.get(f"/v1/jobs/{job}/events", headers=headers).text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "event" in lines:
            found.append({"id": lines.get("id"), "event": lines["event"], **json.loads(lines["data"])})
    return found


def eventually(holds: Callable[[], bool], within: float = 30.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + within
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_picture_is_drawn_as_the_library_draws_it(server: Running, pipe: ImaginePipeline, ann: str) -> None:
    with server.client() as client:
        asked = client.post("/v1/pictures", json={**PROMPT, "persona": ann, "seed": 7})
        assert asked.status_code == 202 and asked.headers["location"] == asked.json()["url"]
        job = ended(client, asked.json()["id"])
        (picture,) = job["pictures"]
        image = opened(client.get(picture["url"]).content)
        file = client.get(f"/v1/personas/{ann}/file").content
    from imagine import Persona

    path = server.settings.folder / "ann.safetensors"
    path.write_bytes(file)
    wanted = pipe(
        PROMPT["prompt"], reference=Persona.load(path), num_inference_steps=2, generator=tiny.generator(7)
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(image), np.asarray(wanted))
    assert (picture["seed"], picture["settings"]["steps"], picture["settings"]["n"]) == (7, 2, 1)
    assert (picture["width"], picture["height"], picture["media_type"]) == (32, 32, "image/png")


def test_a_client_can_wait_and_get_several_pictures_with_seeds_of_their_own(server: Running) -> None:
    with server.client() as client:
        body = {**PROMPT, "n": 3, "format": "jpeg"}
        answer = client.post("/v1/pictures", json=body, headers=WAIT)
        assert answer.status_code == 200 and answer.json()["state"] == "succeeded"
        pictures = answer.json()["pictures"]
        first = pictures[0]["seed"]
        assert [each["seed"] for each in pictures] == [first, first + 1, first + 2]
        contents = [client.get(each["url"]) for each in pictures]
        assert {each.headers["content-type"] for each in contents} == {"image/jpeg"}
        assert len({each.content for each in contents}) == 3
        again = client.post("/v1/pictures", json={**body, "seed": first}, headers=WAIT).json()["pictures"]
        # The files differ, because content credentials hold the time at which they were signed.
        for one, other in zip(contents, again, strict=True):
            assert opened(one.content).tobytes() == opened(client.get(other["url"]).content).tobytes()


def test_photos_in_the_request_are_used_and_then_deleted(server: Running) -> None:
    with server.client() as client:
        files = [("photos[a]", ("a.png", photo(1))), ("photos[b]", ("b.jpg", photo(2, "JPEG")))]
        data = {"request": json.dumps({"prompt": "{a} hugs {b}", "steps": 2})}
        job = client.post("/v1/pictures", data=data, files=files, headers=WAIT).json()
    assert job["state"] == "succeeded", job
    assert [face["reference"] for face in job["result"]["faces"]] == ["a: photo 1", "b: photo 1"]
    uploads = [person["uploads"][0] for person in job["request"]["people"].values()]
    eventually(lambda: not any(server.store.files.photo(each).exists() for each in uploads))
    assert [server.store.people.upload(each, "local") for each in uploads] == [None, None]


def test_events_show_progress_and_previews_and_can_be_continued(server: Running) -> None:
    with server.client() as client:
        job = client.post("/v1/pictures", json={**PROMPT, "steps": 40, "previews": 2}).json()["id"]
        seen = events(client, job)
        kinds = [each["event"] for each in seen if each["event"] != "position"]
        assert kinds[:2] == ["queued", "started"] and kinds[-1] == "succeeded" and "progress" in kinds
        ids = [int(each["id"]) for each in seen if each["id"]]
        assert ids == sorted(ids)
        rest = events(client, job, **{"last-event-id": str(ids[1])})
        assert rest[0]["event"] == "progress" and {int(each["id"]) for each in rest} <= set(ids)
        assert not any(each["event"] == "preview" for each in rest)  # which are not kept after the end


def test_a_job_is_canceled_by_its_id_and_others_go_on(server: Running) -> None:
    with server.client() as client:
        first, second = (
            client.post("/v1/pictures", json={**PROMPT, "steps": steps}).json()["id"] for steps in (150, 20)
        )
        assert client.post(f"/v1/jobs/{first}/cancel").status_code == 200
        assert ended(client, first)["state"] == "canceled"
        assert ended(client, second)["state"] == "succeeded"
        again = client.post(f"/v1/jobs/{second}/cancel")
        assert again.status_code == 200 and again.json()["state"] == "succeeded"


def test_a_client_that_leaves_while_it_waits_cancels_its_job(server: Running) -> None:
    from httpx2 import ReadTimeout

    with server.client() as client:
        with pytest.raises(ReadTimeout):
            client.post("/v1/pictures", json={**PROMPT, "steps": 150}, headers=WAIT, timeout=0.5)
        (job,) = client.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
        assert ended(client, job["id"])["state"] == "canceled"


def test_personas_are_listed_renamed_and_really_deleted(server: Running) -> None:
    with server.client() as client:
        upload = client.post("/v1/uploads", files=[("photos", ("a.png", photo(5)))]).json()[0]["id"]
        made = client.post("/v1/personas", json={"name": "Bob", "uploads": [upload], "keep_days": 2}).json()
        assert made["expires"] - made["created"] == pytest.approx(2 * 86_400)
        renamed = client.patch(f"/v1/personas/{made['id']}", json={"name": "Robert"}).json()
        assert renamed["name"] == "Robert"
        assert made["id"] in [each["id"] for each in client.get("/v1/personas").json()["personas"]]
        file = client.get(f"/v1/personas/{made['id']}/file").content
        path = server.store.files.persona(made["id"])
        assert path.exists() and client.delete(f"/v1/personas/{made['id']}").status_code == 204
        assert not path.exists()
        for method, url in (("get", ""), ("delete", ""), ("get", "/file")):
            assert getattr(client, method)(f"/v1/personas/{made['id']}{url}").status_code == 404
        lost = client.post("/v1/pictures", json={**PROMPT, "persona": made["id"]})
        assert (lost.status_code, lost.json()["error"]["code"]) == (404, "not_found")
        back = client.post("/v1/personas", data={"name": "Back"}, files=[("photos", ("p.safetensors", file))])
        assert back.status_code == 201 and back.json()["encoder"] == made["encoder"]


def test_a_photo_can_be_checked_before_it_is_used(server: Running) -> None:
    with server.client() as client:
        upload = client.post("/v1/uploads", files=[("photos", ("a.png", photo(6)))]).json()[0]
        assert (upload["kind"], upload["width"], upload["height"]) == ("photo", 64, 64)
        report = client.post("/v1/photos/check", json={"upload": upload["id"]}).json()
        assert report["used"] == 0 and len(report["faces"]) == 1 and report["crop_png"]
        assert "name" not in report
        assert client.delete(f"/v1/uploads/{upload['id']}").status_code == 204
        assert client.post("/v1/photos/check", json={"upload": upload["id"]}).status_code == 404


def test_a_photo_is_shown_as_it_was_understood_and_the_job_of_a_check_leaves_no_face(server: Running) -> None:
    with server.client() as client:
        upload = client.post("/v1/uploads", files=[("photos", ("a.png", photo(6)))]).json()[0]["id"]
        shown = client.get(f"/v1/uploads/{upload}/content")
        assert shown.headers["content-type"] == "image/png" and opened(shown.content).size == (64, 64)
        assert client.post("/v1/photos/check", json={"upload": upload}).json()["turned"] == 0
        assert client.post("/v1/photos/check", json={"upload": upload, "face": 5}).status_code == 422
        assert client.get("/v1/jobs", params={"kind": "photo"}).json()["jobs"] == []
        keyed = {"idempotency-key": "check"}
        twice = [client.post("/v1/photos/check", json={"upload": upload}, headers=keyed).json() for _ in range(2)]
        assert twice[0] == twice[1]
        client.delete(f"/v1/uploads/{upload}")
        assert client.get(f"/v1/uploads/{upload}/content").status_code == 404


def test_each_photo_of_a_person_may_have_a_face_of_its_own(server: Running) -> None:
    with server.client() as client:
        made = client.post("/v1/uploads", files=[("photos", ("a.png", photo(1))), ("photos", ("b.png", photo(2)))])
        uploads = [each["id"] for each in made.json()]
        body = {**PROMPT, "label": "mine", "people": {"a": {"uploads": uploads, "face": [0, "largest"]}}}
        job = client.post("/v1/pictures", json=body, headers=WAIT).json()
        assert job["state"] == "succeeded" and job["request"]["label"] == "mine", job
        assert "label" not in job["pictures"][0]["settings"]
        body["people"]["a"]["face"] = [0, 3]
        assert client.post("/v1/pictures", json=body, headers=WAIT).json()["error"]["code"] == "face_not_usable"
        for wrong in ([0], [0, 0, 0], []):
            body["people"]["a"]["face"] = wrong
            assert client.post("/v1/pictures", json=body).status_code == 422
        form = {"request": json.dumps({"name": "Ann", "face": ["largest", 0]})}
        files = [("photos", ("a.png", photo(1))), ("photos", ("b.png", photo(2)))]
        assert client.post("/v1/personas", data=form, files=files).status_code == 201


def test_several_jobs_are_followed_in_one_stream(server: Running) -> None:
    with server.client() as client:
        jobs = [client.post("/v1/pictures", json={**PROMPT, "steps": 6}).json()["id"] for _ in range(3)]
        lines = client.get("/v1/events", params={"job": jobs}).text.split("\n\n")
        seen = [json.loads(line.partition("data: ")[2]) for line in lines if "event: succeeded" in line]
        assert {each["job"] for each in seen} == set(jobs)
        last = next(line for line in lines if "event: succeeded" in line and jobs[0] in line)
        number = int(last.split("id: ")[1].split("\n")[0])
        rest = client.get("/v1/events", params={"job": [f"{jobs[0]}.{number - 1}", jobs[1]]}).text
        assert rest.count(jobs[0]) == 1 and rest.count(jobs[1]) > 1
        assert client.get("/v1/events", params={"job": [jobs[0], "job_" + "0" * 32]}).status_code == 404
        assert client.get("/v1/events", params={"job": ["x"]}).status_code == 422
        assert client.get("/v1/events").status_code == 422


def test_the_server_describes_itself(server: Running) -> None:
    with server.client() as client:
        found = client.get("/v1/server").json()
    assert found["model"]["side"] == 32 and found["model"]["most_people"] == 4 and "encoder" not in found["model"]
    assert found["limits"]["max_pictures"] == 10 and found["keep_seconds"]["photos"] == 3600
    assert (found["key_needed"], found["weights"], found["examples"]) == (False, None, [])


def test_pages_are_served_beside_the_api(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.html").write_text("<title>pages</title>")
    (tmp_path / "weights" / "examples").mkdir(parents=True)
    (tmp_path / "weights" / "examples" / "a b.png").write_bytes(photo(1))
    settings: dict[str, Any] = {"app": tmp_path / "pages", "weights": tmp_path / "weights"}
    with running(tmp_path / "state", **settings) as pages, pages.client() as client:
        assert "pages" in client.get("/").text
        found = client.get("/v1/server").json()
        assert found["model"] is None and found["weights"] == str(tmp_path / "weights")
        (example,) = found["examples"]
        assert client.get(example).content == photo(1)
        assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"


def test_pictures_and_jobs_can_be_deleted(server: Running) -> None:
    with server.client() as client:
        job = client.post("/v1/pictures", json={**PROMPT, "n": 2}, headers=WAIT).json()
        first, second = job["pictures"]
        paths = [server.store.files.picture(each["id"], "image/png") for each in (first, second)]
        assert client.get(f"/v1/pictures/{first['id']}").json() == first
        assert client.delete(f"/v1/pictures/{first['id']}").status_code == 204
        assert [path.exists() for path in paths] == [False, True]
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
        assert not paths[1].exists() and client.get(job["url"]).status_code == 404
        assert client.get(second["url"]).status_code == 404


def test_an_idempotency_key_gives_one_job_also_with_photos(server: Running) -> None:
    with server.client() as client:
        headers = {"idempotency-key": "k1"}
        made = [
            client.post("/v1/pictures", data=PROMPT, files=[("photos", ("a.png", photo(1)))], headers=headers)
            for _ in range(2)
        ]
        assert made[0].json()["id"] == made[1].json()["id"]
        other = client.post("/v1/pictures", json=PROMPT, headers=headers)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
        assert other.headers["x-should-retry"] == "false"


def test_jobs_are_listed_page_by_page(server: Running) -> None:
    with server.client() as client:
        made = [client.post("/v1/pictures", json=PROMPT).json()["id"] for _ in range(3)]
        first = client.get("/v1/jobs", params={"limit": 2}).json()
        rest = client.get("/v1/jobs", params={"limit": 1, "cursor": first["next"]}).json()
        assert [each["id"] for each in (*first["jobs"], *rest["jobs"])] == made[::-1]
        for job in made:
            ended(client, job)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 422, "prompt"),
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": "x", "stepz": 3}, 422, "stepz"),
        ({"prompt": "x", "steps": 1000}, 422, "steps"),
        ({"prompt": "x", "width": 33}, 422, "width"),
        ({"prompt": "x", "height": 4096}, 422, "height"),
        ({"prompt": "x", "n": 11}, 422, "n"),
        ({"prompt": "x", "seed": -1}, 422, "seed"),
        ({"prompt": "x", "guidance_scale": 1e9}, 422, "guidance_scale"),
        ({"prompt": "{a} waves"}, 422, "prompt"),
        ({"prompt": "{a} waves", "people": {"b": {"persona": "per_" + "0" * 32}}}, 422, "prompt"),
        ({"prompt": "x", "people": {"a": {}}}, 422, "people.a"),
        ({"prompt": "x", "persona": "../../etc/passwd"}, 422, "persona"),
        ({"prompt": "x", "persona": "per_" + "0" * 32}, 404, None),
        ({"prompt": "x", "identity_window": [0.9, 0.1]}, 422, None),
    ],
)
def test_a_wrong_request_is_refused_with_the_field_that_is_wrong(
    server: Running, body: dict[str, Any], status: int, param: str | None
) -> None:
    with server.client() as client:
        answer = client.post("/v1/pictures", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert error["message"].endswith(".") and answer.headers["x-should-retry"] == "false"


def test_a_job_that_cannot_be_drawn_fails_with_the_librarys_sentence(server: Running) -> None:
    from imagine.people.faces import KnownBoxesFinder

    assert server.worker is not None
    pipe = server.worker.loop.pipe
    pipe.finder, before = KnownBoxesFinder([]), pipe.finder
    try:
        with server.client() as client:
            files = [("photos", ("a.png", photo(1)))]
            job = client.post("/v1/pictures", data=PROMPT, files=files, headers=WAIT).json()
            assert job["state"] == "failed" and job["error"]["code"] == "face_not_usable"
            refused = client.post("/v1/personas", data={"name": "X"}, files=files)
            assert refused.status_code == 422 and "face" in refused.json()["error"]["message"]
    finally:
        pipe.finder = before


def test_health_readiness_and_numbers(server: Running) -> None:
    with server.client() as client:
        assert client.get("/healthz").json()["status"] == "ok"
        ready = client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["workers"][0]["side"] == 32
        client.post("/v1/pictures", json=PROMPT, headers=WAIT)
        server.worker.beat() if server.worker else None
        text = client.get("/metrics").text
    assert 'imagine_jobs{kind="pictures",state="succeeded"}' in text and "imagine_workers 1.0" in text
    assert 'route="/v1/pictures"' in text and "smiling" not in text


def test_each_key_sees_its_own_things_only(pipe: ImaginePipeline, tmp_path: Path) -> None:
    with running(tmp_path, pipe) as first:
        keys = [first.store.access.create_key(name) for name in ("ann", "bob")]
    with running(tmp_path, pipe) as server, server.client(keys[0]) as ann, server.client(keys[1]) as bob:
        with server.client() as nobody, server.client("imagine_0_0") as wrong:
            for client in (nobody, wrong):
                refused = client.get("/v1/jobs")
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_key"
            assert nobody.get("/healthz").status_code == 200 and nobody.get("/metrics").status_code == 401
        files = [("photos", ("a.png", photo(1)))]
        assert ann.post("/v1/personas", data={"name": "A"}, files=files).json()["error"]["param"] == "consent"
        persona = ann.post("/v1/personas", data={"name": "A", "consent": "self"}, files=files).json()["id"]
        upload = ann.post("/v1/uploads", files=files).json()[0]["id"]
        job = ann.post("/v1/pictures", json={**PROMPT, "persona": persona}, headers=WAIT).json()
        picture = job["pictures"][0]
        for url in (job["url"], job["events_url"], picture["url"], f"/v1/pictures/{picture['id']}",
                    f"/v1/personas/{persona}", f"/v1/personas/{persona}/file"):  # fmt: skip
            assert (ann.get(url).status_code, bob.get(url).status_code) == (200, 404)
        for url in (job["url"], f"/v1/personas/{persona}", f"/v1/uploads/{upload}"):
            assert bob.delete(url).status_code == 404
        assert bob.post(f"{job['url']}/cancel").status_code == 404
        assert bob.patch(f"/v1/personas/{persona}", json={"name": "B"}).status_code == 404
        for body in ({"persona": persona}, {"uploads": [upload]}):
            assert bob.post("/v1/pictures", json={**PROMPT, **body}).status_code == 404
        assert bob.post("/v1/personas", json={"name": "B", "consent": "self", "uploads": [upload]}).status_code == 404
        assert bob.get("/v1/jobs").json()["jobs"] == [] and bob.get("/v1/personas").json()["personas"] == []
        assert server.store.access.revoke_key(server.store.access.list_keys()[0].id)
        assert ann.get("/v1/jobs").status_code == 401


def test_limits_of_rate_and_queue(tmp_path: Path) -> None:
    with running(tmp_path, requests_per_minute=3, max_queue_per_owner=2) as server, server.client() as client:
        answers = [client.post("/v1/pictures", json=PROMPT) for _ in range(4)]
        assert [each.status_code for each in answers] == [202, 202, 429, 429]
        codes = [each.json()["error"]["code"] for each in answers[2:]]
        assert codes == ["queue_full", "rate_limited"]
        assert all(each.headers["x-should-retry"] == "true" and each.headers["retry-after"] for each in answers[2:])
        assert client.get("/readyz").status_code == 503  # there is no worker
        positions = [client.get(f"/v1/jobs/{each.json()['id']}").json()["position"] for each in answers[:2]]
        assert positions == [1, 2]


def test_a_stream_ends_when_the_server_is_stopped_and_the_job_waits(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        with server.client() as client:
            job = client.post("/v1/pictures", json=PROMPT).json()["id"]
        lines: list[str] = []

        def follow() -> None:
            with server.client() as client, client.stream("GET", f"/v1/jobs/{job}/events") as stream:
                lines.extend(stream.iter_lines())

        thread = threading.Thread(target=follow)
        thread.start()
        eventually(lambda: "event: position" in lines)
    thread.join(20)
    assert not thread.is_alive() and "event: queued" in lines and "event: position" in lines
    with running(tmp_path) as server:
        found = server.store.jobs.find(job)
        assert found is not None and found.state == "queued"


def test_a_repeated_request_of_openais_client_joins_the_first(tmp_path: Path) -> None:
    with running(tmp_path) as server, server.client() as client:
        first = client.post("/v1/pictures", json=PROMPT).json()["id"]
        again = client.post("/v1/pictures", json=PROMPT, headers={"x-stainless-retry-count": "1"}).json()["id"]
        other = client.post("/v1/pictures", json={**PROMPT, "steps": 3}, headers={"x-stainless-retry-count": "1"})
        assert again == first != other.json()["id"]
        assert server.store.jobs.retry_of("nobody", Admission("nobody", "pictures", {}, [1], 1, 1), 0) is None
