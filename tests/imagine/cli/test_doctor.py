"""`imagine doctor`: the report on the installation, and on a photo."""

import json
from pathlib import Path

from tests.commands import Run


def test_doctor_reports_on_the_installation_and_on_a_photo(run: Run, weights: Path, photo: Path) -> None:
    code, out, _ = run("doctor", "--weights", weights, "--json")
    assert code == 0 and "unet" in json.loads(out)["components"]
    code, out, _ = run("doctor", photo, "--weights", weights, "--json")
    assert code == 0 and len(json.loads(out)["faces"]) == 1
    code, out, _ = run("doctor", photo, "--weights", weights)
    assert code == 0 and "sharpness" in out
