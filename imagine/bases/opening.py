"""Open a public base with what shows a person: an IP-Adapter or an adapter of ours, LoRA, precision and offloading.

    pipe = open_base("sdxl", ip_adapter="plus-face-sdxl", offload="model")
    pipe("a person on a beach", reference="me.jpg").images[0].save("beach.png")

A base is whatever `imagine.pipeline.families` knows by the class in its model_index.json. Here only its files are
found, and the pipeline is set up through its own methods.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagine.bases.hub import Fetched, Tell, fetch_files, fetch_pipeline, tell_nothing
from imagine.bases.public_adapters import PublicAdapter, preset_of, public_adapter
from imagine.bases.quantising import check_quantise, loading_options, store_in_float8
from imagine.bases.sources import Source, read_base_source, read_source
from imagine.bases.tiling import decode_in_tiles
from imagine.errors import ConfigError, WeightsError
from imagine.licences import licence_sentence
from imagine.networks.weights import INDEX, PIPELINE, adapter_path
from imagine.request import check_choice, finite
from imagine.stock import STOCK_PIPELINES

if TYPE_CHECKING:
    from imagine.ip_adapter.layout import Layout

DTYPES = ("auto", "float32", "float16", "bfloat16")
OFFLOADS = ("none", "model", "sequential", "group")
DEVICES = ("auto", "cpu", "cuda", "mps")
ENCODER_FOLDERS = ("image_encoder", "models/image_encoder", "sdxl_models/image_encoder")  # where publishers put them
_ADAPTER_FILES = ("adapter/*", "adapter*.safetensors", "vision_encoder/*", "image_encoder/*", "*.md", "config.json")


@dataclass(frozen=True)
class IPAdapterPlace:
    """An IP-Adapter's file on this machine, and the folder of its image encoder; None: it needs none."""

    file: Path
    encoder: Path | None
    public: PublicAdapter | None


def open_base(
    base: "str | Path",
    *,
    ip_adapter: "str | Path | None" = None,
    image_encoder: "str | Path | None" = None,
    adapter: "str | Path | None" = None,
    lora: "str | Path | None" = None,
    lora_scale: float = 1.0,
    preset: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    offload: str = "none",
    quantise: str = "none",
    tiling: bool = False,
    revision: str | None = None,
    finder: Any = None,
    tell: Tell = tell_nothing,
) -> Any:
    """Return a pipeline of a public base that takes `reference=`.

    base: a folder, a hub id, or a short name such as "sdxl" (`imagine licences` lists them); "id@revision" pins one.
    ip_adapter: a file, a folder with one file, "owner/name:folder/file", or a short name such as "plus-face-sdxl".
    image_encoder: its encoder, if it is not where publishers put it.
    adapter: a folder or hub id of an adapter of ours. lora: a file, a folder, or "owner/name:file".
    preset: "balanced" (the default) or "likeness", for public IP-Adapters: it sets their scale.
    dtype: float32, float16, bfloat16 or auto: bfloat16 on a GPU that has it, else float16; float32 on a CPU.
    offload: none, model, sequential or group, as in diffusers.
    quantise: none, int8, fp8 or nf4: how the denoiser and large text encoders are stored (`imagine.bases.quantising`).
    tiling: whether to decode in tiles, which saves memory at large sizes.
    tell: receives sentences about licences and downloads.

    Nothing is downloaded unless a hub id or a short name is given. Raises ImagineError, one sentence, if something is
    missing or does not fit.
    """
    _check_settings(dtype, offload, device)
    check_quantise(quantise, offload)
    strength = finite("lora_scale", lora_scale)
    sources = {
        "base": read_base_source(base, revision),
        "adapter": None if adapter is None else read_source(adapter),
        "lora": None if lora is None else read_source(lora),
    }
    ip_source, public = (None, None) if ip_adapter is None else ip_adapter_source(ip_adapter)
    chosen = None if ip_adapter is None else preset_of(public, preset)
    place, precision = _device_and_dtype(device, dtype)
    folder = base_folder(sources["base"], precision != "float32", tell)
    find = find_ip_adapter if check_index(folder, str(base)) in STOCK_PIPELINES else find_any_ip_adapter
    found = None if ip_source is None else find(ip_source, public, image_encoder, tell)
    pipe = _load(folder, precision, quantise, finder)
    if found is not None:
        _load_ip_adapter(pipe, found, str(base))
        if chosen is not None:
            pipe.set_ip_adapter_scale(chosen.scale)
    if (source := sources["adapter"]) is not None:
        pipe = _load_adapter(pipe, source, tell)
    if (source := sources["lora"]) is not None:
        _load_lora(pipe, source, strength, tell)
    _save_memory(pipe, precision, quantise, tiling)
    _place(pipe, place, offload)
    return pipe


