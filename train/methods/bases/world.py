"""The portrait world's base: an `ImaginePipeline` without its identity adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from imagine.errors import PromptError
from imagine.networks.diffusion import add_noise, logit_normal, timesteps, velocity
from imagine.networks.encoders import TextEncoders
from imagine.networks.weights import fingerprint, quiet_libraries
from imagine.people.faces import FaceFinder, finder_of_drawings
from imagine.pipeline.pipeline import ImaginePipeline
from imagine.pipeline.sampling import pooled_text
from imagine.records import Conditioning
from train.cache.latents import Codec, WorldCodec
from train.data.order import normals
from train.methods.bases.contract import Noised, Predict
from train.methods.bases.text import Reader, TextState, _insertion

TRAIN_TIMESTEPS = 1000


class WorldBase:
    """The base of a folder of imagine's own weights."""

    steps, guidance = 20, 5.0

    def __init__(self, folder: Path, device: torch.device) -> None:
        with quiet_libraries():
            self.pipe = ImaginePipeline.from_pretrained(folder)
        if self.pipe.adapter is not None:
            self.pipe.unload_adapter()
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.pipe.to(self.device)
        self.folder, self.name = folder, "imagine portrait world"
        self.unet: Any = self.pipe.unet
        self.encoders = TextEncoders(
            self.pipe.text_encoder, self.pipe.tokenizer, self.pipe.text_encoder_2, self.pipe.tokenizer_2,
            self.pipe.text_encoder_3, self.pipe.tokenizer_3,
        )  # fmt: skip
        self.text_adapter = self.pipe.text_adapter
        for network in (self.unet, self.pipe.vae, self.encoders.clip, self.encoders.t5, self.encoders.byt5):
            network.requires_grad_(False).eval()
        if self.text_adapter is not None:
            self.text_adapter.requires_grad_(False)
        self.side = int(self.unet.config.sample_size) * self.pipe.vae_scale_factor
        clip = Reader("clip", self.encoders.clip, self.encoders.clip_tokenizer)
        self.readers = (clip, Reader("t5", self.encoders.t5, self.encoders.t5_tokenizer))
        self.mark = "-".join(fingerprint(self.pipe.components[name])[:8] for name in ("unet", "vae", "text_encoder"))

    @cached_property
    def codec(self) -> Codec:
        return WorldCodec(self.folder, self.device)

    @property
    def finder(self) -> FaceFinder:
        return self.pipe.finder

    def fits(self, sentence: str) -> bool:
        window = int(self.encoders.clip.config.max_position_embeddings)
        return len(self.readers[0].ids(sentence)) <= window - 2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        cells = int(self.unet.config.sample_size)
        return int(self.unet.config.in_channels), cells, cells

    def encode(self, pictures: Tensor) -> Tensor:
        return self.pipe.encode_pictures(pictures)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        parts = [self.pipe._decode(some, "pt").cpu() for some in latents.to(self.device).split(16)]
        return torch.cat(parts)

    def text(self, prompts: Sequence[str]) -> TextState:
        clip, others = self.encoders.encode(prompts)
        read: set[str] = set()
        if self.text_adapter is not None:
            read = {spec.name for spec in self.text_adapter.branch_specs}
        insertion = _insertion.get()
        places = None if insertion is None else insertion.places
        if places is not None and places.shape != clip.values.shape[:2]:
            raise PromptError("A prompt with a learnt word must fit into one window of CLIP: shorten it.")
        branches = {name: tokens for name, tokens in others.items() if name in read}
        return TextState(clip, pooled_text(self.unet, clip, others), branches, places)

    def times(self, seed: int, images_seen: int, count: int) -> Tensor:
        return logit_normal(normals(seed, "times", images_seen, count, device=self.device))

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
        return Noised(add_noise(latents, noise, times), timesteps(times), velocity(latents, noise))

    def share(self, steps: Tensor) -> Tensor:
        return steps.float() / TRAIN_TIMESTEPS

    def predict(self, noisy: Tensor, steps: Tensor, text: TextState, identity: Conditioning | None = None) -> Tensor:
        identity = identity or Conditioning()
        branches: Mapping[str, Any] = {**text.branches, **identity.branches}
        conditioning = replace(identity, branches=branches)
        return cast(Tensor, self.unet(
            noisy, steps, encoder_hidden_states=text.clip.values, encoder_attention_mask=text.clip.mask,
            class_labels=text.pooled, cross_attention_kwargs={"conditioning": conditioning},
        ).sample)  # fmt: skip

    def sample(self, noise: Tensor, predict: Predict, steps: int) -> Tensor:
        """Sample with Euler's method along the predicted velocity."""
        latents = noise
        for now, then in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
            step = timesteps(torch.full((len(noise),), now, device=noise.device))
            latents = latents + (then - now) * predict(latents, step)
        return latents

    def faces(self, pictures: Tensor) -> Tensor | None:
        from imagine.evaluation.judge import boxes_by

        return boxes_by(finder_of_drawings(self.pipe.finder))(pictures)
