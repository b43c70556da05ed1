"""Describe a standard IP-Adapter file from the names and shapes of its tensors, without importing torch.

The code that imports, exports and inspects such files uses this one description. The layout is shared by
https://github.com/tencent-ailab/IP-Adapter, diffusers (loaders/unet.py) and ComfyUI:

    image_proj.*                       projection from vision features to tokens; its tensor names identify the variant
    ip_adapter.{0,1,2,...}.to_{q,k,v,out}_lora.{down,up}.weight
                                       LoRA of all attention layers, in FaceID files
    ip_adapter.{1,3,5,...}.to_k_ip.weight, .to_v_ip.weight
                                       keys and values of the cross-attention layers, in the order down, up, middle

diffusers silently drops unknown tensors and resampler layers beyond the fourth, so that a file appears to load but
gives different pictures. This module reports anything that diffusers would drop as a problem.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

Shape = tuple[int, ...]

PROJECTION, BRANCHES = "image_proj.", "ip_adapter."
LINEAR_TOKENS = 4  # tokens per picture of a "base" file; diffusers supports no other number
PLUS_DEPTH = 4  # resampler layers; diffusers silently drops any others
PLUS_HEAD = 64  # width of an attention head, which diffusers assumes
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights expects
KOHYA_FILE = "lora_kohya.safetensors"  # the same weights under the tensor names that ComfyUI reads

RESAMPLER = "perceiver_resampler."  # the part of a FaceID Plus projection that reads vision tokens
RESAMPLERS = ("plus", "faceid-plus")  # projections with a resampler
ARCFACE_WIDTH = 512  # of the embeddings of InsightFace's recognisers
LORA_LAYERS = ("q", "k", "v", "out")  # the linear layers of attention that the LoRA of FaceID files changes

VARIANT_NAMES = {"linear": "base", "full": "full", "plus": "plus", "faceid": "FaceID", "faceid-plus": "FaceID Plus"}
FAMILIES = {(70, 2048): "Stable Diffusion XL", (16, 768): "Stable Diffusion 1.5", (16, 1024): "Stable Diffusion 2"}
ENCODERS = {  # (width of the tokens, width of the pooled embedding)
    "OpenCLIP ViT-H/14": (1280, 1024), "OpenCLIP ViT-bigG/14": (1664, 1280), "CLIP ViT-L/14": (1024, 768),
}  # fmt: skip

COMFYUI, WEBUI, INVOKEAI = "ComfyUI_IPAdapter_plus", "sd-webui-controlnet", "InvokeAI"  # other programs that load files

_BRANCH = re.compile(r"(\d+)\.to_([kv])_ip\.weight")
_LORA = re.compile(r"(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_LORA_DOWN = re.compile(r"\d+\.to_\w+_lora\.down\.weight")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")  # of data-parallel and compiled modules
_TRAINER = ("image_proj_model.", "adapter_modules.")
_PROCESSOR = re.compile(r"unet\.(.+)\.processor\.(to_[kv]_ip\.weight)")


@dataclass(frozen=True)
class Layout:
    """A file's variant and sizes (None if unknown), and the problem that prevents loading it, if there is one."""

    kind: str | None  # "linear", "full", "plus", "faceid", "faceid-plus"; None: unknown
    tokens: int | None  # per picture; None: as many as the encoder has
    input_width: int | None  # width of the vision features that the projection reads
    width: int | None  # width of the tokens
    inner_width: int | None
    attention_width: int | None
    text_width: int | None  # width of the base's text tokens, from the key weights
    layer_widths: tuple[int, ...]  # widths of the base's cross-attention layers, in the file's order
    problem: str  # rest of a sentence that starts with the file's name; "" for no problem
    face_width: int | None = None  # width of the face recogniser's embedding that the projection reads
    lora_rank: int = 0  # of the LoRA for the base's attention that the file holds; 0: none

    @property
    def variant(self) -> str:
        """The variant's common name."""
        if self.kind == "plus" and self.face_width:
            return "InstantID"
        return VARIANT_NAMES.get(self.kind or "", "unknown projection")

    @property
    def needs_encoder(self) -> bool:
        """Whether the projection reads features of a vision encoder, perhaps besides a face's embedding."""
        return self.face_width is None or self.kind == "faceid-plus"

    @property
    def family(self) -> str | None:
        """The family of base models with these layers; None if it is not a well-known one."""
        return FAMILIES.get((len(self.layer_widths), self.text_width or 0))

    @property
    def encoder(self) -> str | None:
        """The vision encoder with features of this width; None if it is not a well-known one."""
        return encoder_of(self.kind, self.input_width) if self.needs_encoder else None

    @property
    def unsupported(self) -> dict[str, str]:
        """Why other programs cannot load a file that diffusers can: the rest of a sentence for each such program.

        The rules are those of the programs' code (docs/ip_adapter.md, "Which projection to train").
        """
        xl = self.width == 2048
        inner, heads = (1280, 20) if xl else (self.width, 12)
        found: dict[str, str] = {}
        if self.face_width:
            return found
        if self.kind == "full" and xl:
            reason = "has a Full projection, which it supports on Stable Diffusion 1.5 only: use Plus for SDXL"
            found = {COMFYUI: reason, WEBUI: reason}
        if self.kind != "plus":
            return found
        if (self.tokens, self.inner_width) != (16, inner):
            sizes = f"has a Plus projection whose sizes differ from the 16 tokens of width {inner} that it requires"
            found = {COMFYUI: sizes, WEBUI: sizes}
        if self.input_width != 1280:
            found.setdefault(
                WEBUI, f"reads features of width {self.input_width}, but it requires those of ViT-H (1280)"
            )
        if self.width not in (768, 2048):
            found[INVOKEAI] = "has a Plus projection, which it supports for Stable Diffusion 1.5 and XL only"
        if self.attention_width != heads * PLUS_HEAD:
            for program in (COMFYUI, WEBUI, INVOKEAI):
                found.setdefault(program, f"has a Plus projection without the {heads} heads that it requires")
        return found

    def unsupported_sentences(self) -> list[str]:
        """Return one sentence for each reason in `unsupported`, with the programs that it holds for."""
        programs: dict[str, list[str]] = {}
        for program, reason in self.unsupported.items():
            programs.setdefault(reason, []).append(program)
        return [f"{' and '.join(names)} cannot load the file: it {reason}." for reason, names in programs.items()]


