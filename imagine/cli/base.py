"""The arguments of `imagine generate --base`, and how they become a pipeline and the arguments of its call."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagine.cli import arguments
from imagine.cli.loading import load_finder, load_safety
from imagine.cli.progress import Display
from imagine.errors import ConfigError

if TYPE_CHECKING:
    from imagine.provenance.record import PictureRecord

SOURCES = (
    "ip_adapter", "image_encoder", "adapter", "lora", "lora_scale", "preset", "dtype", "offload", "quantise",
    "tiling", "revision",
)  # fmt: skip
BASE_ONLY = (*SOURCES, "negative_prompt", "width", "height")
WEIGHTS_ONLY = ("weights", "identity_guidance_scale", "guidance_balance")
_USUAL = {  # values that a call has anyway, so that every kind of pipeline can do without the argument
    "identity_scale": 1.0, "identity_window": (0.0, 1.0), "identity_blocks": "all", "refine_faces": None,
    "layout": None, "attempts": 1, "face": "largest", "on_no_face": "error", "negative_prompt": None, "width": None,
    "height": None,
}  # fmt: skip


def add_base(command: Any) -> None:
    """Add --base and the arguments that belong to it."""
    group = add_sources(command)
    group.add_argument("--negative-prompt", metavar="TEXT", help="what the pictures should not show")
    group.add_argument("--width", type=arguments.positive, metavar="PX", help="width of the pictures (default: the "
                       "base's own)")  # fmt: skip
    group.add_argument("--height", type=arguments.positive, metavar="PX", help="height of the pictures (default: the "
                       "base's own)")  # fmt: skip


def add_sources(command: Any) -> Any:
    """Add --base and what is loaded into it, as a group, which is returned."""
    group = command.add_argument_group("for photographs, on a public base")
    group.add_argument("--base", metavar="BASE", help="draw with a public base instead of our weights: sdxl, sd15 or "
                       "another name of `imagine licences`, a folder, or a hub id, which is downloaded; "
                       "OWNER/NAME@REVISION pins it")  # fmt: skip
    group.add_argument("--ip-adapter", metavar="FILE", help="IP-Adapter that shows the person: a file, a folder, "
                       "OWNER/NAME:FOLDER/FILE, or a public one such as plus-face-sdxl")  # fmt: skip
    group.add_argument(
        "--adapter", metavar="DIR", help="adapter of imagine that shows the person: a folder or a hub id"
    )
    add_image_encoder(group)
    group.add_argument("--preset", choices=["balanced", "likeness"], help="settings of a public IP-Adapter: leave room "
                       "for the prompt, or favour the person (default: balanced)")  # fmt: skip
    group.add_argument("--lora", metavar="FILE", help="LoRA to load: a file, a folder, or OWNER/NAME:FILE")
    group.add_argument("--lora-scale", type=arguments.finite_float, metavar="X", help="strength of the LoRA "
                       "(default: 1)")  # fmt: skip
    group.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], help="precision (default: auto, "
                       "which is bfloat16 on a GPU that has it, float16 on others, and float32 on a CPU)")  # fmt: skip
    group.add_argument("--offload", choices=["none", "model", "sequential", "group"], help="keep networks in main "
                       "memory while they do not run (default: none); `imagine plan` says what fits")  # fmt: skip
    group.add_argument("--quantise", choices=["none", "int8", "fp8", "nf4"], help="store the large networks in eight "
                       "or four bits; int8 and nf4 need bitsandbytes (default: none)")  # fmt: skip
    group.add_argument("--tiling", action="store_true", help="decode in tiles, which saves memory at large sizes")
    group.add_argument("--revision", metavar="NAME", help="revision of the base's hub repository")
    return group


def add_image_encoder(command: Any) -> None:
    """Add --image-encoder."""
    command.add_argument("--image-encoder", metavar="DIR", help="image encoder of the IP-Adapter, if it is not beside "
                         "it: a folder, or OWNER/NAME:FOLDER")  # fmt: skip


def check_base(options: argparse.Namespace) -> None:
    """Raise ConfigError for arguments that do not apply, before anything is loaded."""
    given = [name for name in (BASE_ONLY if options.base is None else WEIGHTS_ONLY) if getattr(options, name)]
    if given and options.base is None:
        raise ConfigError(
            f"{_flag(given[0])} needs --base, the model to draw with: add it, or leave {_flag(given[0])} out."
        )
    if given:
        raise ConfigError(f"{_flag(given[0])} belongs to imagine's own weights: leave it out, or leave out --base.")
    if options.base is not None:
        settings_of(options)
    if options.image_encoder and not options.ip_adapter:
        raise ConfigError("--image-encoder belongs to --ip-adapter: add it, or leave --image-encoder out.")


def base_settings(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return --base and what is loaded into it for a server's settings, or None without it.

    Raises ConfigError for arguments that do not apply.
    """
    given = {name: value for name in SOURCES if (value := getattr(options, name)) not in (None, False)}
    if options.base is None:
        if given:
            name = _flag(next(iter(given)))
            raise ConfigError(f"{name} needs --base, the model to draw with: add it, or leave {name} out.")
        return None
    if options.weights is not None:
        raise ConfigError("--weights belongs to imagine's own weights: leave it out, or leave out --base.")
    if options.image_encoder and not options.ip_adapter:
        raise ConfigError("--image-encoder belongs to --ip-adapter: add it, or leave --image-encoder out.")
    if options.preset and not options.ip_adapter:
        raise ConfigError("--preset belongs to --ip-adapter: add it, or leave --preset out.")
    return {"name": options.base, **given}


