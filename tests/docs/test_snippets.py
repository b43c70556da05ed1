"""The commands and the Python of README.md and docs/*.md do what the pages say.

How to write a block of code in these pages:

- Every fenced block names its language: bash, python, yaml or text. Blocks of bash and Python are run, page by page and
  in order. The Python blocks of a page share one namespace; a bash block is one script under `bash -eu`. A block of
  YAML must be readable.
- They run in a folder like a fresh clone, without a network. It also holds `photo.jpg`, `1.jpg` and `2.jpg`, as
  examples of the reader's own photos, and `tiny/` with tiny public bases and IP-Adapters. What they write must lie in
  out/ or runs/, which git ignores.
- A block that cannot run in a test begins after the line `<!-- not run: REASON -->`. Its commands are then only parsed:
  options, names of config files and `key=value` settings must exist, and so must the targets of `make`. Its Python must
  compile, and what it imports from this project must exist. A config file whose name begins with `my` is the reader's.
- A command that takes long runs smaller in the test after the line `<!-- test: OPTIONS -->`: each option (`--steps 2`)
  or setting (`base.images=64`) replaces the command's own, or is added to it. If the first word is a verb, as in
  `<!-- test: generate --steps 2 -->`, only commands that contain this word change. Several such lines may follow each
  other.

The commands `imagine` and `python -m imagine|train|train.assemble|data_synth` of a script are passed to processes that
are fork_process from one that has imported everything already, which saves ten seconds each.
"""

import argparse
import ast
import atexit
import contextlib
import functools
import gc
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests import tiny_bases, tiny_transformer_folders
from tests.forks import fork_process
from tests.root import ROOT

PACKAGES = ("imagine", "train", "data_synth")
PROGRAMS = ("imagine", "train", "train.assemble", "train.methods", "train.ablation", "train.bakeoff", "data_synth")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("bash", "python")
LANGUAGES = (*RUN, "text", "yaml")
# Pages that do not follow these rules yet: their blocks are parsed but not run. Take a page out when it is rewritten.
WRITABLE = ("out", "runs")
LONGEST = 600  # seconds after which a script or a command counts as hung

_OPENING = re.compile(r"^( *)(`{3,}|~{3,})(\w*)")
_COMMENT = re.compile(r"^ *<!-- (not run|test): (.+) -->$")
_QUOTED_OR_COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*')|(?<!\S)#[^\n]*""")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str  # why it is not run; empty for one that is
    smaller: tuple[str, ...]  # what makes its commands smaller

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found, lines, number = [], page.read_text(encoding="utf-8").splitlines(), 0
    while number < len(lines):
        opening = _OPENING.match(lines[number])
        if opening is None:
            number += 1
            continue
        end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == opening[2])
        text = "\n".join(line.removeprefix(opening[1]) for line in lines[number + 1 : end]) + "\n"
        comments = _comments(lines, number)
        reason = next((said for kind, said in comments if kind == "not run"), "")
        smaller = tuple(said for kind, said in comments if kind == "test")
        found.append(Block(page, number + 1, opening[3], text, reason, smaller))
        number = end + 1
    return found


def _comments(lines: Sequence[str], number: int) -> list[tuple[str, str]]:
    """The comments for this test right above a line."""
    found: list[tuple[str, str]] = []
    while number > 0 and (comment := _COMMENT.match(lines[number - 1])):
        found.insert(0, (comment[1], comment[2]))
        number -= 1
    return found


def of_all_pages(language: str, run: bool = True) -> list[Any]:
    """The blocks of one language that are run, or not, as parameters of a test."""
    found = [block for page in PAGES for block in blocks(page)]
    return [pytest.param(b, id=b.place) for b in found if b.language == language and bool(b.reason) != run]


def pages_to_run() -> list[Any]:
    """The pages that hold a block to run, as parameters of a test."""
    found = {page for page in PAGES for block in blocks(page) if block.language in RUN and not block.reason}
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in sorted(found)]


