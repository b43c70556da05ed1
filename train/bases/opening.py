"""Open a public base by its folder or hub id."""

from imagine.errors import ConfigError
from imagine.networks.weights import INDEX
from train.bases.contract import TransformerSettings
from train.bases.stable_diffusion import StableDiffusion
from train.bases.transformer import Transformer
from train.data import public_base


def open_public_base(
    name: str, settings: TransformerSettings | None = None, shapes_only: bool = False
) -> StableDiffusion | Transformer:
    """Open the base in a folder or in the hub repository owner/name; with `shapes_only`, no weights are downloaded.

    settings: for transformers. Raises ConfigError if there is no base that can be trained on, or if there are settings
    of transformers for a U-Net.
    """
    folder = public_base.base_folder(name, shapes_only)
    index = public_base.read_pipeline(folder)
    if not (index.get("transformer") or [None])[0]:
        if settings is not None:
            raise ConfigError(
                f"settings: transformer has no effect, because {name} has no diffusion transformer; remove it."
            )
        return StableDiffusion(public_base.open_base(str(folder), shapes_only))
    base = Transformer(folder, index, settings or TransformerSettings())
    if not (index.get("text_encoder") or [None])[0]:
        raise ConfigError(
            f"{folder} has no text encoder in its {INDEX}, which training needs once to encode the captions: download "
            "the whole pipeline."
        )
    _ = base.flow  # ConfigError for an unknown family
    return base
