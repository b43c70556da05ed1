"""The adapter: everything that the project adds to a denoiser, as one object to attach, detach, save and load.

Usually two adapters are attached to one stock denoiser: the text adapter (branches "t5" and "byt5", trained together
with the base) and the identity adapter (branch "vision", its projection, and LoRA on the base's attention). Both have
the same class. Building an adapter does not change the denoiser. `attach` replaces attention processors, and `detach`
is its exact inverse, in any order. A weight is named by the module path of its attention layer:

    down_blocks.0.attentions.0.transformer_blocks.0.attn2.vision.to_k.weight         a branch (to_k, to_v, gate)
    down_blocks.0.attentions.0.transformer_blocks.0.attn2.vision.router.to_q.weight  a branch's router (router.py)
    down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight     LoRA, under peft's names
    projections.vision.proj.0.weight                                                 a branch's token projection
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from imagine.adapter.attention import (
    TEXT,
    Branch,
    LayerWeights,
    LowRank,
    ParallelAttention,
    attention_layers,
    branch_strength,
    processor_of,
    strength_key,
    usable_mask,
)
from imagine.adapter.projections import (
    LINEAR_TOKENS,
    PLUS_HEAD,
    PLUS_TOKENS,
    FaceIdPlusProjection,
    FaceIdProjection,
    FullProjection,
    Kind,
    LinearProjection,
    PlusProjection,
    plus_inner_width,
)
from imagine.errors import ConfigError, WeightsError
from imagine.networks.files import why_unreadable
from imagine.networks.finite import check_finite
from imagine.networks.weights import check_tensor_names
from imagine.paths import as_path, kind_of, shorten_path
from imagine.records import Conditioning, Scale, Tokens

FORMAT_VERSION = "1"
FILE_NAME = "adapter.safetensors"
FAMILY_KEY = "family"  # metadata key of adapters for diffusion transformers
REQUIRED_METADATA = ("base", "encoder", "feature_layer", "tokens", "licence")  # the metadata of every saved adapter
Fusion = Literal["parallel", "concatenated"]
LoraTarget = Literal["to_q", "to_k", "to_v", "to_out.0"]
LORA_TARGETS: tuple[LoraTarget, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class BranchSpec:
    """The description of one branch.

    `name` is its key in Conditioning.branches, and `width` the width of the tokens that its keys and values read.
    `scale` is the strength where a call does not give one. With `zero_init` the gate on the branch's output starts at
    zero, so that a new adapter changes nothing; without it the gate starts at one, for branches that are trained
    together with the base.
    A `projection` (projections.py) maps vision features of `input_width` to tokens of `width`: "full" and "plus" read
    the encoder's penultimate tokens, "linear" its pooled embedding. "plus" and "linear" produce `tokens` of them;
    "plus" computes at `inner_width`, and its attention heads together have `attention_width`; both have the sizes of
    the published IP-Adapter Plus files by default (`plus_inner_width`), which other programs require.
    "faceid" reads a face recogniser's embedding of `input_width`, "faceid-plus" such an embedding of `face_width` and
    the encoder's penultimate tokens of `input_width`; `shortcut` is of FaceID Plus v2.
    `absent` selects what the branch reads for a picture without a person, as in the unconditional pass of guidance:
    nothing ("off"), or the encoder's output for an empty input ("zeros": a normalised picture of zeros, which is grey,
    or a zero embedding), as IP-Adapters were trained.
    `fusion` is "parallel", or "concatenated" for the paper's comparison, which shares one softmax with the text. A new
    concatenated branch takes attention from the text although its values are zero, so only strength 0 leaves the base
    unchanged.
    With `router` the branch has a router in every layer (router.py), which gives each of several people in a picture a
    softmax of its own. Without one, several people share one softmax, except where a call gives their regions. With
    `people="concatenate"` they always share one: the paper's form (section 3.6), for comparison.
    `lora` says what the adapter's LoRA follows if this is its first branch: the branch's "strength", or only its
    "presence", as in FaceID files: then the LoRA is fully on wherever the strength is not 0.
    """

    name: str
    width: int
    scale: float = 1.0
    zero_init: bool = True
    projection: Kind | None = None
    input_width: int | None = None
    fusion: Fusion = "parallel"
    tokens: int | None = None
    inner_width: int | None = None
    attention_width: int | None = None
    absent: Literal["off", "zeros"] = "off"
    router: bool = False
    people: Literal["separate", "concatenate"] = "separate"
    face_width: int | None = None
    shortcut: bool = False
    lora: Literal["strength", "presence"] = "strength"

    @property
    def feature_width(self) -> int:
        """The width of the features that the branch's projection reads, or of its tokens if it has none."""
        return max(self.input_width or self.width, self.face_width or 0)

    def __post_init__(self) -> None:
        """Resolve the default widths of a plus projection, so that a saved description does not depend on them."""
        if self.projection == "plus":
            inner = self.inner_width or plus_inner_width(self.width)
            object.__setattr__(self, "inner_width", inner)
            object.__setattr__(self, "attention_width", self.attention_width or inner)

    def build_projection(self) -> nn.Module | None:
        """Return the projection with random initial weights; None if the branch has none."""
        if self.projection is None or self.input_width is None:
            return None
        if self.projection == "full":
            return FullProjection(self.input_width, self.width)
        if self.projection == "linear":
            return LinearProjection(self.input_width, self.width, self.tokens or LINEAR_TOKENS)
        if self.projection == "faceid":
            inner = self.inner_width or 2 * self.input_width
            return FaceIdProjection(self.input_width, self.width, inner, self.tokens or LINEAR_TOKENS)
        assert self.inner_width is not None and self.attention_width is not None
        if self.projection == "faceid-plus":
            assert self.face_width is not None
            return FaceIdPlusProjection(
                self.face_width, self.input_width, self.width, self.inner_width, self.attention_width,
                self.tokens or LINEAR_TOKENS, self.shortcut,
            )  # fmt: skip
        return PlusProjection(
            self.input_width, self.width, self.inner_width, self.attention_width, self.tokens or PLUS_TOKENS
        )


