"""Stable Diffusion 1.5 and XL as a base, in the layout of diffusers."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from imagine.errors import PromptError
from imagine.networks.weights import dtype_argument, quiet_libraries
from imagine.people.faces import FaceFinder, default_finder
from imagine.records import Conditioning, Tokens
from train.bases.stable_diffusion import ddim
from train.data.order import uniforms
from train.data.public_base import BaseCodec, BaseTextEncoders, DiffusersBase
from train.methods.bases.contract import Noised, Predict
from train.methods.bases.text import Reader, TextState, _insertion


class StableDiffusionBase:
    """The base of a folder, or of a hub repository, of Stable Diffusion 1.5 or XL."""

    steps, guidance = 30, 7.5

    def __init__(self, source: DiffusersBase, device: torch.device) -> None:
        self.source, self.device, self.folder, self.name = source, device, source.folder, source.kind
        self.schedule = source.schedule
        with device if device.type == "meta" else torch.device("cpu"):
            self.unet: Any = source.denoiser(device, torch.float32)
        self.unet.to(device).requires_grad_(False).eval()
        self.codec = BaseCodec(source, device)
        scale = 2 ** (len(self.codec.config["block_out_channels"]) - 1)
        self.side = int(self.unet.config.sample_size) * scale
        kind = self._pipeline_class()
        with quiet_libraries():
            self.pipe = kind.from_pretrained(
                source.folder, unet=None, vae=None, use_safetensors=True, local_files_only=True,
                **({} if source.xl else {"safety_checker": None, "requires_safety_checker": False}),
                **{dtype_argument(kind): torch.float32},
            )  # fmt: skip
        first = Reader("clip", self.pipe.text_encoder, self.pipe.tokenizer)
        second = [Reader("clip_2", self.pipe.text_encoder_2, self.pipe.tokenizer_2)] if source.xl else []
        self.readers = (first, *second)
        for reader in self.readers:
            reader.model.to("cpu" if device.type == "meta" else device).requires_grad_(False).eval()

    def _pipeline_class(self) -> Any:
        import diffusers

        return diffusers.StableDiffusionXLPipeline if self.source.xl else diffusers.StableDiffusionPipeline

    @cached_property
    def mark(self) -> str:
        return f"{self.codec.mark}-{BaseTextEncoders(self.source, self.device).mark}"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.codec.shape(self.side)

    @cached_property
    def finder(self) -> FaceFinder:
        return default_finder()

    def fits(self, sentence: str) -> bool:
        return all(len(reader.ids(sentence)) <= int(reader.tokenizer.model_max_length) - 2 for reader in self.readers)

    def encode(self, pictures: Tensor) -> Tensor:
        return torch.cat([self.codec.encode(some * 2 - 1) for some in pictures.split(4)])

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents).cpu()

    def text(self, prompts: Sequence[str]) -> TextState:
        states, pooled = [], None
        for reader in self.readers:
            ids = self._ids(reader, prompts)
            found = reader.model(ids, output_hidden_states=True)
            states.append(found.hidden_states[-2] if self.source.xl else found.last_hidden_state)
            pooled = found[0] if self.source.xl else None
        clip = torch.cat(states, -1)
        if self.source.empty_is_zeros and not all(prompts):
            empty = torch.tensor([not prompt for prompt in prompts], device=clip.device)
            clip = clip.masked_fill(empty.view(-1, 1, 1), 0)
            pooled = None if pooled is None else pooled.masked_fill(empty.view(-1, 1), 0)
        insertion = _insertion.get()
        return TextState(Tokens(clip), pooled, {}, None if insertion is None else insertion.places)

    def _ids(self, reader: Reader, prompts: Sequence[str]) -> Tensor:
        window = int(reader.tokenizer.model_max_length)
        for prompt in prompts:
            if (length := len(reader.ids(prompt))) > window - 2:
                raise PromptError(f"A prompt has {length} tokens, and {window - 2} fit: shorten {prompt[:60]!r}.")
        found = reader.tokenizer(list(prompts), padding="max_length", max_length=window, return_tensors="pt")
        return cast(Tensor, found.input_ids).to(reader.embedding.weight.device)

    def times(self, seed: int, images_seen: int, count: int) -> Tensor:
        return uniforms(seed, "times", images_seen, count, device=self.device)

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
        steps = (times * self.schedule.config.num_train_timesteps).long()
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(latents, noise, steps) if velocity else noise
        return Noised(self.schedule.add_noise(latents, noise, steps), steps, target)

    def share(self, steps: Tensor) -> Tensor:
        return steps.float() / int(self.schedule.config.num_train_timesteps)

    def predict(self, noisy: Tensor, steps: Tensor, text: TextState, identity: Conditioning | None = None) -> Tensor:
        added = None
        if self.source.xl:
            square = [self.side, self.side, 0, 0, self.side, self.side]
            sizes = torch.tensor(square, dtype=torch.float32, device=noisy.device).expand(len(noisy), 6)
            added = {"text_embeds": text.pooled, "time_ids": sizes}
        more = None if identity is None else {"conditioning": identity}
        mask = text.clip.mask
        return cast(Tensor, self.unet(
            noisy, steps, encoder_hidden_states=text.clip.values, encoder_attention_mask=mask,
            added_cond_kwargs=added, cross_attention_kwargs=more,
        ).sample)  # fmt: skip

    def sample(self, noise: Tensor, predict: Predict, steps: int) -> Tensor:
        """Sample with DDIM."""
        return ddim(self.schedule.config, noise, predict, steps)

    def faces(self, pictures: Tensor) -> Tensor | None:
        return None
