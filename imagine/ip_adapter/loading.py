"""diffusers' IP-Adapter interface for pipelines whose denoiser has our attention; a drop-in replacement.

    pipe.load_ip_adapter("h94/IP-Adapter", subfolder="models", weight_name="ip-adapter-plus-face_sd15.safetensors")
    pipe.set_ip_adapter_scale(0.6)
    pipe(prompt, ip_adapter_image=photo)      # or reference=photo, which finds the face

Arguments, defaults and pictures are those of diffusers (loaders/ip_adapter.py). The differences: files are read
strictly, keys and values are computed once per picture instead of at every step, scales and masks belong to the call,
and one denoiser can have IP-Adapters and our own adapters together.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from imagine.adapter.adapter import Adapter
from imagine.adapter.attention import attention_layers
from imagine.adapter.holder import AdapterHolderMixin
from imagine.errors import ConfigError, WeightsError
from imagine.ip_adapter.reading import (
    ENCODER_FOLDER,
    ImportReport,
    IPAdapterFile,
    check_encoder,
    import_adapter,
    load_encoder,
    read_ip_adapter,
)
from imagine.networks.device import execution_device
from imagine.networks.weights import HUB_OPTIONS
from imagine.people.crops import CROPS
from imagine.people.readings import Reading
from imagine.records import Scale, Tokens
from imagine.request import check_choice, finite

# Weights are never initialised twice, and hub clients read the proxy settings themselves.
IGNORED_OPTIONS = ("low_cpu_mem_usage", "proxies")
DEFAULT_SIDE = 224  # side of the crops in pixels without an encoder

Scales = dict[str, "Scale | Mapping[str, Scale]"]

_FACE_LORA = re.compile(r"faceid_\d+")  # the names that diffusers gives to the LoRA of FaceID files


class IPAdapterLoaderMixin(AdapterHolderMixin):
    """Pipeline mixin that loads IP-Adapters and computes the tokens, scales and regions of their branches.

    It must precede the stock pipeline among the base classes, because it uses its `encode_image`. `ip_adapters` are
    attached to the denoiser, with one branch each: "ip_0", "ip_1", ...
    """

    image_encoder: Any
    feature_extractor: Any
    ip_adapters: Sequence[Adapter] = ()
    _ip_scales: Sequence[Any] = ()  # one per adapter, in diffusers' expanded form

    # --- loading ----------------------------------------------------------------------------------------------------

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        subfolder: "str | list[str] | None" = None,
        weight_name: "str | list[str] | None" = None,
        image_encoder_folder: str | None = ENCODER_FOLDER,
        **kwargs: Any,
    ) -> list[ImportReport]:
        """Load one or several IP-Adapters, replacing those already loaded. Return a report for each file.

        The arguments are those of diffusers' load_ip_adapter: a hub id or folder with subfolder and weight_name, or a
        state dict, or lists of these; a path of a file also works. If the pipeline has no image encoder, or one that
        does not fit the adapters, the encoder is loaded from image_encoder_folder (inside subfolder, unless it contains
        a slash); None loads no encoder. Two arguments are ours, each one value for all or a list: reference_crop is the
        part of a photo that `reference=` gives to the adapter (`imagine.people.crops`), and shortcut is true for FaceID
        Plus v2. By default the name and the layout of a file decide (`imagine.ip_adapter.references`). Raises
        WeightsError or ConfigError, and then leaves the pipeline unchanged.
        """
        self._check_can_load()
        sources, subfolders, names = _lists(pretrained_model_name_or_path_or_dict, subfolder, weight_name)
        crops = _per_file("reference_crop", kwargs.pop("reference_crop", None), len(sources))
        for crop in filter(None, crops):
            check_choice("reference_crop", crop, CROPS)
        shortcuts = _per_file("shortcut", kwargs.pop("shortcut", None), len(sources))
        hub = _hub_options(kwargs)
        files = [read_ip_adapter(*each, **hub) for each in zip(sources, subfolders, names, strict=True)]
        made = [
            import_adapter(file, self.denoiser, f"ip_{number}", crops[number], shortcuts[number])
            for number, file in enumerate(files)
        ]
        encoder = self._encoder_for(files, sources, subfolders, image_encoder_folder, hub)
        if encoder is not None:
            for file in files:
                check_encoder(file.layout, encoder)
        self._detach_ip_adapters()
        self._register(encoder)
        for adapter, _ in made:
            adapter.to(self.unet.device, self.unet.dtype).eval().attach(self.denoiser)
            self.ip_adapters = [*self.ip_adapters, adapter]
        self._ip_scales = [1.0] * len(made)
        return [report for _, report in made]

    def _remove_face_id_lora(self) -> None:
        """Remove the LoRA of FaceID files that diffusers loaded, which it leaves on."""
        loaded = getattr(self.denoiser, "peft_config", None) or ()
        if names := [name for name in loaded if _FACE_LORA.fullmatch(name)]:
            cast(Any, self).delete_adapters(names)
            if not getattr(self.denoiser, "peft_config", None):  # the wrapped layers would be saved under other names
                self.denoiser.unload_lora()

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Set the scales of the IP-Adapters: a number, a dict of blocks, or a list with one of these per adapter.

        In a dict such as {"down": {"block_2": [0.0, 1.0]}, "mid": 0.5} a block that is not named gets 0, as in
        diffusers. A list inside the list gives each image of an adapter its own scale, which needs masks. Without
        IP-Adapters the call has no effect, as in diffusers. If diffusers loaded the IP-Adapters, it sets their scales.
        Raises ConfigError if the scales do not fit the adapters or the denoiser.
        """
        from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

        if self._has_stock_ip_adapter or self.ip_adapters:
            scale = _read_scales(scale, self._require_denoiser())
        if self._has_stock_ip_adapter:
            try:
                return cast(None, cast(Any, super()).set_ip_adapter_scale(scale))
            except (ValueError, KeyError) as error:
                raise ConfigError(f"These scales do not fit the IP-Adapters: {str(error).rstrip('.')}.") from error
        if not self.ip_adapters:
            return None
        given = scale if isinstance(scale, list) else [scale]
        if len(given) != len(self.ip_adapters):
            raise ConfigError(
                f"There are {len(given)} scales for {len(self.ip_adapters)} IP-Adapters: give one for each, as a list."
            )
        try:
            expanded = _maybe_expand_lora_scales(self.denoiser, given, default_scale=0.0)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"These scales do not fit the denoiser: {str(error).rstrip('.')}.") from error
        self._ip_scales = [
            _by_layer(each, adapter) if isinstance(each, Mapping) else each
            for each, adapter in zip(expanded, self.ip_adapters, strict=True)
        ]
        return None

    def unload_ip_adapter(self) -> None:
        """Remove all IP-Adapters from the denoiser and the image encoder from the pipeline, as diffusers does.

        The LoRA of a FaceID file is removed too, also if diffusers loaded it, which leaves it on.
        """
        pipe = cast(Any, self)
        if self._has_stock_ip_adapter:
            cast(Any, super()).unload_ip_adapter()
        self._remove_face_id_lora()
        self._detach_ip_adapters()
        if getattr(self, "image_encoder", None) is not None:
            self.image_encoder = None
            pipe.register_to_config(image_encoder=[None, None])
        if not hasattr(self, "safety_checker") and getattr(self, "feature_extractor", None) is not None:
            self.feature_extractor = None  # only the safety checker still needs it
            pipe.register_to_config(feature_extractor=[None, None])

    @property
    def _has_stock_ip_adapter(self) -> bool:
        """Whether diffusers' own IP-Adapter is on the denoiser, loaded before the pipeline gained `reference=`."""
        return getattr(getattr(self.unet, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj"

    def _check_can_load(self) -> None:
        """Raise ConfigError if the pipeline has no denoiser, or one whose weights are not in memory."""
        if self._require_denoiser().device.type == "meta":
            raise ConfigError("The denoiser is offloaded: load adapters before enable_sequential_cpu_offload.")

    def _detach_ip_adapters(self) -> None:
        for adapter in self.ip_adapters if self.denoiser is not None else ():
            adapter.release(self.denoiser)
        self.ip_adapters, self._ip_scales = [], []

    def _encoder_for(
        self,
        files: Sequence[IPAdapterFile],
        sources: Sequence[Any],
        subfolders: Sequence[str | None],
        folder: str | None,
        hub: Mapping[str, Any],
    ) -> Any:
        """Return the pipeline's image encoder if it fits, else the one next to the first file that needs one.

        With a `folder` of None, return the pipeline's own encoder, which may be None.
        """
        present = getattr(self, "image_encoder", None)
        needing = [number for number, file in enumerate(files) if file.layout.needs_encoder]
        if not hasattr(self, "image_encoder") or folder is None or not needing:
            return present
        first = needing[0]
        if present is not None and (isinstance(sources[first], Mapping) or _fits(files, present)):
            return present
        if isinstance(sources[first], Mapping):
            raise ConfigError(
                "A state dict has no image encoder next to it: pass image_encoder_folder=None, and give the pipeline "
                "an image_encoder or call it with ip_adapter_image_embeds."
            )
        place = folder if "/" in folder else "/".join(filter(None, (subfolders[first], folder)))
        return load_encoder(sources[first], place, self.unet.dtype, hub)

    def _register(self, encoder: Any) -> None:
        """Register the encoder, and a feature extractor if the pipeline has none, as components of the pipeline."""
        pipe = cast(Any, self)
        if encoder is not None and self.image_encoder is not encoder:
            pipe.register_modules(image_encoder=encoder.to(pipe.device))
            pipe.maybe_free_model_hooks()  # installs the offload hooks again, now also for the new encoder
        if hasattr(self, "feature_extractor") and self.feature_extractor is None:
            from transformers import CLIPImageProcessor

            side = DEFAULT_SIDE if encoder is None else encoder.config.image_size
            pipe.register_modules(feature_extractor=CLIPImageProcessor(size=side, crop_size=side))

    # --- one call ---------------------------------------------------------------------------------------------------

    def ip_conditioning(
        self, images: Any, embeds: Any, masks: Any, count: int, copies: int, guided: bool, without: Collection[int] = ()
    ) -> tuple[dict[str, Tokens], Scales, dict[str, Tensor]]:
        """Return branches, scales and regions of a call's Conditioning, rows in diffusers' order: [negative; positive].

        images: one entry per adapter (an image or a list of images).
        embeds: the encoder's features instead of images: (1 or count, images, width) for base files and (1 or count,
            images, length, width) for Plus and Full, with the negative rows first if the call is guided.
            A FaceID file reads the recogniser's embeddings (rows, images, width), and a FaceID Plus file what
            `imagine.people.readings.with_embedding` makes of one and of the encoder's tokens.
        masks: diffusers' ip_adapter_masks.
        without: numbers of adapters that get no branch here, because they read the reference.
        count, copies: the number of prompts, and of pictures per prompt.

        Raises ConfigError if these do not fit together.
        """
        features = self._ip_features(images, embeds, guided, without)
        wanted = _masks(masks, len(self.ip_adapters))
        branches: dict[str, Tokens] = {}
        scales: Scales = {}
        regions: dict[str, Tensor] = {}
        device = execution_device(self)
        for number, adapter in enumerate(self.ip_adapters):
            if number in without:
                continue
            name, rows = f"ip_{number}", _rows(_with_length(adapter, features[number]), count, copies, guided)
            _check_features(adapter, rows)
            branches[name] = adapter.tokens(name, rows.to(device, adapter.dtype))
            scales[name], region = _scaled(self._ip_scale(number), wanted[number], rows.shape[1])
            if region is not None:
                regions[name] = region.to(device)
        return branches, scales, regions

    def _ip_scale(self, number: int) -> Any:
        return self._ip_scales[number] if number < len(self._ip_scales) else 1.0

    def _ip_features(self, images: Any, embeds: Any, guided: bool, without: Collection[int] = ()) -> list[Any]:
        """Return the features of every adapter's images, (rows, images, ...); the negative rows are first if guided.

        The adapters with the numbers `without` have None.
        """
        if (images is None) == (embeds is None):
            raise ConfigError("Give exactly one of ip_adapter_image and ip_adapter_image_embeds.")
        given = embeds if images is None else images if isinstance(images, list) else [images]
        if not isinstance(given, (list, tuple)) or len(given) != len(self.ip_adapters):
            found = f"{len(given)} are" if isinstance(given, (list, tuple)) else f"a {type(given).__name__} is"
            raise ConfigError(
                f"{found} given for {len(self.ip_adapters)} IP-Adapters: pass a list with one entry for each; an entry "
                "may itself be a list of images."
            )
        kept = [None if number in without else each for number, each in enumerate(given)]
        if lacking := [number for number, each in enumerate(kept) if each is None and number not in without]:
            raise ConfigError(
                f"IP-Adapter {lacking[0]} has None for an image, and the call has no reference that it could show: "
                "give one of both."
            )
        if images is None:
            return kept
        return [
            each if each is None else self._encoded(each, adapter, guided)
            for each, adapter in zip(kept, self.ip_adapters, strict=True)
        ]

    def _encoded(self, image: Any, adapter: Adapter, guided: bool) -> Tensor:
        if Reading.of(adapter.branch_specs[0], adapter.metadata).reads_face:
            raise ConfigError(
                "This IP-Adapter reads the embedding of a face, not a picture: give the photo as reference, or the "
                "embeddings as ip_adapter_image_embeds."
            )
        if self.image_encoder is None:
            raise WeightsError(
                "The pipeline has no image_encoder to encode ip_adapter_image: load one with the IP-Adapter "
                "(image_encoder_folder), or pass ip_adapter_image_embeds."
            )
        pipe = cast(Any, self)
        hidden = adapter.branch_specs[0].projection != "linear"
        positive, negative = pipe.encode_image(image, execution_device(pipe), 1, hidden)
        return torch.stack([negative, positive] if guided else [positive])


def _lists(source: Any, subfolder: Any, weight_name: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Return sources, subfolders and file names, one per adapter. A single value applies to all, as in diffusers."""
    given = [each if isinstance(each, list) else [each] for each in (source, subfolder, weight_name)]
    count = max(map(len, given))
    if any(len(each) not in (1, count) for each in given):
        raise ConfigError(
            "Sources, subfolder and weight_name have different lengths: give lists with one entry per IP-Adapter."
        )
    sources, subfolders, names = (each * count if len(each) == 1 else each for each in given)
    return sources, subfolders, names


def _per_file(name: str, given: Any, count: int) -> list[Any]:
    """Return one value per file. Raises ConfigError for a list of another length."""
    values = list(given) if isinstance(given, (list, tuple)) else [given] * count
    if len(values) != count:
        raise ConfigError(
            f"{name} has {len(values)} values for {count} IP-Adapters: give one for each, or one for all."
        )
    return values


def _fits(files: Sequence[IPAdapterFile], encoder: Any) -> bool:
    try:
        for file in files:
            check_encoder(file.layout, encoder)
    except WeightsError:
        return False
    return True


def _hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := [name for name in kwargs if name not in (*HUB_OPTIONS, *IGNORED_OPTIONS)]:
        raise ConfigError(
            f"load_ip_adapter has no argument {unknown[0]}: leave it out, or choose from {', '.join(HUB_OPTIONS)}."
        )
    return {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}


def _read_scales(scale: Any, denoiser: nn.Module) -> Any:
    """Return scales as floats in lists and dicts. Raises ConfigError for other values and for unknown blocks."""
    if isinstance(scale, Mapping):
        _check_blocks(scale, denoiser)
        return {
            side: {block: _read_scales(each, denoiser) for block, each in value.items()}
            if isinstance(value, Mapping)
            else _read_scales(value, denoiser)
            for side, value in scale.items()
        }
    if isinstance(scale, Tensor):
        scale = scale.tolist()
    if isinstance(scale, (list, tuple)):
        return [_read_scales(each, denoiser) for each in scale]
    return finite("The IP-Adapter scale", scale)


def _check_blocks(scale: Mapping[str, Any], denoiser: nn.Module) -> None:
    """Raise ConfigError for a block that is not in this denoiser, which diffusers would ignore."""
    found = [re.match(r"(down|up)_blocks\.(\d+)\.", name) for name in attention_layers(denoiser)]
    blocks = sorted({(each[1], f"block_{each[2]}") for each in found if each})
    for side, value in scale.items():
        if side not in ("down", "mid", "up") and "." not in side:  # diffusers also takes names such as down.block_1.0
            raise ConfigError(f"The IP-Adapter scale names the blocks {side!r}: choose down, mid or up.")
        for block in value if isinstance(value, Mapping) else ():
            if (side, block) not in blocks:
                known = ", ".join(name for place, name in blocks if place == side) or "none"
                raise ConfigError(
                    f"The IP-Adapter scale names {block!r} of {side!r}, but this denoiser has no attention there: its "
                    f"blocks with attention are {known}."
                )


def _by_layer(blocks: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """Convert scales of blocks to scales of attention layers."""
    # The LoRA of a FaceID file acts in the same blocks, also in their self-attention.
    layers = [name for name, layer in adapter.layers().items() if layer.branches() or adapter.lora_rank]
    return {layer: scale for layer in layers for block, scale in blocks.items() if layer.startswith(f"{block}.")}


def _masks(masks: Any, count: int) -> list[Tensor | None]:
    """Return one mask (1, images, height, width) or None per adapter."""
    if masks is None:
        return [None] * count
    given = list(masks.unsqueeze(1)) if isinstance(masks, Tensor) else list(masks)
    if len(given) != count:
        raise ConfigError(f"There are {len(given)} ip_adapter_masks for {count} IP-Adapters: give one for each.")
    if any(each is not None and (not isinstance(each, Tensor) or each.dim() != 4 or len(each) != 1) for each in given):
        raise ConfigError(
            "Each of ip_adapter_masks must be a tensor (1, images, height, width): create it with "
            "IPAdapterMaskProcessor."
        )
    return given


def _rows(features: Tensor, count: int, copies: int, guided: bool) -> Tensor:
    """Repeat the features, given once or once per prompt, for every row of the batch."""
    sides = features.chunk(2) if guided else (features,)
    if len(features) % (1 + guided) or len(sides[0]) not in (1, count):
        raise ConfigError(
            f"ip_adapter_image_embeds has {len(features)} rows, but {1 + guided} or {count * (1 + guided)} are needed"
            f"{', the negative ones first' if guided else ''}."
        )
    repeats = [copies if len(side) == count else count * copies for side in sides]
    return torch.cat([side.repeat_interleave(each, 0) for side, each in zip(sides, repeats, strict=True)])


def _with_length(adapter: Adapter, features: Tensor) -> Tensor:
    """Return features with an axis for their length where an adapter's projection needs one: InstantID's embeddings."""
    reading = Reading.of(adapter.branch_specs[0], adapter.metadata)
    return features[:, :, None] if reading.output == "raw face" and features.dim() == 3 else features


def _check_features(adapter: Adapter, features: Tensor) -> None:
    spec = adapter.branch_specs[0]
    dims = 3 if spec.projection in ("linear", "faceid") else 4
    if features.dim() != dims or features.shape[-1] != spec.feature_width:
        shape = "(rows, images, width)" if dims == 3 else "(rows, images, tokens, width)"
        network = "face recogniser" if Reading.of(spec, adapter.metadata).reads_face else "image encoder"
        raise ConfigError(
            f"This IP-Adapter reads features {shape} of width {spec.feature_width}, but got {list(features.shape)}: "
            f"use the {network} that belongs to it."
        )


def _scaled(scale: Any, mask: Tensor | None, images: int) -> "tuple[Scale | Mapping[str, Scale], Tensor | None]":
    """Return an adapter's scale and regions. Scales of single images are multiplied into the regions."""
    if mask is not None and mask.shape[1] != images:
        raise ConfigError(f"There are {mask.shape[1]} masks for {images} images of an IP-Adapter: give one for each.")
    values = list(scale.values()) if isinstance(scale, Mapping) else [scale]
    if not any(isinstance(each, (list, tuple)) for each in values):
        return scale, mask
    if mask is None:
        raise ConfigError("A scale for each image needs masks: pass ip_adapter_masks, or one scale per IP-Adapter.")
    if isinstance(scale, Mapping):
        raise ConfigError("Scales cannot differ by block and by image together: give a dict of numbers, or a list.")
    if len(scale) != images:
        raise ConfigError(f"There are {len(scale)} scales for {images} images of an IP-Adapter: give one for each.")
    return 1.0, mask * mask.new_tensor(scale)[None, :, None, None]
