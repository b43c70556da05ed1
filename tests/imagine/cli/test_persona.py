"""`imagine persona`: list, show and delete, with what enroll recorded."""

import json
from pathlib import Path

from tests.commands import Run, assert_refused, generate


def test_a_persona_is_enrolled_shown_used_and_deleted(run: Run, weights: Path, photo: Path, tmp_path: Path) -> None:
    me, words = tmp_path / "me.safetensors", tmp_path / "words"
    words.write_text("correct horse\n")
    enroll = ["enroll", photo, "--weights", weights, "--output", me, "--consent", "self", "--consent-note", "by mail"]
    assert run(*enroll)[0] == 0
    assert run(*enroll[:-5], tmp_path / "hidden.safetensors", "--passphrase-file", words)[0] == 0

    code, out, _ = run("persona", "list", tmp_path)
    assert code == 0 and "me.safetensors" in out and "encrypted" in out and "valid" in out
    code, out, _ = run("persona", "show", me, "--weights", weights)
    assert code == 0 and "by mail" in out and "fits the weights:" in out and "self" in out
    hidden = tmp_path / "hidden.safetensors"
    assert "is encrypted" in run("persona", "show", hidden)[1]
    shown = json.loads(run("persona", "show", hidden, "--passphrase-file", words, "--json", "--weights", weights)[1])
    assert shown["references"] == 1 and shown["fits_the_weights"] is True and shown["consent"] is None

    assert_refused(*run(*generate(weights, hidden, tmp_path / "a.png")))
    assert run(*generate(weights, hidden, tmp_path / "a.png", "--passphrase-file", words))[0] == 0

    assert_refused(*run("persona", "delete", me, tmp_path / "words"))
    assert me.exists()  # all are checked before the first is deleted
    code, out, _ = run("persona", "delete", me, hidden)
    assert code == 0 and f"Deleted {me}: a persona from 1 photo(s)" in out and not me.exists() and not hidden.exists()


def test_expiry_and_a_note_need_a_consent(run: Run, photo: Path, tmp_path: Path) -> None:
    code, out, err = run("enroll", photo, "--output", tmp_path / "me.safetensors", "--expires-after", "never")
    assert_refused(code, out, err)
    assert "--consent" in err


def test_an_empty_folder_says_so(run: Run, tmp_path: Path) -> None:
    assert "There is no persona" in run("persona", "list", tmp_path)[1]
    assert_refused(*run("persona", "list", tmp_path / "none"))