class Adapter(nn.Module):
    """Branches and LoRA for every attention layer of one kind of denoiser.

    Branches are added to the cross-attention layers. LoRA of rank `lora_rank` is added to the linear layers
    `lora_targets` of every attention layer in a transformer block. The LoRA follows the strength of the first branch,
    for every call and every batch item: where that branch is off, the LoRA is off. Keys and values are initialised as
    copies of the denoiser's own where the widths agree.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        branches: Sequence[BranchSpec],
        lora_rank: int = 0,
        lora_targets: Sequence[str] = LORA_TARGETS,
    ) -> None:
        super().__init__()
        _check_specs(branches)
        self.branch_specs = tuple(branches)
        self.lora_rank = lora_rank
        self.lora_targets = tuple(lora_targets) if lora_rank else ()
        self.metadata: dict[str, str] = {}  # the metadata of the file; empty until saved or loaded
        self._layer_names: list[str] = []
        for name, layer in self._make_layers(denoiser).items():
            add_submodule(self, name, layer)
            self._layer_names.append(name)
        for spec in branches:
            if (projection := spec.build_projection()) is not None:
                add_submodule(self, f"projections.{spec.name}", projection)

    def _make_layers(self, denoiser: nn.Module) -> dict[str, LayerWeights]:
        """Return new weights for each attention layer of this denoiser, by its module path."""
        made = {}
        for name, attn in attention_layers(denoiser).items():
            # Only transformer blocks pass the conditioning to their attention layers.
            block = denoiser.get_submodule(name.rpartition(".")[0])
            made[name] = self._layer_weights(attn, isinstance(block, BasicTransformerBlock))
        return made

    def _empty_layer(self) -> LayerWeights:
        """Return the weights of a layer that has neither branches nor LoRA yet."""
        specs = self.branch_specs
        concatenated = frozenset(spec.name for spec in specs if spec.fusion == "concatenated")
        joint = frozenset(spec.name for spec in specs if spec.people == "concatenate")
        scales = {spec.name: spec.scale for spec in specs}
        return LayerWeights(specs[0].name, scales, concatenated, joint, specs[0].lora == "presence")

    def _layer_weights(self, attn: Attention, conditioned: bool) -> LayerWeights:
        layer = self._empty_layer()
        if not conditioned:
            return layer
        for spec in self.branch_specs if attn.is_cross_attention else ():
            branch = Branch(spec.width, attn.inner_dim, spec.zero_init, spec.router)
            if spec.width == attn.to_k.in_features:
                branch.to_k.weight.data.copy_(attn.to_k.weight.data)
                branch.to_v.weight.data.copy_(attn.to_v.weight.data)
            layer.add_module(spec.name, branch)
        for target in self.lora_targets:
            linear = _linear(attn, target)
            add_submodule(layer, target, LowRank(linear.in_features, linear.out_features, self.lora_rank))
        return layer

    # --- attach and detach ------------------------------------------------------------------------------------------

    def layers(self) -> dict[str, LayerWeights]:
        """Return this adapter's weights by the module path of the attention layer."""
        return {name: cast(LayerWeights, self.get_submodule(name)) for name in self._layer_names}

    def attach(self, denoiser: nn.Module) -> ExitStack:
        """Attach this adapter to the denoiser; `with adapter.attach(denoiser): ...` detaches it at the end.

        Raises WeightsError if it is already attached, was built for another denoiser, or finds unknown processors.
        """
        self._attach(denoiser)
        on_exit = ExitStack()
        on_exit.callback(self.detach, denoiser)
        return on_exit

    def _attach(self, denoiser: nn.Module) -> None:
        targets, mine = attention_layers(denoiser), self.layers()
        self._check_fits(targets)
        present = {name: _processor_for(name, attn) for name, attn in targets.items()}
        for name, processor in present.items():
            _check_can_join(processor, mine[name])
        for name, processor in present.items():
            _install(targets[name], _with_layers(processor, [*processor.layers, mine[name]]))

    def detach(self, denoiser: nn.Module) -> None:
        """Undo `attach`; detaching the last adapter restores the stock processors. Raise WeightsError if unattached."""
        check_attached(denoiser, [self])
        self.release(denoiser)

    def release(self, denoiser: nn.Module) -> None:
        """Remove this adapter from every layer that still has it, whatever other code did to the other layers."""
        mine = self.layers()
        for name, attn in attention_layers(denoiser).items():
            processor = processor_of(attn)
            if not isinstance(processor, ParallelAttention) or name not in mine:
                continue
            rest = [layer for layer in processor.layers if layer is not mine[name]]
            if len(rest) < len(processor.layers):
                _install(attn, _with_layers(processor, rest) if rest else processor.stock)

    def is_attached(self, denoiser: nn.Module) -> bool:
        """Return whether this adapter is attached to every attention layer of the denoiser."""
        return is_attached(denoiser, self)

    def _check_fits(self, targets: Mapping[str, Attention]) -> None:
        if list(targets) != self._layer_names:
            raise WeightsError(
                f"This adapter was built for a denoiser with {len(self._layer_names)} attention layers, whose names "
                f"differ from this one's {len(targets)}; load the adapter that belongs to this denoiser."
            )
        for name, layer in self.layers().items():
            attn = targets[name]
            widths = {branch.to_k.out_features for branch in layer.branches().values()} or {attn.inner_dim}
            linears = {target: (layer.low_rank(target), _linear(attn, target)) for target in self.lora_targets}
            if widths != {attn.inner_dim} or any(
                low and (low.lora_A.in_features, low.lora_B.out_features) != (linear.in_features, linear.out_features)
                for low, linear in linears.values()
            ):
                raise WeightsError(
                    f"This adapter does not fit the denoiser's layer {name}, whose width is {attn.inner_dim}; "
                    "load the adapter that belongs to this denoiser."
                )

    # --- computation outside the attention layers -------------------------------------------------------------------

    def tokens(self, branch: str, features: Tensor, mask: Tensor | None = None) -> Tokens:
        """Return a branch's tokens for features (batch, length, width), through its projection if it has one.

        Features of several pictures have the shape (batch, pictures, length, width), and their tokens are concatenated
        in order; "linear" takes pooled embeddings (batch, pictures, width). The mask is for the output tokens.
        """
        if not any(spec.name == branch and spec.projection for spec in self.branch_specs):
            return Tokens(features, mask)
        projection = self.get_submodule(f"projections.{branch}")
        if features.dim() == 4:  # project each picture separately
            return Tokens(projection(features.flatten(0, 1)).unflatten(0, features.shape[:2]).flatten(1, 2), mask)
        return Tokens(projection(features), mask)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights; a diffusers pipeline reads it from every component."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision of the weights; a diffusers pipeline reads it from every component."""
        return next(self.parameters()).dtype

    @property
    def active(self) -> bool:
        """Return whether the adapter can change a picture; a new adapter, with all gates and LoRA at zero, cannot.

        This reads the weights, which waits for the device.
        """
        if any(spec.fusion == "concatenated" for spec in self.branch_specs):
            return True  # even with a closed gate, its tokens take attention from the text's tokens
        layers = self.layers().values()
        gates = [branch.gate for layer in layers for branch in layer.branches().values()]
        low_ranks = [low for layer in layers for low in map(layer.low_rank, self.lora_targets) if low is not None]
        return any(bool(weight.any()) for weight in [*gates, *(low.lora_B.weight for low in low_ranks)])

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters by part, the names that a training stage uses; every parameter is in exactly one part.

        The parts are "<branch>_branch" (keys, values and gates), "<branch>_router" and "<branch>_projection" if there
        is one, and "lora".
        """
        parts: dict[str, list[nn.Parameter]] = {}
        for layer in self.layers().values():
            for name, branch in layer.branches().items():
                routing = [] if branch.router is None else list(branch.router.parameters())
                own = [each for each in branch.parameters() if not any(each is other for other in routing)]
                parts.setdefault(f"{name}_branch", []).extend(own)
                if routing:
                    parts.setdefault(f"{name}_router", []).extend(routing)
            for low_rank in filter(None, map(layer.low_rank, self.lora_targets)):
                parts.setdefault("lora", []).extend(low_rank.parameters())
        for spec in self.branch_specs:
            if spec.projection:
                parts[f"{spec.name}_projection"] = list(self.get_submodule(f"projections.{spec.name}").parameters())
        return parts

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str], variant: str | None = None) -> None:
        """Write one safetensors file: `path` itself, or adapter.safetensors in it if it does not end in .safetensors.

        A `variant` is part of the file's name, as in diffusers: adapter.fp16.safetensors.
        `metadata` must contain base, encoder, feature_layer, tokens and licence, and may contain more. Raises
        ValueError if one is missing.
        """
        if lacking := [key for key in REQUIRED_METADATA if key not in metadata]:
            raise ValueError(f"the metadata of a saved adapter must also contain {', '.join(lacking)}")
        self.metadata = {
            **metadata,
            "format_version": FORMAT_VERSION,
            "branches": json.dumps([_described(spec) for spec in self.branch_specs]),
            "lora_rank": str(self.lora_rank),
            "lora_targets": json.dumps(self.lora_targets),
            **self._structure(),
        }
        file = as_path(path)
        file = file if file.suffix == ".safetensors" else file / file_name(variant)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.partial")
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, unfinished, self.metadata)
        unfinished.replace(file)  # atomic: a reader gets the old file or the new one, never a partial one

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        denoiser: nn.Module,
        expected: Mapping[str, str] | None = None,
        variant: str | None = None,
    ) -> "Adapter":
        """Load an adapter for this denoiser, bit-identical, in the saved precision, on the denoiser's device.

        `path` is a file, or a folder in which `variant` chooses the file (see `find_file`).
        For a denoiser on the meta device, of which only the layers matter, the adapter is on the CPU.

        `expected` holds metadata that must match, such as {"encoder": ...}. Raises WeightsError if the file does not
        fit.
        """
        file = find_file(path, variant)
        metadata, tensors = _read(file)
        for key, value in (expected or {}).items():
            if metadata.get(key) != value:
                raise WeightsError(
                    f"{file} has {key} {metadata.get(key)!r}, but {value!r} is needed; use a file made for it."
                )
        try:
            with torch.device("meta"):  # skips the initialisation and draws no random numbers
                adapter = cls._of_structure(file, metadata, denoiser)
        except (ConfigError, WeightsError):
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{file} does not describe its branches and LoRA properly; save it again.") from error
        _check_tensors(file, tensors, adapter.state_dict())
        adapter.load_state_dict(tensors, assign=True)
        adapter.metadata = metadata
        device = next(denoiser.parameters()).device
        return adapter if device.type == "meta" else adapter.to(device)

    def _structure(self) -> dict[str, str]:
        """Return further metadata from which `_of_structure` builds the same layers again."""
        return {}

    @classmethod
    def _of_structure(cls, file: Path, metadata: Mapping[str, str], denoiser: nn.Module) -> "Adapter":
        """Return a new adapter of the structure that a file's metadata describes; its weights are random.

        Raises KeyError, TypeError or ValueError if the metadata is wrong, and WeightsError if it is of another kind.
        """
        if FAMILY_KEY in metadata:
            raise WeightsError(
                f"{file} is an adapter for a transformer of the family {metadata[FAMILY_KEY]}, but this denoiser is a "
                f"{type(denoiser).__name__}: load it into a pipeline of its family."
            )
        return cls(denoiser, saved_specs(metadata), int(metadata["lora_rank"]), json.loads(metadata["lora_targets"]))


def check_attached(denoiser: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Raise WeightsError with the likely cause unless every adapter is attached to every attention layer."""
    targets = attention_layers(denoiser)
    for adapter in adapters:
        for name, layer in adapter.layers().items():
            processor = processor_of(targets[name]) if name in targets else None
            attached = isinstance(processor, ParallelAttention) and any(layer is other for other in processor.layers)
            if not attached:
                raise WeightsError(
                    f"The adapter with branch {layer.owner!r} is not attached to {name}, whose processor is "
                    f"{type(processor).__name__}: set_attention_slice, set_attn_processor, enable_xformers, "
                    "fuse_qkv_projections and IP-Adapters replace it; do not use them, or call "
                    "set_attn_processor(AttnProcessor2_0()) and then load the adapter again."
                )