def encoder_of(kind: str | None, width: int | None) -> str | None:
    """Return the vision encoder whose tokens ("full", "plus") or pooled embedding ("linear") have this width."""
    pooled = kind == "linear"
    return next((name for name, widths in ENCODERS.items() if widths[pooled] == width), None)


def read_layout(shapes: Mapping[str, Shape]) -> Layout:
    """Describe a file with tensors of these names and shapes. Never raises; problems are in `Layout.problem`."""
    projection = {name.removeprefix(PROJECTION): shape for name, shape in _under(PROJECTION, shapes)}
    branches = {name.removeprefix(BRANCHES): shape for name, shape in _under(BRANCHES, shapes)}
    kind = _kind(projection)
    sizes = _sizes(kind, projection)
    keys = sorted((int(found[1]), shape) for name, shape in branches.items() if (found := _keys(name)))
    other = [name for name in shapes if not name.startswith((PROJECTION, BRANCHES))]
    face_width, rank = _face_width(kind, sizes, projection), _lora_rank(branches)
    problem = _problem(kind, sizes, projection, branches, other, face_width)
    text_width = next((shape[1] for _, shape in keys if len(shape) == 2), None)
    widths = tuple(shape[0] for _, shape in keys if shape)
    return Layout(kind, *sizes, text_width, widths, problem, face_width, rank)


