"""Turn a finished run into a weights folder: `python -m train.assemble runs/weights --output weights`.

The pipeline is built from the exports of the stages and saved in half precision, with the judge, the finder and the
recogniser of the check beside it. Only components of the pipeline and these networks are replaced, each one only after
it is completely written to disk; a model card and examples that are there are not touched. For a run on a public base,
only the trained components (the adapters and the vision encoder) are written, to be loaded into a pipeline with that
base, and a model card with the licences if there is none.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from imagine.adapter.adapter import FILE_NAME
from imagine.errors import ImagineError, WeightsError
from imagine.licences import adapter_card
from imagine.networks.weights import fingerprint, load_model, remove_local_paths
from train.cache.latents import load_autoencoder
from train.data.language import load_text_encoders
from train.run.checkpoint import read_tensors, replacing, write_tensors

log = logging.getLogger("train")
CARD = "README.md"  # the model card
ADAPTER_TASKS = ("adapter", "diffusers_adapter")  # tasks whose exports a pipeline can generate with
# stage -> the folder of its export, and its place in the weights
NETWORKS = {
    "recogniser": ("recogniser", "judge/recogniser"),
    "second_recogniser": ("recogniser", "judge/second_recogniser"),
    "reader": ("reader", "judge/reader"),
    "check_recogniser": ("recogniser", "recogniser"),
    "finder": ("finder", "finder"),
}


def assemble(
    run: Path,
    output: Path,
    dtype: torch.dtype = torch.float16,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    initial: Path | None = None,
    stage: str | None = None,
    best: bool = False,
) -> None:
    """Write the pipeline of `run` to `output`. Components whose stage is not trained (judge ...) are not changed.

    `initial` is the folder of weights that the run started from; it provides what the run did not train. The pipeline
    uses the adapter of `stage`, or by default of the last adapter stage with an export; a warning is logged if that is
    not the end of the run. With `best`, the adapter is the stage's best one by its `best_by` instead of its last one.
    `defaults` are the pipeline's defaults for calls without steps or guidance (measured by `benchmarks/guidance.py`).
    """
    adapter_export = _export(run, stage) if stage else _last_adapter(run)  # includes the adapter's base
    if best:
        adapter_export = _best(adapter_export.parent)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".assembled-", dir=output) as place:
        draft = Path(place)
        if (adapter_export / "unet").is_dir():
            _assemble_pipeline(run, adapter_export, initial, draft, dtype, defaults)
        else:
            facts = _assemble_adapters(adapter_export, draft, dtype)
            if not (output / CARD).exists():
                (draft / CARD).write_text(adapter_card(facts), encoding="utf-8")
        _put(draft, output)


def _put(draft: Path, output: Path) -> None:
    """Replace the components in `output` by those of `draft`; top-level files such as model_index.json come last."""
    for part in sorted(draft.iterdir(), key=lambda part: (part.is_file(), part.name)):
        if part.name == "judge":  # its networks are replaced independently
            (output / part.name).mkdir(exist_ok=True)
            _put(part, output / part.name)
            continue
        with replacing(output / part.name) as place:
            os.replace(part, place)


def _assemble_pipeline(
    run: Path, adapter_export: Path, initial: Path | None, output: Path, dtype: torch.dtype, defaults: Mapping[str, Any]
) -> None:
    """Save the pipeline with the base that was trained with this adapter, and copy the small networks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

    from imagine.adapter.adapter import Adapter
    from imagine.networks.encoders import VisionEncoder
    from imagine.pipeline.pipeline import ImaginePipeline

    autoencoder = load_autoencoder(_autoencoder(run, initial))
    unet = UNet2DConditionModel.from_pretrained(adapter_export / "unet", torch_dtype=torch.float32)
    text = load_text_encoders(adapter_export)
    pipe = ImaginePipeline(
        unet=unet,
        vae=autoencoder.vae,
        text_encoder=text.clip,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.t5_tokenizer,
        text_encoder_3=text.byt5,
        tokenizer_3=text.byt5_tokenizer,
        image_encoder=VisionEncoder.from_pretrained(adapter_export / "image_encoder", torch_dtype=torch.float32),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000),
        text_adapter=Adapter.load(adapter_export / "text_adapter", unet).float(),
        adapter=Adapter.load(adapter_export / "adapter", unet).float(),
        latents_mean=autoencoder.mean.tolist(),
        latents_std=autoencoder.std.tolist(),
        latents_patch=autoencoder.patch,
        **defaults,
    )
    pipe.to(dtype)
    for part in (pipe.text_adapter, pipe.adapter):
        assert part is not None, "both adapters were passed to the constructor"
        part.to(dtype)
    pipe.save_pretrained(output)
    for stage, (exported, place) in NETWORKS.items():
        source = run / stage / "export" / exported
        if source.is_dir():
            shutil.copytree(source, output / place, dirs_exist_ok=True)