def is_attached(denoiser: nn.Module, adapter: Adapter) -> bool:
    """Return whether an adapter is attached to every attention layer."""
    try:
        check_attached(denoiser, [adapter])
    except WeightsError:
        return False
    return True


def prepare(denoiser: nn.Module, conditioning: Conditioning) -> Conditioning:
    """Prepare a conditioning for the many steps of one picture; the outputs stay bit-identical.

    The result has a cache, in which the first step stores the keys and values of all branches. It also stores those of
    the denoiser's own text, as long as the same tensor object is passed as encoder_hidden_states. Absent tokens are
    folded into the scales. Branches that are off in the whole batch are removed. Rows at either end in which a branch
    is off (the unconditional rows of guidance) skip its computation. A mask that marks every token is dropped. If a
    LoRA acts on keys or values, a new strength needs a newly prepared conditioning.
    Raises WeightsError if a branch has tokens but no attached adapter reads it, and ConfigError if groups or regions do
    not fit a branch's tokens.
    """
    targets = {name: attn for name, attn in attention_layers(denoiser).items() if attn.is_cross_attention}
    layer_of_branch = {
        branch: layer
        for name, attn in targets.items()
        for layer in _processor_for(name, attn).layers
        for branch in layer.branches()
    }
    return prepare_for_layers(layer_of_branch, conditioning)


