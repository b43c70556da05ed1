"""The adapter for diffusion transformers: one attachment for all families of `families`.

It has the interface and the files of `imagine.adapter.adapter.Adapter`: attach, detach, save, load, tokens, parts. Its
weights stay outside the transformer, whose modules and state dict do not change. So LoRA of peft, quantisation and
saving see the transformer alone. A weight is named by the module path of its site:

    sites.single_transformer_blocks.3.attn.vision.to_q.weight   a branch: to_q, to_k, to_v, to_out, norms, gate
    projections.vision.proj.0.weight                            its token projection

`prepare` prepares a conditioning for the many steps of one picture, as the function of that name does for a U-Net.
"""

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from imagine.adapter.adapter import (
    FAMILY_KEY,
    Adapter,
    BranchSpec,
    prepare_for_layers,
    saved_specs,
)
from imagine.adapter.attention import Branch, LayerWeights
from imagine.errors import ConfigError, WeightsError
from imagine.records import Conditioning
from imagine.transformer_bases.branch import ImageBranch, SiteHook
from imagine.transformer_bases.families import family_of, heads_of, sites_of
from imagine.transformer_bases.ip_branches import (
    INSTANTX,
    OWN,
    XLABS,
    InstantXBranch,
    Layout,
    XLabsBranch,
    keep_queries,
    make_resampler,
)
from imagine.transformer_bases.passing import close_pass, current_pass, open_pass, restore_checkpoints

SITES = "sites"  # what the names of branches begin with; some transformers call their blocks as we call a method
NARROWER = 4  # a branch has a quarter of the transformer's heads by default


