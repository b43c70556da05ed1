"""Jobs on a public base: one call each, with progress, cancellation and records."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagine.errors import ConfigError
from imagine.serving.settings import BaseSettings
from imagine.serving.store.store import Store
from imagine.serving.worker.loading import facts_of, load_pipeline
from imagine.serving.worker.loop import Loop
from imagine.serving.worker_counts import Counts
from tests import tiny_stock
from tests.imagine.serving.stores import settings_of
from tests.imagine.serving.worker.test_loop import add_persona, ask, drain, pixels, result, state


@pytest.fixture(scope="module", params=[False, True], ids=["sd15", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return tiny_stock.personal(tiny_stock.stock(xl=request.param))


def loop_of(store: Store, pipe: Any, tmp_path: Path, **more: Any) -> Loop:
    return Loop(pipe, store, settings_of(tmp_path, base=BaseSettings(name="tiny"), **more), "w1", Counts())


def test_a_job_gives_the_pictures_of_the_call(store: Store, pipe: Any, tmp_path: Path) -> None:
    persona = add_persona(store, pipe, 1)
    job = ask(store, 5, persona, n=2, negative_prompt="blurry", identity_scale=0.7, identity_blocks="all", previews=2)
    drain(loop_of(store, pipe, tmp_path))
    assert state(store, job) == ("succeeded", None)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    wanted = pipe(
        job.request["prompt"], reference=str(store.files.persona(persona)), num_inference_steps=3, generator=generators,
        num_images_per_prompt=2, negative_prompt="blurry", identity_scale=0.7,
    ).images  # fmt: skip
    for one, other in zip(pixels(store, job), wanted, strict=True):
        assert np.abs(one - np.asarray(other, dtype=int)).max() <= 1
    said = result(store, job)
    assert [marks["settings"] for marks in said["marks"]] == ["on", "on"] and len(said["faces"]) == 1
    assert "A public base shows no previews." in said["notes"]


def test_progress_is_stored_and_a_canceled_job_stops(store: Store, pipe: Any, tmp_path: Path) -> None:
    loop = loop_of(store, pipe, tmp_path)
    job, other = ask(store, 1, steps=100), ask(store, 2)
    report = store.jobs.report

    def cancel_at_first_report(progress: Any, previews: Any) -> None:
        report(progress, previews)
        store.jobs.cancel(job.id, "ann")

    store.jobs.report = cancel_at_first_report  # type: ignore[method-assign]
    drain(loop)
    assert state(store, job)[0] == "canceled" and store.jobs.pictures_of(job.id) == []
    assert loop.counts.steps < 100
    assert state(store, other) == ("succeeded", None)
    assert not pipe._interrupt or pipe.interrupt


def test_a_setting_that_the_base_lacks_is_one_sentence(store: Store, pipe: Any, tmp_path: Path) -> None:
    job = ask(store, 1, guidance_balance=True)
    drain(loop_of(store, pipe, tmp_path))
    assert state(store, job) == ("failed", "invalid_request")
    found = store.jobs.find(job.id)
    assert found is not None and "does not take guidance_balance" in str(found.error)


def test_clients_learn_the_bases_size_and_defaults(pipe: Any) -> None:
    facts = facts_of(pipe, BaseSettings(name="somewhere/tiny"))
    assert (facts["model"], facts["side"], facts["steps"]) == ("tiny", 16, 50)
    assert facts["guidance_scale"] == (7.5 if "XL" not in type(pipe).__name__ else 5.0) and facts["multiple"] == 8


def test_a_worker_opens_a_base_with_its_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny_stock.personal(tiny_stock.stock()).save_pretrained(folder)
    base = BaseSettings(name=str(folder))
    loaded = load_pipeline(settings_of(tmp_path, base=base, device="cpu"))
    assert loaded.adapter is not None and not hasattr(loaded, "drawing")
    assert facts_of(loaded, base)["model"] == "base"


def test_a_base_that_shows_nobody_is_refused(tmp_path: Path) -> None:
    pipe = tiny_stock.personal(tiny_stock.stock())
    pipe.unload_adapter()
    pipe.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="shows nobody without"):
        load_pipeline(settings_of(tmp_path, base=BaseSettings(name=str(tmp_path / "base")), device="cpu"))