def prepare_for_layers(layer_of_branch: Mapping[str, LayerWeights], conditioning: Conditioning) -> Conditioning:
    """Do what `prepare` does, for attached adapters that have these branches, each with one of its layers."""
    branches: dict[str, Tokens] = {}
    scales: dict[str, Scale | Mapping[str, Scale]] = {}
    for name, tokens in conditioning.branches.items():
        if name not in layer_of_branch:
            raise WeightsError(
                f"No attached adapter reads the branch {name!r}; attach its adapter, or leave its tokens out."
            )
        _check_people(conditioning, name)
        scale = _mask_scale(conditioning.scales.get(name, layer_of_branch[name].default_scales[name]), tokens)
        if any(map(_is_nonzero, scale.values() if isinstance(scale, Mapping) else [scale])):
            mask = None if tokens.mask is None or bool(tokens.mask.all()) else usable_mask(tokens)
            branches[name], scales[name] = Tokens(tokens.values, mask), scale
    return replace(conditioning, branches=branches, scales=scales, cache=_initial_cache(scales))


def _check_people(conditioning: Conditioning, branch: str) -> None:
    """Raise ConfigError unless a branch's groups divide its tokens, and its regions are one per person."""
    values, groups = conditioning.branches[branch].values, conditioning.groups.get(branch)
    if groups is None:
        return
    if groups.dim() != 2 or len(groups) != len(values) or values.shape[1] % groups.shape[1]:
        raise ConfigError(
            f"The groups {list(groups.shape)} do not fit the tokens {list(values.shape)} of {branch!r}: give (batch, "
            "people), and as many tokens for each person."
        )
    regions = conditioning.regions.get(branch)
    if regions is not None and regions.shape[1] != groups.shape[1]:
        raise ConfigError(
            f"There are {regions.shape[1]} regions for {groups.shape[1]} people in {branch!r}: give one for each."
        )