def standard_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return the standard name of each stored name, without those to leave out, and a sentence for each thing done.

    torch.compile and DistributedDataParallel put prefixes before all names. Checkpoints of IP-Adapter's own trainer
    (tutorial_train.py) call the parts image_proj_model and adapter_modules and hold the frozen denoiser too. accelerate
    stores tensors with two names once, so that the branches may exist only as processors of the denoiser.
    """
    stored = list(names)
    plain = {name: _WRAPPERS.sub("", name) for name in stored}
    wrappers = sorted({found[0] for name in stored for found in _WRAPPERS.finditer(name)})
    notes = [f"The prefix {' and '.join(wrappers)} was removed from the names of the tensors."] if wrappers else []
    if any(name.startswith(_TRAINER) for name in plain.values()):
        converted = _from_trainer(plain)
        notes.append(
            "The names of IP-Adapter's own trainer were converted, and its denoiser "
            f"({len(plain) - len(converted)} tensors named unet.*) was left out."
        )
        plain = converted
    if len(set(plain.values())) < len(plain):  # two tensors of one name: which counts is unknown
        return {name: name for name in stored}, []
    return plain, notes


def _from_trainer(plain: Mapping[str, str]) -> dict[str, str]:
    """Return the standard names of a checkpoint of IP-Adapter's own trainer, without its denoiser."""
    layers = sorted({found[1] for name in plain.values() if (found := _PROCESSOR.fullmatch(name))}, key=_order_of_layer)
    has_branches = any(name.startswith("adapter_modules.") for name in plain.values())
    converted: dict[str, str] = {}
    for stored, name in plain.items():
        found = _PROCESSOR.fullmatch(name)
        if found and not has_branches:
            converted[stored] = f"{BRANCHES}{2 * layers.index(found[1]) + 1}.{found[2]}"
        elif not name.startswith("unet."):
            name = name.replace("image_proj_model.", PROJECTION, 1) if name.startswith("image_proj_model.") else name
            converted[stored] = name.replace("adapter_modules.", BRANCHES, 1) if name.startswith("adapter") else name
    return converted


def _order_of_layer(layer: str) -> list[tuple[int, str]]:
    """Return a sort key: down, up, middle, as a UNet2DConditionModel registers its blocks; then by numbers."""
    first = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
    parts = layer.split(".")
    return [(first.get(parts[0], 3), ""), *((int(each), "") if each.isdigit() else (0, each) for each in parts[1:])]


def projection_shapes(
    kind: str, tokens: int | None, input_width: int, width: int, inner: int | None, attention: int | None,
    face_width: int | None = None,
) -> dict[str, Shape]:  # fmt: skip
    """Return the tensor names, without their prefix, and shapes of a projection of these sizes."""
    if kind in ("faceid", "faceid-plus"):
        return _face_shapes(kind, tokens, input_width, width, inner, attention, face_width or input_width)
    if kind == "linear":
        rows = width * (tokens or LINEAR_TOKENS)
        return {"proj.weight": (rows, input_width), "proj.bias": (rows,), **_norm("norm", width)}
    if kind == "full":
        first, second = _linear("proj.0", input_width, input_width), _linear("proj.2", input_width, width)
        return {**first, **second, **_norm("proj.3", width)}
    assert tokens is not None and inner is not None and attention is not None
    return {"latents": (1, tokens, inner), **_resampler_shapes(input_width, width, inner, attention)}


def _face_shapes(
    kind: str, tokens: int | None, input_width: int, width: int, inner: int | None, attention: int | None, face: int
) -> dict[str, Shape]:
    """Return names and shapes of a projection of a face's embedding, and for FaceID Plus of its vision tokens."""
    assert tokens is not None and inner is not None
    shapes = {**_linear("proj.0", face, inner), **_linear("proj.2", inner, width * tokens), **_norm("norm", width)}
    if kind == "faceid-plus":
        assert attention is not None
        resampler = _resampler_shapes(input_width, width, width, attention)
        shapes |= {f"{RESAMPLER}{name}": shape for name, shape in resampler.items()}
    return shapes


def _resampler_shapes(input_width: int, width: int, inner: int, attention: int) -> dict[str, Shape]:
    shapes = {
        **_linear("proj_in", input_width, inner), **_linear("proj_out", inner, width), **_norm("norm_out", width),
    }  # fmt: skip
    for layer in range(PLUS_DEPTH):
        attn, mlp = f"layers.{layer}.0", f"layers.{layer}.1"
        shapes |= {**_norm(f"{attn}.norm1", inner), **_norm(f"{attn}.norm2", inner), **_norm(f"{mlp}.0", inner)}
        shapes |= {f"{attn}.to_q.weight": (attention, inner), f"{attn}.to_kv.weight": (2 * attention, inner)}
        shapes |= {f"{attn}.to_out.weight": (inner, attention)}
        shapes |= {f"{mlp}.1.weight": (4 * inner, inner), f"{mlp}.3.weight": (inner, 4 * inner)}
    return shapes


