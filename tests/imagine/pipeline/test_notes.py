"""Tests of the notes of a call."""

from imagine.pipeline.notes import PORTRAIT_WORLD, world_notes
from imagine.world import VERSION
from tests import tiny


def test_weights_of_an_earlier_world_give_a_note() -> None:
    adapter = tiny.identity_adapter(tiny.denoiser())
    assert world_notes(None) == world_notes(adapter) == []
    adapter.metadata = {"base": PORTRAIT_WORLD, "world": VERSION}
    assert world_notes(adapter) == []
    adapter.metadata = {"base": PORTRAIT_WORLD}
    assert world_notes(adapter)[0].startswith(
        f"These weights were trained in portrait-world-1, and this version renders {VERSION}"
    )