def base_folder(source: Source | None, half: bool, tell: Tell) -> Path:
    """Return the folder of a base, and tell its licence, also if it is already on this machine."""
    assert source is not None
    if source.path is not None and source.path.is_file():
        raise ConfigError(
            f"{source.given} is a file, and a base is a folder of diffusers: convert it, as with "
            "StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER)."
        )
    fetched = fetch_pipeline(source, half, tell)
    if not fetched.downloaded and source.is_hub:
        tell(licence_sentence(source.repository))
    return fetched.folder


def check_index(folder: Path, given: str) -> str:
    """Return the class that a base's model_index.json names. Raise one sentence unless a family here draws with it."""
    from imagine.pipeline import families

    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{given} has no {INDEX} that can be read: give the folder of a diffusers pipeline."
        ) from error
    name = str(index.get("_class_name") if isinstance(index, dict) else None)
    if name == PIPELINE:
        raise ConfigError(f"{given} holds weights of imagine itself: give it with --weights instead of --base.")
    if name not in families.class_names():
        raise WeightsError(
            f"{given} holds a {name}, with which imagine cannot draw a person: choose a base of {families.titles()}."
        )
    return name


# --- IP-Adapters ------------------------------------------------------------------------------------------------------
def ip_adapter_source(given: "str | Path") -> tuple[Source, PublicAdapter | None]:
    """Return where an IP-Adapter is, and its line in the table of public ones. A path wins over a short name."""
    text = str(given)
    public = public_adapter(text)
    if public is not None and text == public.name and not Path(text).exists():
        return replace(read_source(f"{public.repository}:{public.file}"), given=text), public
    source = read_source(text)
    if source.is_hub and not source.inside:
        raise ConfigError(f"{text} is a hub id: name one of its files, as in {text}:sdxl_models/FILE.safetensors.")
    return source, public


def find_ip_adapter(
    source: Source, public: PublicAdapter | None, image_encoder: "str | Path | None", tell: Tell
) -> IPAdapterPlace:
    """Return an IP-Adapter's file and the folder of an image encoder that fits it.

    The encoder is the given one, or the first fitting one of the publishers' usual places. Raises WeightsError if there
    is none.
    """
    from imagine.ip_adapter.reading import find_weights_file, read_file_layout

    folder = fetch_files(source, [source.inside], "ip-adapter", tell).folder if source.is_hub else source.path
    assert folder is not None
    file = find_weights_file(folder / source.inside)
    layout = read_file_layout(file)
    if layout.problem:
        raise WeightsError(f"{source.given} {layout.problem}.")
    if not layout.needs_encoder:
        return IPAdapterPlace(file, None, public)
    places = _encoder_places(source, file, public, image_encoder, tell)
    fitting = next((place for place in places if _fits(layout, place)), None)
    if fitting is None:
        which = layout.encoder or f"an encoder with features of width {layout.input_width}"
        looked = "the given --image-encoder is another one" if image_encoder else "no such encoder is beside the file"
        raise WeightsError(
            f"{source.given} reads the features of {which}, and {looked}: give its folder or "
            "OWNER/NAME:FOLDER with --image-encoder."
        )
    return IPAdapterPlace(file, fitting, public)