def licence_of(file: Path, metadata: Mapping[str, str]) -> str | None:
    """Return a file's licence from its metadata, else from the front matter of a README.md in its folder or parent."""
    for name in ("licence", "license", "modelspec.license"):
        if metadata.get(name):
            return metadata[name]
    folder = file.parent.absolute()
    for readme in (folder / "README.md", folder.parent / "README.md"):
        if readme.is_file():
            head = readme.read_text(encoding="utf-8", errors="replace")[:4000]
            front = re.match(r"---\s*\n(.*?)\n---", head, re.DOTALL)
            found = front and re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE)
            return found[1].strip("\"'") if found else None
    return None


def _under(prefix: str, shapes: Mapping[str, Shape]) -> Iterable[tuple[str, Shape]]:
    return ((name, shape) for name, shape in shapes.items() if name.startswith(prefix))


def _keys(name: str) -> re.Match[str] | None:
    found = _BRANCH.fullmatch(name)
    return found if found and found[2] == "k" else None


def _kind(projection: Mapping[str, Shape]) -> str | None:
    """Return the variant, tested in the same order as in diffusers."""
    if "proj.weight" in projection:
        return "linear"
    if "proj.3.weight" in projection:
        return "full"
    if "perceiver_resampler.proj_in.weight" in projection:
        return "faceid-plus"
    if "norm.weight" in projection:
        return "faceid"
    return "plus" if "latents" in projection else None