def is_online(options: argparse.Namespace) -> bool:
    """Return whether the arguments name a hub repository, from which files may be downloaded."""
    if options.base is None:
        return False
    from imagine.bases.opening import ip_adapter_source
    from imagine.bases.sources import read_base_source, read_source

    try:
        sources = [read_base_source(options.base, options.revision)]
        sources += [ip_adapter_source(options.ip_adapter)[0]] if options.ip_adapter else []
        sources += [read_source(each) for each in (options.adapter, options.lora, options.image_encoder) if each]
    except ConfigError:
        return False  # the command raises it again
    return any(source.is_hub for source in sources)


def open_pipeline(options: argparse.Namespace, display: Display) -> Any:
    """Return the pipeline of --base with its adapters, on its device."""
    display.report("importing the libraries")
    from imagine.bases.opening import open_base

    finder = load_finder(options.finder)
    display.report("loading the model")
    pipe = open_base(
        options.base, ip_adapter=options.ip_adapter, image_encoder=options.image_encoder, adapter=options.adapter,
        lora=options.lora, lora_scale=1.0 if options.lora_scale is None else options.lora_scale, preset=options.preset,
        dtype=options.dtype or "auto", device=options.device, offload=options.offload or "none",
        quantise=options.quantise or "none", tiling=options.tiling,
        revision=options.revision, finder=finder, tell=display.tell,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    load_safety(pipe, options)
    if hasattr(pipe, "shows_references") and not pipe.shows_references:
        raise ConfigError(f"{options.base} shows nobody without --ip-adapter or --adapter: add one of them.")
    return pipe


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the call that --steps, --guidance-scale and the IP-Adapter's preset give."""
    from imagine.bases.public_adapters import preset_of, public_adapter

    public = public_adapter(options.ip_adapter) if options.ip_adapter else None
    preset = preset_of(public, options.preset) if options.ip_adapter or options.preset else None
    found = {} if preset is None else preset.arguments()
    given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    return found | {name: value for name, value in given.items() if value is not None}


def call_arguments(
    options: argparse.Namespace, reference: Any, layout: Any, generators: Sequence[Any], display: Display
) -> dict[str, Any]:
    """Return the arguments of the pipeline's call; those with their usual value are left out."""
    settings = settings_of(options)

    def report(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        display.report("drawing", step + 1, settings.get("num_inference_steps", 0))
        return tensors

    given = {**{name: getattr(options, name, None) for name in _USUAL}, "layout": layout}
    return {
        "reference": reference, "num_images_per_prompt": len(generators), "generator": list(generators),
        "callback_on_step_end": report, **settings,
        **{name: value for name, value in given.items() if value != _USUAL[name]},
    }  # fmt: skip


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of --json that only --base has."""
    if options.base is None:
        return {}
    return {"base": options.base, "ip_adapter": options.ip_adapter, "settings": settings_of(options)}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def with_files(options: argparse.Namespace, records: "Sequence[PictureRecord]") -> "list[PictureRecord]":
    """Return records of pictures that a public base drew, with the names of the adapters' files added."""
    files = {
        name: Path(getattr(options, name)).name for name in ("ip_adapter", "adapter", "lora") if getattr(options, name)
    }
    return [replace(each, settings={**each.settings, **files, "preset": options.preset}) for each in records]