def find_any_ip_adapter(
    source: Source, public: PublicAdapter | None, image_encoder: "str | Path | None", tell: Tell
) -> IPAdapterPlace:
    """Return an IP-Adapter's file, and its encoder if one is given; the pipeline of its family checks both."""
    from imagine.ip_adapter.reading import find_weights_file

    folder = fetch_files(source, [source.inside], "ip-adapter", tell).folder if source.is_hub else source.path
    assert folder is not None
    encoder = None if image_encoder is None else _encoder_folder(read_source(image_encoder), tell)
    return IPAdapterPlace(find_weights_file(folder / source.inside), encoder, public)


def _encoder_places(
    source: Source, file: Path, public: PublicAdapter | None, image_encoder: "str | Path | None", tell: Tell
) -> list[Path]:
    """Return folders that may hold the image encoder; on the hub only the one that is known or given is fetched."""
    if image_encoder is not None:
        return [_encoder_folder(read_source(image_encoder), tell)]
    if not source.is_hub:
        return [parent / name for parent in (file.parent, file.parent.parent) for name in ENCODER_FOLDERS]
    if public is not None and public.encoder is not None:
        return [_encoder_folder(read_source(public.encoder), tell)]
    beside = f"{source.inside.rpartition('/')[0]}/image_encoder".lstrip("/")
    return [_encoder_folder(replace(source, inside=beside), tell)]


def _encoder_folder(source: Source, tell: Tell) -> Path:
    inside = f"{source.inside}/" if source.inside else ""
    patterns = [f"{inside}{name}" for name in ("config.json", "model.safetensors")]
    return fetch_files(source, patterns, "image-encoder", tell).folder / source.inside


def _fits(layout: "Layout", folder: Path) -> bool:
    """Return whether the vision encoder in a folder has features of the width that a projection reads."""
    try:
        config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    pooled = layout.kind == "linear"
    return bool(config.get("projection_dim" if pooled else "hidden_size") == layout.input_width)


def _load_ip_adapter(pipe: Any, found: IPAdapterPlace, base: str) -> None:
    if not hasattr(pipe, "load_ip_adapter"):
        raise ConfigError(
            f"A {type(pipe).__name__} takes no IP-Adapter here: leave --ip-adapter out, and give an adapter of ours."
        )
    folder = None if found.encoder is None else str(found.encoder.absolute())
    try:
        pipe.load_ip_adapter(str(found.file), image_encoder_folder=folder)
    except WeightsError as error:
        if found.public is not None and "layers that read text of width" in str(error):
            raise WeightsError(
                f"{found.public.name} is made for {found.public.base}, and {base} is another family: choose an "
                f"IP-Adapter for it, or --base {found.public.base}."
            ) from error
        raise


# --- the rest of the set-up -------------------------------------------------------------------------------------------
def _load(folder: Path, precision: str, quantise: str, finder: Any) -> Any:
    import torch

    from imagine.pipeline.pipeline import ImaginePipeline

    dtype = getattr(torch, precision)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    pipe = ImaginePipeline.from_pretrained(folder, dtype=dtype, **loading_options(quantise, index, dtype))
    if finder is not None:
        pipe.finder = finder
    return pipe


def _load_adapter(pipe: Any, source: Source, tell: Tell) -> Any:
    """Load an adapter of ours, with the vision encoder in its folder, and return the pipeline."""
    folder = fetch_files(source, _ADAPTER_FILES, "adapter", tell).folder / source.inside
    for name in ("vision_encoder", "image_encoder"):
        if (folder / name / "config.json").is_file() and hasattr(pipe, "vision_encoder"):
            pipe = type(pipe).from_pipe(pipe, vision_encoder=str(folder / name))
            break
    pipe.load_adapter(adapter_path(folder))
    return pipe