def _initial_cache(scales: Mapping[str, Scale | Mapping[str, Scale]]) -> dict[tuple[str, str], Any]:
    """Return a cache with the active rows of every strength, each stored with the tensor that it was computed from."""
    cache: dict[tuple[str, str], Any] = {}
    for branch, scale in scales.items():
        layers: Mapping[str, Scale] = scale if isinstance(scale, Mapping) else {"": scale}
        for layer, each in layers.items():
            if isinstance(each, Tensor):
                cache[strength_key(branch, layer)] = (each, branch_strength(each))
    return cache


def _mask_scale(scale: Scale | Mapping[str, Scale], tokens: Tokens) -> Scale | Mapping[str, Scale]:
    """Return the scale, set to 0 for batch items whose tokens are all masked."""
    if isinstance(scale, Mapping):
        return {name: cast(Scale, _mask_scale(each, tokens)) for name, each in scale.items()}
    if tokens.mask is None:
        return scale
    present = tokens.mask.any(dim=1)
    return scale if bool(present.all()) else scale * present.to(tokens.values.dtype)


def _is_nonzero(scale: Scale) -> bool:
    return bool(scale.any()) if isinstance(scale, Tensor) else scale != 0


def _check_specs(branches: Sequence[BranchSpec]) -> None:
    names = [spec.name for spec in branches]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"An adapter needs one or more branches with different names, not {names}.")
    for spec in branches:
        if not spec.name.isidentifier() or spec.name == TEXT or spec.name.startswith(("to_", "low_rank")):
            raise ConfigError(f"A branch cannot be called {spec.name!r}; use a plain word such as 't5' or 'vision'.")
        if hasattr(LayerWeights, spec.name):
            raise ConfigError(f"A branch cannot be called {spec.name!r}, which torch uses itself; use another word.")
        if spec.router and (spec.people == "concatenate" or spec.fusion == "concatenated"):
            raise ConfigError(
                f"Branch {spec.name!r} has a router, which needs a softmax per person: leave out the router, or use "
                'people="separate" and fusion="parallel".'
            )
        if (spec.projection is None) != (spec.input_width is None):
            raise ConfigError(f"Branch {spec.name!r} must give both projection and input_width, or neither.")
        if spec.projection == "plus" and any(
            (each or 0) % PLUS_HEAD for each in (spec.inner_width, spec.attention_width)
        ):
            raise ConfigError(
                f"Branch {spec.name!r}: the widths inside a plus projection must be multiples of {PLUS_HEAD}."
            )