# --- what every block must be -----------------------------------------------------------------------------------------
def untagged(page: Path) -> list[str]:
    return [block.place for block in blocks(page) if block.language not in LANGUAGES]


def test_there_are_blocks_to_run() -> None:
    assert len(pages_to_run()) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_names_its_language(page: Path) -> None:
    assert untagged(page) == []


@pytest.mark.parametrize("block", of_all_pages("yaml"))
def test_yaml_can_be_read(block: Block) -> None:
    assert yaml.safe_load(block.text) is not None


# --- what is not run --------------------------------------------------------------------------------------------------
class _Parsed(BaseException):
    """A command line was parsed, and nothing of the command was done."""

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        self.options, self.rest = options, list(rest)


def parsed(program: str, words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, by the program's own parser. Raises AssertionError if it refuses them."""
    depth = 0

    def stopping(parse: Any) -> Any:
        def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                options, rest = parse(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                raise _Parsed(options, rest)
            return options, rest

        return stop

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        for name in ("parse_known_args", "parse_known_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        try:
            main_of(program)(list(words))
        except _Parsed as done:
            unknown = [word for word in done.rest if word.startswith("-") or "=" not in word]
            assert unknown == [], f"{program} does not know {unknown}"
            done.options.overrides = [*getattr(done.options, "overrides", []), *done.rest]
            return done.options
        except SystemExit:
            pass
    raise AssertionError(said.getvalue() or f"{program} did not parse {words}")


def main_of(program: str) -> Any:
    """The function behind `python -m PROGRAM`."""
    is_package = "." not in program or (ROOT / program.replace(".", "/")).is_dir()
    module = f"{program}.__main__" if is_package else program
    return importlib.import_module(module).main


def commands(script: str) -> Iterator[list[str]]:
    """The words of each simple command of a script."""
    script = _QUOTED_OR_COMMENT.sub(lambda found: found[1] or "", script.replace("\\\n", " "))
    lexer = shlex.shlex(script, posix=True, punctuation_chars="\n;&|")
    lexer.commenters, lexer.whitespace, lexer.whitespace_split, words = "", " \t", True, list[str]()
    for word in [*lexer, "\n"]:
        if set(word) <= set("\n;&|"):
            if words:
                yield words
            words = []
        else:
            words.append(word)


def check_command(words: Sequence[str]) -> None:
    """Raise AssertionError if a command of this project, or a target of make, does not exist as it is written."""
    words = list(itertools.dropwhile(lambda word: "=" in word, words))  # variables of its environment
    if words[:1] == ["make"]:
        targets = [word for word in words[1:] if "=" not in word]
        known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(targets) <= set(known), f"make has no {sorted(set(targets) - set(known))}"
    if words[:2] == ["accelerate", "launch"]:
        given = words[words.index("--config_file") + 1] if "--config_file" in words else "configs"
        assert (ROOT / given).exists(), f"there is no {given}"
        words = ["python", *words[words.index("-m") :]]
    program, rest = program_of(words)
    if program is None:
        return
    options = parsed(program, rest)
    if program == "train.methods":
        check_method(options)
        return
    config = getattr(options, "config", None)
    if config is None or Path(config).name.startswith("my"):
        return
    if program in ("train.ablation", "train.bakeoff"):
        kind = getattr(importlib.import_module(program), "Ablation" if program == "train.ablation" else "Bakeoff")
        importlib.import_module("train.ablation").load_arms(ROOT / config, kind)
        return
    load = {"train": ("train.config", "load_run"), "data_synth": ("data_synth.config", "load_config")}[program]
    getattr(importlib.import_module(load[0]), load[1])(ROOT / config, options.overrides)


def check_method(options: argparse.Namespace) -> None:
    """Raise an error if a method, its config or one of its settings does not exist."""
    runs = importlib.import_module("train.methods.runs")
    method = options.of if options.method == "evaluate" else options.method
    if method and method != "draw":
        config = None if options.config is None else ROOT / options.config
        runs.load_method_run(method, config, options.overrides)


def program_of(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The program of ours that a command starts, if any, and its arguments."""
    name = Path(words[0]).name if words else ""
    if name == "imagine":
        return "imagine", list(words[1:])
    if name == "python" and words[1:2] == ["-m"] and words[2:3] and words[2] in PROGRAMS:
        return words[2], list(words[3:])
    return None, []


@pytest.mark.parametrize("block", of_all_pages("bash", run=False))
def test_commands_that_are_not_run_exist(block: Block) -> None:
    ran = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for words in commands(block.text):
        check_command(words)


@pytest.mark.parametrize("block", of_all_pages("python", run=False))
def test_python_that_is_not_run_compiles_and_its_imports_exist(block: Block) -> None:
    tree = ast.parse(block.text, block.place)
    compile(tree, block.place, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            module = importlib.import_module(str(node.module))
            for name in node.names:
                assert hasattr(module, name.name), f"{block.place}: {node.module} has no {name.name}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] in PACKAGES:
                    importlib.import_module(name.name)


# --- what is run ------------------------------------------------------------------------------------------------------
SHIM = """#!/bin/sh
case "$(basename "$0") $1 $2" in
  imagine*) program=imagine ;;
  "python -m imagine" | "python -m train" | "python -m train.assemble" | "python -m data_synth") program=$2; shift 2 ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
call=$(mktemp -d "$CALLS/XXXXXX")
mkfifo "$call/code"
pwd >"$call/folder"
for word in "$program" "$@"; do printf '%s\\0' "$word"; done >"$call/words"
: >"$call/ready"
read -r code <"$call/code"
cat "$call/out"
cat "$call/err" >&2
exit "$code"
"""


@functools.cache
def tiny_public_files() -> Path:
    """A folder with tiny public bases and IP-Adapters, for commands that name published ones."""
    folder = Path(tempfile.mkdtemp(prefix="imagine-public-"))
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name, xl in (("sd15", False), ("sdxl", True)):
        tiny_bases.save_base(folder / name, xl)
        file = f"ip-adapter-plus-face_{'sdxl_vit-h' if xl else 'sd15'}.safetensors"
        tiny_bases.save_ip_adapter(folder / "models" / file, xl=xl)
    for name in tiny_transformer_folders.SHORT_NAMES.values():
        tiny_transformer_folders.save_base(folder / name, name)
        tiny_transformer_folders.save_adapter(folder / f"{name}-adapter", name)
    return folder


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a fresh clone, as the present one."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "weights", folder / "weights", copy_function=os.symlink)
    for name in ("configs", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for page in ROOT.glob("*.md"):
        shutil.copy(page, folder)
    os.symlink(tiny_public_files(), folder / "tiny")
    for number, name in enumerate(("photo.jpg", "1.jpg", "2.jpg")):
        example = ROOT / "weights" / "examples" / f"person-{max(number, 1)}.png"
        Image.open(example).convert("RGB").save(folder / name, quality=95)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return folder


# Readers of pages may leave files to the garbage collector, and so does webdataset itself.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("page", pages_to_run())
def test_blocks_of_a_page_run(page: Path, clone: Path, tmp_path: Path) -> None:
    before = _files(clone)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.reason or block.language not in RUN:
            continue
        started = time.monotonic()
        if block.language == "python":
            # Line numbers of the page, so that a traceback points there.
            code = compile("\n" * block.line + block.text, str(page), "exec")
            exec(code, names)
        else:
            run_script(block, tmp_path / "calls")
        print(f"{block.place}: {time.monotonic() - started:.1f} s")
    names.clear()
    gc.collect()
    written = sorted(path for path in _files(clone) - before if path.split("/")[0] not in WRITABLE)
    assert written == [], "blocks may write to out/ and runs/ only"


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def run_script(block: Block, calls: Path) -> None:
    """Run a block of bash here. Raises AssertionError with what it printed if it fails."""
    programs = calls.with_name("bin")
    for name in ("imagine", "python"):
        if not (programs / name).exists():
            programs.mkdir(exist_ok=True)
            (programs / name).write_text(SHIM)
            (programs / name).chmod(0o755)
    calls.mkdir(exist_ok=True)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    setting = {**os.environ, "PATH": path, "CALLS": str(calls), "REAL_PYTHON": sys.executable}
    printed = calls.with_name("printed")
    with printed.open("wb") as out:
        script = subprocess.Popen(["bash", "-eu", "-c", block.text], env=setting, stdout=out, stderr=out)
        try:
            until = time.monotonic() + LONGEST
            while script.poll() is None:
                assert time.monotonic() < until, f"{block.place} takes more than {LONGEST} s"
                for ready in calls.glob("*/ready"):
                    ready.unlink()
                    answer(ready.parent, block.smaller)
                time.sleep(0.02)
        finally:
            script.kill()
            script.wait()
    assert script.returncode == 0, f"{block.place} failed:\n{printed.read_text(errors='replace')[-3000:]}"


def answer(call: Path, smaller: Sequence[str]) -> None:
    """Do what a command of a script asked for, in a fork_process process, and give its exit code back."""
    program, *words = (call / "words").read_text().split("\0")[:-1]
    for text in smaller:
        words = made_smaller([program, *words], shlex.split(text))[1:]
    process = fork_process(_command, program, words, (call / "folder").read_text().strip(), str(call))
    try:
        process.join(LONGEST)
    finally:  # also when the tests are interrupted
        process.kill()
        process.join()
    (call / "code").write_text(f"{process.exitcode if (process.exitcode or 0) >= 0 else 1}\n")


def _command(program: str, words: list[str], folder: str, call: str) -> None:
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{call}/{name}", os.O_WRONLY | os.O_CREAT), number)
    import torch

    torch.set_num_threads(1)
    code = main_of(program)(words)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def made_smaller(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command with these options and settings in place of its own, or added to it."""
    changed, given = list(words), list(options)
    names_a_verb = bool(given) and not given[0].startswith("-") and "=" not in given[0]
    if names_a_verb and given.pop(0) not in words:
        return changed
    while given:
        name = given.pop(0)
        if not name.startswith("-"):  # key=value
            key = name.partition("=")[0] + "="
            changed = [word for word in changed if not word.startswith(key)] + [name]
            continue
        value = [given.pop(0)] if given and not given[0].startswith("-") and "=" not in given[0] else []
        if name in changed:
            place = changed.index(name)
            changed[place : place + 1 + len(value)] = [name, *value]
        else:
            changed += [name, *value]
    return changed


@pytest.mark.parametrize(
    ("command", "options", "smaller"),
    [
        ("imagine generate --steps 20 --seed 1", "--steps 2", "imagine generate --steps 2 --seed 1"),
        ("imagine generate --seed 1", "generate --steps 2", "imagine generate --seed 1 --steps 2"),
        ("imagine doctor", "generate --steps 2", "imagine doctor"),
        ("train a.yaml base.images=9 --output o", "base.images=2", "train a.yaml --output o base.images=2"),
        ("imagine plan --fit 2GB", "--tiling", "imagine plan --fit 2GB --tiling"),
    ],
)
def test_options_make_a_command_smaller(command: str, options: str, smaller: str) -> None:
    assert made_smaller(command.split(), options.split()) == smaller.split()


def test_a_wrong_command_is_noticed() -> None:
    for wrong in (
        "imagine generate --refrence a.jpg --prompt b --output c.png",
        "imagine undo",
        "python -m train configs/weights.yaml --output o base.imagess=2",
        "python -m train configs/nothing.yaml --output o",
        "python -m data_synth build configs/pairs_world.yaml --output o --workers 2",
        "make coffee",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check_command(next(commands(wrong)))
    script = (
        "# comment\nA=1 python -m train configs/weights.yaml \\\n  --output o base.images=2 && make demo  # and so\n"
    )
    each = list(commands(script))
    assert [words[-1] for words in each] == ["base.images=2", "demo"]
    for words in each:
        check_command(words)