def _sizes(
    kind: str | None, projection: Mapping[str, Shape]
) -> tuple[int | None, int | None, int | None, int | None, int | None]:
    """Return tokens, input width, width, inner width and attention width; None where the tensors do not show it."""

    def size(name: str, axis: int) -> int | None:
        shape = projection.get(name, ())
        return shape[axis] if len(shape) > axis else None

    if kind == "linear":
        rows, width = size("proj.weight", 0), size("norm.weight", 0)
        return (rows // width if rows and width else LINEAR_TOKENS), size("proj.weight", 1), width, None, None
    if kind == "full":
        return None, size("proj.0.weight", 1), size("proj.3.weight", 0), None, None
    if kind == "plus":
        inner, attention = size("latents", 2), size("layers.0.0.to_q.weight", 0)
        return size("latents", 1), size("proj_in.weight", 1), size("proj_out.weight", 0), inner, attention
    rows, width, inner = size("proj.2.weight", 0), size("norm.weight", 0), size("proj.0.weight", 0)
    tokens = rows // width if rows and width else LINEAR_TOKENS if kind == "faceid-plus" else None
    if kind == "faceid":
        return tokens, size("proj.0.weight", 1), width, inner, None
    if kind == "faceid-plus":
        attention = size(f"{RESAMPLER}layers.0.0.to_q.weight", 0)
        return tokens, size(f"{RESAMPLER}proj_in.weight", 1), width, inner, attention
    return None, None, None, None, None


def _face_width(kind: str | None, sizes: tuple[int | None, ...], projection: Mapping[str, Shape]) -> int | None:
    """Return the width of the face recogniser's embedding that a projection reads; None if it reads none."""
    if kind == "plus" and sizes[1] == ARCFACE_WIDTH:  # no CLIP encoder has features of this width
        return ARCFACE_WIDTH
    if kind not in ("faceid", "faceid-plus"):
        return None
    shape = projection.get("proj.0.weight", ())
    return shape[1] if len(shape) == 2 else None


def _lora_rank(branches: Mapping[str, Shape]) -> int:
    """Return the rank of the LoRA in a file; 0 if it has none."""
    return next((shape[0] for name, shape in branches.items() if _LORA_DOWN.fullmatch(name) and len(shape) == 2), 0)


def _problem(
    kind: str | None,
    sizes: tuple[int | None, ...],
    projection: Mapping[str, Shape],
    branches: Mapping[str, Shape],
    other: list[str],
    face_width: int | None,
) -> str:
    if not projection or not branches:
        lacking = PROJECTION if not projection else BRANCHES
        return f"has no tensors named {lacking}*, so it is not an IP-Adapter: give the file that holds both parts"
    if kind is None:
        return f"has an image projection of an unknown kind ({_some(projection)}): use a base, Plus or Full file"
    if other:
        return f"holds {_some(other)} besides {PROJECTION}* and {BRANCHES}*, which diffusers would silently drop"
    return _projection_problem(kind, sizes, projection, face_width) or _branch_problem(sizes[2], branches)


def _projection_problem(
    kind: str, sizes: tuple[int | None, ...], found: Mapping[str, Shape], face_width: int | None
) -> str:
    tokens, input_width, width, inner, attention = sizes
    layers = "layers." if kind == "plus" else f"{RESAMPLER}layers."
    depth = len({name.removeprefix(layers).split(".")[0] for name in found if name.startswith(layers)})
    if kind in RESAMPLERS and depth != PLUS_DEPTH:
        return f"has a {VARIANT_NAMES[kind]} projection of {depth} layers, but diffusers supports exactly {PLUS_DEPTH}"
    if kind == "linear" and tokens != LINEAR_TOKENS:
        return f"makes {tokens} tokens per picture, but diffusers supports exactly {LINEAR_TOKENS} for a base file"
    if kind in RESAMPLERS and attention is not None and (attention < PLUS_HEAD or attention % PLUS_HEAD):
        variant = VARIANT_NAMES[kind]
        return f"has a {variant} projection whose heads are not {PLUS_HEAD} wide, which diffusers would misread"
    needed = [input_width, width, *([tokens, inner] if kind in (*RESAMPLERS, "faceid") else [])]
    needed += [attention] if kind in RESAMPLERS else []
    if None in needed:
        return f"lacks tensors of its {VARIANT_NAMES[kind]} projection: download it again"
    assert input_width is not None and width is not None
    wanted = projection_shapes(kind, tokens, input_width, width, inner, attention, face_width)
    return difference(PROJECTION, wanted, found)


def _branch_problem(width: int | None, branches: Mapping[str, Shape]) -> str:
    names = [_BRANCH.fullmatch(name) for name in branches]
    numbers = sorted({int(found[1]) for found in names if found})
    flux = bool(numbers) and numbers == list(range(len(numbers)))
    if flux or any(name.endswith("_ip.bias") for name in branches):
        return "numbers its layers 0, 1, 2 or gives them biases, as Flux files do: use a file for SDXL or SD 1.5"
    if not numbers:
        return (
            f"names no layer {BRANCHES}N.to_k_ip.weight, but {_some(map(BRANCHES.__add__, branches))}: use another file"
        )
    wanted: dict[str, Shape] = {}
    for number in range(1, 2 * len(numbers), 2):
        rows = branches.get(f"{number}.to_k_ip.weight", (0, 0))[:1]
        for each in "kv":
            wanted[f"{number}.to_{each}_ip.weight"] = (*rows, width or 0)
    wanted |= _lora_wanted(branches)
    return difference(BRANCHES, wanted, branches)


def _lora_wanted(branches: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the tensors of the LoRA of each layer that has some: down and up of four linear layers, of one rank.

    The widths are those that are found; only a denoiser has others (`imagine.ip_adapter.reading`).
    """
    rank, wanted = _lora_rank(branches), dict[str, Shape]()
    for number in sorted({int(found[1]) for name in branches if (found := _LORA.fullmatch(name))}):
        for each in LORA_LAYERS:
            down, up = (f"{number}.to_{each}_lora.{side}.weight" for side in ("down", "up"))
            wanted |= {down: (rank, *branches.get(down, (0, 0))[1:]), up: (*branches.get(up, (0, 0))[:1], rank)}
    return wanted


def difference(prefix: str, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> str:
    """Return the first missing, unknown or wrongly shaped tensor as the rest of a sentence; "" if all tensors match."""
    if missing := [prefix + name for name in wanted if name not in found]:
        return f"lacks {_some(missing)}: download it again"
    if extra := [prefix + name for name in found if name not in wanted]:
        return f"holds the unknown {_some(extra)}, which diffusers would silently drop"
    for name, shape in wanted.items():
        if found[name] != shape:
            return f"holds {prefix}{name} of shape {list(found[name])} instead of {list(shape)}"
    return ""


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