def _assemble_adapters(adapter_export: Path, output: Path, dtype: torch.dtype) -> dict[str, str]:
    """Write the vision encoder and the adapters that a stage on a public base exported, cast to `dtype`.

    Return the metadata of the identity adapter, or else of the text adapter.
    """
    described: dict[str, str] = {}
    encoder = load_model(adapter_export / "image_encoder", "imagine.networks.encoders", "VisionEncoder", dtype)
    encoder.save_pretrained(output / "image_encoder")
    remove_local_paths(output / "image_encoder")
    for name in ("adapter", "text_adapter"):
        if (adapter_export / name).is_dir():
            tensors, facts = read_tensors(adapter_export / name / FILE_NAME)
            (output / name).mkdir(parents=True, exist_ok=True)
            cast = {key: value.to(dtype) for key, value in tensors.items()}
            write_tensors(output / name / FILE_NAME, cast, {**facts, "encoder_fingerprint": fingerprint(encoder)})
            described = described or facts
    if (adapter_export / "lora").is_dir():  # of a transformer, in the layout of diffusers
        shutil.copytree(adapter_export / "lora", output / "lora")
    return described


def _last_adapter(run: Path) -> Path:
    """Return the export of the last adapter stage that has one: stages go from coarse to fine, so the last is best."""
    import yaml

    described = run / "run.yaml"
    if not described.is_file():
        raise WeightsError(
            f"{run} is not the folder of a run (it has no run.yaml). Name the output folder of a training."
        )
    stages = yaml.safe_load(described.read_text(encoding="utf-8"))["stages"]
    adapters = [name for name, stage in stages.items() if stage["task"] in ADAPTER_TASKS]
    found = [name for name in adapters if (run / name / "export").is_dir()]
    if not found:
        raise WeightsError(
            f"No adapter stage of {run} is trained yet. Train one first, for example with `make weights`."
        )
    if found[-1] != adapters[-1] or not (run / found[-1] / "done.json").is_file():
        log.warning("%s is not fully trained; the weights come from its stage %s so far.", run, found[-1])
    return run / found[-1] / "export"


def _autoencoder(run: Path, initial: Path | None) -> Path:
    """Return the autoencoder's folder: of the stage `decoder`, else of the stage `autoencoder`, else `initial`."""
    for stage in ("decoder", "autoencoder"):
        if (run / stage / "export" / "vae").is_dir():
            return run / stage / "export"
    return initial or _export(run, "autoencoder")


def _best(stage: Path) -> Path:
    """Return the stage's export with its best weights; WeightsError if it has none."""
    if not (stage / "best").is_dir():
        raise WeightsError(
            f"{stage} holds no best weights. Set best_by in the stage to one of its validation numbers and finish its "
            "training, or leave --best out."
        )
    return stage / "best"


def _export(run: Path, stage: str) -> Path:
    folder = run / stage / "export"
    if not folder.is_dir():
        raise WeightsError(f"{run} holds no export of the stage {stage}. Train that stage first, or name another.")
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 0, or 2 after printing what is wrong with the input."""
    parser = argparse.ArgumentParser(prog="python -m train.assemble", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the weights folder to write")
    parser.add_argument(
        "--initial", type=Path, metavar="DIR", help="the weights folder that the run started from, if any"
    )
    parser.add_argument(
        "--stage", metavar="NAME", help="the adapter stage to use (default: the last one that is trained)"
    )
    parser.add_argument(
        "--best", action="store_true", help="use that stage's best weights by its best_by, not its last"
    )
    parser.add_argument(
        "--steps", type=int, default=20, metavar="N", help="the pipeline's default number of steps (default: 20)"
    )
    parser.add_argument(
        "--guidance-scale", type=float, default=2.0, metavar="X", help="the pipeline's default text guidance "
        "(default: 2)"
    )  # fmt: skip
    parser.add_argument(
        "--identity-guidance-scale", type=float, metavar="X", help="the pipeline's default identity guidance "
        "(default: as the text's)"
    )  # fmt: skip
    parser.add_argument("--refine-faces", action="store_true", help="refine small faces in a second pass by default")
    options = parser.parse_args(arguments)
    defaults = {
        "default_steps": options.steps,
        "default_guidance_scale": options.guidance_scale,
        "default_identity_guidance_scale": options.identity_guidance_scale,
        "default_refine_faces": options.refine_faces,
    }
    try:
        assemble(
            options.run, options.output, defaults=defaults, initial=options.initial, stage=options.stage,
            best=options.best,
        )  # fmt: skip
    except ImagineError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