def _processor_for(name: str, attn: Attention) -> ParallelAttention:
    """Return the layer's processor; wrap a stock one in an empty one of ours. Raise WeightsError for any other."""
    processor = processor_of(attn)
    if isinstance(processor, ParallelAttention):
        return processor
    if type(processor) is AttnProcessor2_0:
        return ParallelAttention(name, processor, ())
    raise WeightsError(
        f"The denoiser's layer {name} uses {type(processor).__name__} instead of the stock AttnProcessor2_0; undo "
        "attention slicing or xformers with set_attn_processor(AttnProcessor2_0()), an IP-Adapter with "
        "unload_ip_adapter(), then attach."
    )


def _check_can_join(processor: ParallelAttention, layer: LayerWeights) -> None:
    if any(other is layer for other in processor.layers):
        raise WeightsError("This adapter is already attached to this denoiser; detach it first.")
    taken = {branch for other in processor.layers for branch in other.default_scales}
    if shared := taken & set(layer.default_scales):
        raise WeightsError(f"Another attached adapter also has a branch {min(shared)!r}; detach that adapter first.")


def _with_layers(processor: ParallelAttention, layers: Sequence[LayerWeights]) -> ParallelAttention:
    """Return a processor with other adapter layers and the same attention backend."""
    new = ParallelAttention(processor.name, processor.stock, layers)
    new._attention_backend = processor._attention_backend
    return new


