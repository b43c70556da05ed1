"""Turn the request of a job into a call of the pipeline: people by id become personas, and photos are encoded."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from imagine.people.persona import Persona
from imagine.pipeline.drawing import Drawing
from imagine.serving.store.people import Upload
from imagine.serving.store.records import Job
from imagine.serving.store.store import Store
from imagine.serving.worker.failures import GoneError
from imagine.serving.worker.saving import load_persona

CACHED = 256  # personas and negative prompts in memory

# Fields of a request, and the argument of a call that each becomes; one that is absent keeps the call's default.
_ARGUMENTS = {
    "steps": "num_inference_steps", "guidance_scale": "guidance_scale",
    "identity_guidance_scale": "identity_guidance_scale", "guidance_rescale": "guidance_rescale",
    "guidance_balance": "guidance_balance", "identity_scale": "identity_scale", "identity_window": "identity_window",
    "identity_blocks": "identity_blocks", "refine_faces": "refine_faces", "layout": "layout", "attempts": "attempts",
    "width": "width", "height": "height",
}  # fmt: skip
# Values that every call has anyway, so that a pipeline without the argument can draw the request too.
_USUAL: dict[str, Any] = {
    "reference": None, "identity_scale": 1.0, "identity_window": [0.0, 1.0], "identity_blocks": "all", "layout": None,
    "attempts": 1,
}  # fmt: skip
_UNUSUAL = object()


class Reader:
    """Reads requests for one pipeline, and keeps what several of them share.

    defaults: arguments of a whole call that a request need not give, such as those of an IP-Adapter's preset.
    """

    def __init__(self, pipe: Any, store: Store, defaults: Mapping[str, Any] | None = None) -> None:
        self.pipe, self.store, self.defaults = pipe, store, dict(defaults or {})
        self._personas: OrderedDict[str, Persona] = OrderedDict()
        self._negatives: OrderedDict[str, Any] = OrderedDict()

    def drawing(self, job: Job) -> Drawing:
        """Prepare the call of a job. Raises ImagineError with one sentence if it cannot be drawn."""
        negative = self._negative(job.request.get("negative_prompt") or "")
        return self.pipe.drawing(**self.arguments(job), negative_prompt_embeds=negative)

    def whole_call(self, job: Job) -> dict[str, Any]:
        """Return the arguments of the call of a public base's pipeline. Raises ImagineError as `drawing` does."""
        given = {name: each for name, each in self.arguments(job).items() if each != _USUAL.get(name, _UNUSUAL)}
        negative = job.request.get("negative_prompt")
        return {**self.defaults, **given, **({"negative_prompt": negative} if negative else {})}

    def arguments(self, job: Job) -> dict[str, Any]:
        """Return the arguments of a call that its request gives, without the negative prompt."""
        request = job.request
        given = {name: request[field] for field, name in _ARGUMENTS.items() if request.get(field) is not None}
        seeded = [torch.Generator().manual_seed(seed) for seed in job.seeds]
        return {
            "prompt": request["prompt"], "reference": self._reference(job), "num_images_per_prompt": job.count,
            "generator": seeded, **given,
        }  # fmt: skip

    def _reference(self, job: Job) -> Any:
        """Return the reference of a call: None, a persona, or a dict of personas by name."""
        people: Mapping[str, Mapping[str, Any]] = job.request.get("people") or {}
        if not people:
            return None
        found = {name: self.persona(job, person) for name, person in people.items()}
        return found[""] if list(found) == [""] else found

    def persona(self, job: Job, person: Mapping[str, Any]) -> Persona:
        """Return one person of a job as a persona, from a stored persona, or from photos and personas' files."""
        if person.get("persona"):
            return self._stored(person["persona"], job.owner)
        photos = [self._upload(each, job.owner) for each in person["uploads"]]
        opened = [
            load_persona(self.store.files.uploaded_persona(each.id))
            if each.kind == "persona"
            else self.store.files.photo(each.id).read_bytes()  # bytes, because a path would be cached and reported
            for each in photos
        ]
        face = person.get("face") or "largest"
        return self.pipe.enroll(
            opened, face=face, on_no_face=person.get("on_no_face") or "error",
            check_identity=bool(person.get("check_identity", True)),
        )  # fmt: skip

    def photo(self, job: Job) -> bytes:
        """Return the photo of a job that checks one."""
        return self.store.files.photo(self._upload(job.request["upload"], job.owner).id).read_bytes()

    def _upload(self, upload: str, owner: str) -> Upload:
        found = self.store.people.upload(upload, owner)
        if found is None:
            raise GoneError("A photo of this job was deleted or its time is over; upload it again.")
        return found

    def _stored(self, persona: str, owner: str) -> Persona:
        if self.store.people.persona(persona, owner) is None:  # also if it is cached: it may be deleted since
            self._personas.pop(persona, None)
            raise GoneError("A persona of this job was deleted or has expired; choose another one.")
        if persona not in self._personas:
            self._personas[persona] = load_persona(self.store.files.persona(persona))
            while len(self._personas) > CACHED:
                self._personas.popitem(last=False)
        self._personas.move_to_end(persona)
        return self._personas[persona]

    def _negative(self, sentence: str) -> Any:
        """Return an encoded negative prompt, which most requests share."""
        if sentence not in self._negatives:
            self._negatives[sentence] = self.pipe.encode_prompt([sentence])
            while len(self._negatives) > CACHED:
                self._negatives.popitem(last=False)
        self._negatives.move_to_end(sentence)
        return self._negatives[sentence]
