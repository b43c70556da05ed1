"""The command line of the methods: train one on photos, draw with it, or have the judge measure it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagine.errors import ConfigError, ImagineError
from imagine.paths import as_path, folder_to_fill, writable_file
from train.methods.registry import ENCODERS, METHODS, TUNED
from train.run.console import configure_logging

DONE, WRONG, STOPPED = 0, 2, 3
VERBS = ("draw", "evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    configure_logging()
    try:
        if options.method == "draw":
            return _draw(options)
        if options.method == "evaluate":
            return _evaluate(options)
        return _train(options)
    except ImagineError as error:
        sys.stderr.write(f"{error}\n")
        return WRONG
    except OSError as error:
        sys.stderr.write(f"A file could not be read or written ({error}). Fix the cause and run the command again.\n")
        return WRONG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.methods",
        description="Learn a person from photos with a published method, draw with what was learnt, or measure a "
        "method. The same command carries on with a run that was stopped.",
    )
    parser.add_argument("method", metavar="METHOD", help=f"{', '.join(METHODS)}; or draw, or evaluate")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace a value of the method's config")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder of the run; a .png to draw"
    )
    parser.add_argument(
        "--photos", nargs="+", action="append", default=[], type=Path, metavar="PHOTO",
        help="photos or folders of one subject; repeat it for further subjects",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="DIR", help="imagine's weights, or Stable Diffusion 1.5 or XL; default: shipped"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="another config than configs/methods/METHOD.yaml")
    parser.add_argument("--learnt", type=Path, metavar="DIR", help="draw, evaluate: the folder of a finished run")
    parser.add_argument("--of", default="", metavar="METHOD", help="evaluate: the method to train for each person")
    parser.add_argument("--prompt", default="a photo of a person", metavar="TEXT", help="draw: the sentence")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draw, evaluate: seed of the noise")
    parser.add_argument("--steps", type=int, metavar="N", help="draw, evaluate: sampling steps")
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="draw, evaluate: guidance scale")
    parser.add_argument("--identities", type=int, default=20, metavar="N", help="evaluate: held-out people")
    parser.add_argument("--prompts", type=int, default=13, metavar="N", help="evaluate: sentences for each")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained; train nothing")
    parser.add_argument("--resume", action="store_true", help="carry on with changed settings")
    parser.add_argument("--max-minutes", type=float, metavar="M", help="stop cleanly after M minutes")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def _train(options: argparse.Namespace) -> int:
    run = _run_of(options.method, options)
    from train.methods import runs

    if options.dry_run:
        for line in runs.describe(run, options.output):
            print(line)
        return DONE
    found = runs.train_method(run, folder_to_fill(options.output), options.resume, options.max_minutes)
    if found is None:
        return STOPPED
    _say(found, options.json)
    return DONE


def _run_of(method: str, options: argparse.Namespace) -> Any:
    from train.methods import runs

    runs.config_of(method, options.config)
    if method in TUNED:
        if not options.photos:
            raise ConfigError(f"{method} learns from photos: name some with --photos.")
        for photos in options.photos:
            _check_photos(photos)
        data = runs.subject_data(options.base, options.photos, None)
    else:
        if options.photos:
            raise ConfigError(f"{method} trains on the people of its config: leave out --photos.")
        data = {} if options.base is None else {"base": options.base}
    return runs.load_method_run(method, options.config, options.overrides, data)


def _check_photos(photos: Sequence[Path]) -> None:
    from train.methods.subjects import photo_paths

    photo_paths(photos)


def _draw(options: argparse.Namespace) -> int:
    if options.learnt is None:
        raise ConfigError("draw needs what a method learnt: name the folder of its run with --learnt.")
    output = writable_file(options.output, (".png",))
    import torch

    from train.methods.runs import open_learnt
    from train.methods.system import EncoderSystem, noise_of
    from train.run.grids import save_grid

    noise = torch.Generator().manual_seed(options.seed)
    task = open_learnt(as_path(options.learnt), options.base)
    if task.NAME in ENCODERS:
        system = EncoderSystem(as_path(options.learnt), options.base)
        people = [system.enroll([str(path) for path in photos]) for photos in options.photos[:1]]
        if not people:
            raise ConfigError(f"{task.NAME} encodes a person's photos: name some with --photos.")
        pictures = system(options.prompt, people[0], generator=noise, num_inference_steps=options.steps,
                          guidance_scale=options.guidance_scale, output_type="pt").images  # fmt: skip
    else:
        sentence = task.naming.personal(options.prompt)
        pictures = task.draw([sentence], noise_of(task.base, [noise]), options.steps, options.guidance_scale)
    save_grid(pictures, output, columns=1)
    print(output)
    return DONE


def _evaluate(options: argparse.Namespace) -> int:
    if (options.learnt is None) == (not options.of):
        raise ConfigError("evaluate needs --of METHOD, to train it for each person, or --learnt DIR of an encoder.")
    output = folder_to_fill(options.output)
    from imagine.evaluation import evaluate
    from train.methods import runs
    from train.methods.system import DrawingSystem, EncoderSystem, TunedSystem
    from train.run.checkpoint import write_json

    system: DrawingSystem
    if options.learnt is not None:
        system = EncoderSystem(as_path(options.learnt), options.base)
    elif options.of in TUNED:
        data = {} if options.base is None else {"base": options.base}
        system = TunedSystem(
            runs.load_method_run(options.of, options.config, options.overrides, data), output / "people"
        )
    else:
        raise ConfigError(f"{options.of} is no method that is trained for each person; those are: {', '.join(TUNED)}.")
    given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    report = evaluate.run(
        system, output / "evaluation", "portraits", options.identities, options.prompts, options.seed, rows=("full",),
        options={name: value for name, value in given.items() if value is not None}, progress=_progress,
    )  # fmt: skip
    found = {"method": system.name, **system.costs, "metrics": report["metrics"]}
    write_json(output / "result.json", found)
    _say(found, options.json)
    return DONE


def _progress(stage: str, done: int, total: int) -> None:
    if total and done % 10 == 0:
        sys.stderr.write(f"{stage}: {done} of {total}\n")


def _say(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        shown = value if not isinstance(value, dict) else json.dumps(value)
        print(f"{name:20} {shown}")