@dataclass
class _Attachment:
    """What is on a transformer: the adapters, and the handles of their hooks."""

    adapters: "list[TransformerAdapter]" = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def remove_hooks(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


_attachments: "weakref.WeakKeyDictionary[nn.Module, _Attachment]" = weakref.WeakKeyDictionary()


class TransformerAdapter(Adapter):
    """Branches for the sites of one kind of diffusion transformer.

    branches: as in `Adapter`, without LoRA of our own; peft's may be loaded beside it. heads: of each branch; a quarter
    of the transformer's by default. every: a branch at each site (1), at every second one (2), and so on, from the
    first. layout, resampler: of an imported file (`ip_files`), whose branches are computed as its authors do. Raises
    WeightsError for a transformer of no known family, and ConfigError for wrong numbers.
    """

    def __init__(
        self, denoiser: nn.Module, branches: Sequence[BranchSpec], heads: int | None = None, every: int = 1,
        layout: Layout = OWN, resampler: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        family = family_of(denoiser)
        _check_specs(branches)
        heads = max(1, heads_of(denoiser) // NARROWER) if heads is None else heads
        if heads < 1 or every < 1:
            raise ConfigError(f"heads={heads} and every={every} must be whole numbers of at least 1.")
        self.family, self.width = family.title, family.width(cast(Any, denoiser).config)
        self.heads, self.every = heads, every
        self.head_width, self.layout = max(1, self.width // heads_of(denoiser)), layout
        self.resampler_sizes = dict(resampler or {})
        super().__init__(denoiser, branches)
        if layout == INSTANTX:
            resample = make_resampler(self.resampler_sizes)
            self.add_module("resampler", resample)
            for layer in self.layers().values():
                cast(InstantXBranch, layer.branches()[branches[0].name]).use(resample)

    def _make_layers(self, denoiser: nn.Module) -> dict[str, LayerWeights]:
        made = {}
        sites = [name for name, site in sites_of(denoiser).items() if not (site.joint and self.layout != OWN)]
        for name in sites[:: self.every]:
            layer = self._empty_layer()
            for spec in self.branch_specs:
                layer.add_module(spec.name, self._make_branch(spec))
            made[f"{SITES}.{name}"] = layer
        return made

    def _make_branch(self, spec: BranchSpec) -> Branch:
        heads = self.width // self.head_width
        if self.layout == XLABS:
            return XLabsBranch(spec.width, heads, self.head_width)
        if self.layout == INSTANTX:
            return InstantXBranch(self.width, heads, self.head_width, self.resampler_sizes["hidden_dim"])
        return ImageBranch(self.width, spec.width, self.heads, self.head_width, spec.zero_init, spec.router)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters by part, as `Adapter` does; a resampler belongs to the projection."""
        parts = super().parts()
        if self.layout == INSTANTX:
            parts[f"{self.branch_specs[0].name}_projection"] = list(self.get_submodule("resampler").parameters())
        return parts

    def layers(self) -> dict[str, LayerWeights]:
        """Return this adapter's weights by the module path of the site."""
        return {name.removeprefix(f"{SITES}."): layer for name, layer in super().layers().items()}

    # --- attach and detach ------------------------------------------------------------------------------------------

    def _attach(self, denoiser: nn.Module) -> None:
        self._check_sites(denoiser)
        present = _attachments.setdefault(denoiser, _Attachment())
        if self in present.adapters:
            raise WeightsError("This adapter is already attached to this denoiser; detach it first.")
        taken = {spec.name for adapter in present.adapters for spec in adapter.branch_specs}
        if shared := taken & {spec.name for spec in self.branch_specs}:
            raise WeightsError(
                f"Another attached adapter also has a branch {min(shared)!r}; detach that adapter first."
            )
        if any(block._compiled_call_impl is not None for block in denoiser.modules()):
            raise WeightsError(
                "The transformer's blocks are compiled already, and would silently ignore the adapter: attach it "
                "first, and compile then."
            )
        _hook(denoiser, present, [*present.adapters, self])

    def release(self, denoiser: nn.Module) -> None:
        """Remove this adapter's hooks, if it is attached; the last adapter leaves the transformer as it was."""
        present = _attachments.get(denoiser)
        if present is not None and self in present.adapters:
            _hook(denoiser, present, [each for each in present.adapters if each is not self])

    def detach(self, denoiser: nn.Module) -> None:
        """Undo `attach`. Raise WeightsError if the adapter is not attached."""
        if not self.is_attached(denoiser):
            raise WeightsError("This adapter is not attached to this transformer: attach it first.")
        self.release(denoiser)

    def is_attached(self, denoiser: nn.Module) -> bool:
        """Return whether this adapter is attached to the transformer."""
        return self in attached_adapters(denoiser)

    def _check_sites(self, denoiser: nn.Module) -> None:
        family, sites = family_of(denoiser), _count_sites(denoiser, self.layout)
        _check_base(
            "This adapter", (self.family, self.width, self.every, len(self._layer_names)),
            family.title, family.width(cast(Any, denoiser).config), sites,
        )  # fmt: skip

    # --- files ------------------------------------------------------------------------------------------------------

    def _structure(self) -> dict[str, str]:
        return {
            FAMILY_KEY: self.family, "width": str(self.width), "sites": str(len(self._layer_names)),
            "branch_heads": str(self.heads), "every": str(self.every), "layout": self.layout,
            "resampler": json.dumps(self.resampler_sizes),
        }  # fmt: skip

    @classmethod
    def _of_structure(cls, file: Path, metadata: Mapping[str, str], denoiser: nn.Module) -> "TransformerAdapter":
        family = family_of(denoiser)
        if FAMILY_KEY not in metadata:
            raise WeightsError(
                f"{file} is an adapter for a U-Net, but this denoiser is a {type(denoiser).__name__}: load an adapter "
                f"made for {family.title}."
            )
        width, every, count = (int(metadata[name]) for name in ("width", "every", "sites"))
        _check_base(
            str(file), (metadata[FAMILY_KEY], width, every, count),
            family.title, family.width(cast(Any, denoiser).config),
            _count_sites(denoiser, cast(Layout, metadata["layout"])),
        )  # fmt: skip
        return cls(
            denoiser, saved_specs(metadata), int(metadata["branch_heads"]), every,
            cast(Layout, metadata["layout"]), json.loads(metadata["resampler"]),
        )  # fmt: skip


def attached_adapters(transformer: nn.Module) -> "list[TransformerAdapter]":
    """Return the adapters that are attached to a transformer."""
    present = _attachments.get(transformer)
    return [] if present is None else list(present.adapters)


def prepare(transformer: nn.Module, conditioning: Conditioning) -> Conditioning:
    """Prepare a conditioning for the many steps of one picture; the outputs stay bit-identical.

    See `imagine.adapter.adapter.prepare`. Raises WeightsError if a branch has tokens but no attached adapter reads it.
    """
    layers = {
        branch: layer
        for adapter in attached_adapters(transformer)
        for layer in adapter.layers().values()
        for branch in layer.branches()
    }
    return prepare_for_layers(layers, conditioning)


def _hook(transformer: nn.Module, present: _Attachment, adapters: "list[TransformerAdapter]") -> None:
    """Replace the hooks on a transformer by those of these adapters."""
    present.remove_hooks()
    present.adapters = adapters
    if not adapters:
        restore_checkpoints(transformer)
        return
    handles = present.handles
    handles.append(transformer.register_forward_pre_hook(open_pass, with_kwargs=True, prepend=True))
    handles.append(transformer.register_forward_hook(close_pass, always_call=True))
    for number, (name, site) in enumerate(sites_of(transformer).items()):
        layers = tuple(each.layers()[name] for each in adapters if name in each.layers())
        if any(isinstance(each, XLabsBranch) for layer in layers for each in layer.branches().values()):
            handles.append(site.attention.norm_q.register_forward_hook(keep_queries))
        if layers:
            hook = SiteHook(site, layers, current_pass, number)
            handles.append(site.attention.register_forward_hook(hook, with_kwargs=True))


def _count_sites(transformer: nn.Module, layout: Layout) -> int:
    return sum(layout == OWN or not site.joint for site in sites_of(transformer).values())


def _check_specs(branches: Sequence[BranchSpec]) -> None:
    for spec in branches:
        if spec.fusion == "concatenated":
            raise ConfigError(f"Branch {spec.name!r} is concatenated, which transformers do not support: use parallel.")


def _check_base(who: str, made_for: tuple[str, int, int, int], family: str, width: int, sites: int) -> None:
    """Raise WeightsError unless an adapter was made for this family, width and number of sites."""
    theirs, their_width, every, count = made_for
    if theirs != family:
        raise WeightsError(
            f"{who} was made for {theirs}, but this transformer is {family}: load an adapter made for {family}."
        )
    if their_width != width or count != -(-sites // every):
        raise WeightsError(
            f"{who} was made for a {family} transformer of width {their_width} with {count} branches, but this one has "
            f"width {width} and place for {-(-sites // every)}: load the adapter that belongs to this model."
        )