def _install(attn: Attention, processor: ParallelAttention | AttnProcessor2_0) -> None:
    attn.set_processor(cast(AttnProcessor, processor))


def _linear(attn: Attention, target: str) -> nn.Linear:
    if target not in LORA_TARGETS:
        raise ConfigError(f"There is no LoRA target {target!r}; choose from {', '.join(LORA_TARGETS)}.")
    return cast(nn.Linear, attn.get_submodule(target))  # or a wrapper of a linear layer, such as peft's


def add_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add a module at a dotted path below root, with plain containers in between; the path is its state-dict name."""
    *parents, last = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = cast(nn.Module, root._modules[part])
    root.add_module(last, module)


def _described(spec: BranchSpec) -> dict[str, Any]:
    """Return a spec as plain values; what only FaceID files have is left out of the others, as in older files."""
    plain = {"face_width": None, "shortcut": False, "lora": "strength"}
    return {name: value for name, value in asdict(spec).items() if name not in plain or value != plain[name]}


def saved_specs(metadata: Mapping[str, str]) -> tuple[BranchSpec, ...]:
    """Return the specs of the branches in a saved adapter. Raises KeyError, TypeError or ValueError if they are wrong.

    Older files leave out a plus projection's inner width if it equals the width.
    """
    described: list[dict[str, Any]] = json.loads(metadata["branches"])
    for each in described:
        if each.get("projection") == "plus" and each.get("inner_width") is None:
            each["inner_width"] = each["width"]
    return tuple(BranchSpec(**each) for each in described)


def file_name(variant: str | None = None) -> str:
    """Return the name of an adapter's file; a variant such as "fp16" stands where diffusers puts it."""
    return FILE_NAME if variant is None else FILE_NAME.replace(".", f".{variant}.")


def find_file(path: str | os.PathLike[str], variant: str | None = None) -> Path:
    """Return an adapter's file: `path` itself, or the file of this variant in the folder `path`.

    If the folder has no such file, the file without a variant is next, and then the only other one. Raises WeightsError
    if the folder has several other variants.
    """
    path = as_path(path)
    if path.suffix == ".safetensors":
        return path
    if kind_of(path, WeightsError) != "folder":
        return path / FILE_NAME  # reading it says what is wrong
    for name in (file_name(variant), FILE_NAME):
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob(FILE_NAME.replace(".", ".*.")))
    if len(others) > 1:
        names = ", ".join(other.name for other in others)
        raise WeightsError(f"{shorten_path(path)} holds several variants of the adapter ({names}): give variant=.")
    return others[0] if others else path / FILE_NAME


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of a saved adapter; no denoiser is needed. Raise WeightsError as `Adapter.load` does."""
    return _read(find_file(path))[0]


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if kind_of(file, WeightsError) != "file":
        raise WeightsError(
            f"There is no adapter file {shorten_path(file)}; give the folder or file of a saved adapter."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            # Tensors are cloned because those of a file start at unaligned addresses, where CPU kernels sum in another
            # order: the pictures of the loaded and the saved adapter would differ in the last bit.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise WeightsError(why_unreadable(file)) from error
    if metadata.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"{file} has format_version {metadata.get('format_version')!r}, but this version of imagine reads "
            f"{FORMAT_VERSION!r}; use an adapter saved by imagine, or convert it with import-ip-adapter."
        )
    check_finite(str(file), tensors)
    return metadata, tensors


def _check_tensors(file: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    for names, fault in ((missing, "names a router but lacks"), (unexpected, "names no router but holds")):
        if routing := [name for name in names if ".router." in name]:
            raise WeightsError(f"{file} {fault} {routing[0]}; save the adapter again with Adapter.save.")
    check_tensor_names(str(file.parent), missing, unexpected)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise WeightsError(
                f"{file} holds {name} of shape {list(tensor.shape)} instead of {list(wanted[name].shape)}; "
                "use the file made for this denoiser."
            )