def _load_lora(pipe: Any, source: Source, scale: float, tell: Tell) -> None:
    """Load LoRA in any form that diffusers reads, at a strength."""
    if not hasattr(pipe, "load_lora_weights"):
        raise ConfigError(f"A {type(pipe).__name__} takes no LoRA here: leave --lora out.")
    patterns = [source.inside] if source.inside else ["*.safetensors"]
    path = fetch_files(source, patterns, "lora", tell).folder / source.inside
    folder, name = (path.parent, path.name) if path.is_file() else (path, None)
    files = sorted(each.name for each in folder.glob("*.safetensors")) if name is None else []
    if name is None and len(files) != 1:
        raise WeightsError(f"{source.given} holds {len(files)} safetensors files: name the LoRA's file.")
    try:
        pipe.load_lora_weights(str(folder), weight_name=name or files[0], adapter_name="lora")
    except Exception as error:  # peft and diffusers raise several types for a file that does not fit
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"{source.given} cannot be loaded as LoRA of this base ({reason}): give a LoRA file that was made for it."
        ) from error
    pipe.set_adapters("lora", scale)


def _save_memory(pipe: Any, precision: str, quantise: str, tiling: bool) -> None:
    """Store weights in float8 and decode in tiles, if this is asked for."""
    import torch

    if quantise == "fp8":
        store_in_float8(pipe, getattr(torch, precision))
    if tiling:
        decode_in_tiles(pipe.vae)


def _check_settings(dtype: str, offload: str, device: str) -> None:
    check_choice("dtype", dtype, DTYPES)
    check_choice("offload", offload, OFFLOADS)
    check_choice("device", device, DEVICES)


def _device_and_dtype(device: str, dtype: str) -> tuple[Any, str]:
    """Return the device, and the name of the precision that `auto` stands for on it."""
    import torch

    from imagine.people.doctor import device_for

    place = torch.device(device_for(device))
    if dtype != "auto":
        return place, dtype
    if place.type == "cpu":
        return place, "float32"
    return place, "bfloat16" if place.type == "cuda" and torch.cuda.is_bf16_supported() else "float16"


def _place(pipe: Any, place: Any, offload: str) -> None:
    """Move the pipeline to its device, or set up offloading to it."""
    if offload == "none":
        pipe.to(place)
    elif offload == "group":
        pipe.enable_group_offload(place, offload_type="leaf_level")
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif place.type == "cpu":
        raise ConfigError("Sequential offloading needs a GPU: leave --offload out, or choose model or group.")
    else:
        pipe.enable_sequential_cpu_offload(device=place)


def download(
    base: "str | Path", ip_adapter: "str | Path | None" = None, revision: str | None = None, half: bool = True,
    into: Path | None = None, tell: Tell = tell_nothing, api: Any = None,
) -> dict[str, Fetched]:  # fmt: skip
    """Download a base, and perhaps an IP-Adapter with its encoder, to the cache or (the base) to the folder `into`.

    Return what was fetched. Raises ConfigError if the base is a folder, WeightsError if it cannot be fetched.
    """
    source = read_base_source(base, revision)
    if not source.is_hub:
        raise ConfigError(f"{base} is on the disk already: give a hub id or a short name.")
    found = {"base": fetch_pipeline(source, half, tell, into, api)}
    if not found["base"].downloaded:
        tell(licence_sentence(source.repository))
    if ip_adapter is not None:
        place, public = ip_adapter_source(ip_adapter)
        found["ip_adapter"] = fetch_files(place, [place.inside], "ip-adapter", tell, api=api)
        if public is not None and public.encoder is not None:
            encoder = read_source(public.encoder)
            patterns = [f"{encoder.inside}/{name}" for name in ("config.json", "model.safetensors")]
            found["image_encoder"] = fetch_files(encoder, patterns, "image-encoder", tell, api=api)
    return found
