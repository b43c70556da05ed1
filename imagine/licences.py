"""The licences of public bases, adapters and recognisers, from one data file with its sources (licences.yaml)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from imagine.paths import PACKAGE

FILE = PACKAGE / "licences.yaml"
USES = {  # what the values of `commercial` mean, in words
    "yes": "commercial use allowed",
    "restricted": "commercial use allowed, with restrictions",
    "conditional": "commercial use under conditions",
    "no": "no commercial use",
    "unclear": "commercial use unclear",
}


class Licence(BaseModel):
    """One line of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["base", "adapter", "encoder", "recogniser"]
    name: str
    title: str
    hub: tuple[str, ...]
    licence: str
    commercial: Literal["yes", "restricted", "conditional", "no", "unclear"]
    source: str
    note: str = ""

    @property
    def sentence(self) -> str:
        """The licence in one sentence, for people who are about to use the network."""
        details = [USES[self.commercial], *([self.note] if self.note else [])]
        unsure = "; not confirmed, read the licence" if self.source == "not confirmed" else ""
        return f"{self.title}: {self.licence} ({'; '.join(details)}{unsure})."


@functools.cache
def licences() -> tuple[Licence, ...]:
    """Return all lines of the table."""
    return tuple(Licence.model_validate(entry) for entry in yaml.safe_load(FILE.read_text(encoding="utf-8")))


def licence_of(name: str) -> Licence | None:
    """Return the line of a short name, a hub repository, or a folder that is called like one; None without one."""
    exact = (each for each in licences() if name == each.name or name in each.hub)
    folder = (each for each in licences() for hub in each.hub if hub.partition("/")[2].lower() == name.lower())
    return next(exact, None) or next(folder, None)


def licence_sentence(name: str) -> str:
    """Return the licence of a hub repository or short name in one sentence, or the advice to read it."""
    found = licence_of(name)
    return f"{name}: not in the table of licences; read its model card." if found is None else found.sentence


def adapter_card(metadata: Mapping[str, str]) -> str:
    """Return a model card, as a README.md of the hub, for an adapter with these metadata.

    It names the adapter's licence and that of its base, without which the adapter draws nothing.
    """
    base, licence = metadata.get("base_name", "unknown"), metadata.get("licence", "unspecified")
    known = licence_of(base)
    front = {"license": licence.lower() if licence != "unspecified" else "other", "library_name": "diffusers",
             "pipeline_tag": "text-to-image", "tags": ["imagine", "identity", "adapter"]}  # fmt: skip
    if known is not None and known.hub:
        front["base_model"] = known.hub[0]
    stated = "Its licence is not stated" if licence == "unspecified" else f"Its licence is {licence}"
    facts = [f"- {name.replace('_', ' ')}: {metadata[name]}" for name in ("encoder", "tokens") if metadata.get(name)]
    return "\n".join([
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
        f"# An identity adapter for {base if known is None else known.title}", "",
        f"{stated}. It works only together with its base and the vision encoder in `image_encoder/`.", "",
        f"- base: {licence_sentence(base)}", *facts, "",
        "Draw with it: `imagine generate --base BASE --adapter THIS_FOLDER --reference me.jpg --prompt ...`", "",
    ])  # fmt: skip


def base_names() -> Sequence[str]:
    """Return the short names of public bases."""
    return [each.name for each in licences() if each.kind == "base" and each.hub]
