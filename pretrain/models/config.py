"""What is trained: a timm encoder, or both towers of a CLIP as open_clip has them. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pretrain.recipe.base import Group


class Model(Group):
    """A timm ViT, Swin or ResNet. `options` go to its constructor (embed_dim, depth, window_size, ...)."""

    library: Literal["timm"] = "timm"
    name: str
    image_size: int = Field(224, ge=1)
    patch_size: int | None = Field(None, ge=1)  # not of a ResNet; None: the model's own
    eval_size: int | None = Field(None, ge=1)  # ResNet only: side of the images it is judged on; None: image_size
    options: dict[str, int | float | bool | str | tuple[int, ...] | None] = {}  # noqa: RUF012  (pydantic copies it)

    @model_validator(mode="after")
    def _patches(self) -> Model:
        _divides(self.patch_size, self.image_size)
        return self

    @property
    def judged_size(self) -> int:
        return self.eval_size or self.image_size


class ImageTower(Group):
    """A ViT as open_clip builds it."""

    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    pool: Literal["tok", "avg"] = "tok"  # the class token, or the mean over patches

    @model_validator(mode="after")
    def _heads(self) -> ImageTower:
        _heads_divide(self.heads, self.width)
        return self


class TextTower(Group):
    """A transformer over tokens as open_clip builds it; the defaults are those of CLIP's ViT-B."""

    width: int = Field(512, ge=1)
    heads: int = Field(8, ge=1)
    layers: int = Field(12, ge=1)
    context_length: int = Field(77, ge=3)
    vocab_size: int = Field(49408, ge=3)  # CLIP's own tokenizer has 49408
    mlp_ratio: float = Field(4.0, gt=0)
    pool: Literal["argmax", "last"] = "argmax"  # the end of text, which is CLIP's highest token, or the last position
    causal: bool = True

    @model_validator(mode="after")
    def _heads(self) -> TextTower:
        _heads_divide(self.heads, self.width)
        return self


class OpenClip(Group):
    """Both towers, as open_clip's configuration of that name has them; or as given here, under a name of one's own."""

    library: Literal["open_clip"]
    name: str
    image_size: int = Field(ge=1)
    context_length: int | None = Field(None, ge=3)  # None: the configuration's own, as for vocab_size
    vocab_size: int | None = Field(None, ge=3)
    embed_dim: int | None = Field(None, ge=1)
    image: ImageTower | None = None
    text: TextTower | None = None

    @model_validator(mode="after")
    def _whole(self) -> OpenClip:
        own = {"embed_dim": self.embed_dim, "image": self.image, "text": self.text}
        given = [key for key, value in own.items() if value is not None]
        if 0 < len(given) < len(own):
            raise ValueError(f"expected all of embed_dim, image, text, or none of them, found {' and '.join(given)}.")
        if given and (self.context_length or self.vocab_size):
            raise ValueError("expected context_length and vocab_size under text, found them beside it.")
        if self.image is not None:
            _divides(self.image.patch_size, self.image_size)
        return self

    @property
    def judged_size(self) -> int:
        return self.image_size


ModelConfig = Annotated[
    Annotated[Model, Tag("timm")] | Annotated[OpenClip, Tag("open_clip")],
    Discriminator(lambda v: v.get("library", "timm") if isinstance(v, dict) else getattr(v, "library", "timm")),
]


def _divides(patch_size: int | None, image_size: int) -> None:
    if patch_size is not None and image_size % patch_size:
        below = image_size // patch_size * patch_size
        raise ValueError(
            f"expected an image_size that patch_size {patch_size} divides, found {image_size}. "
            f"Nearest: {below + patch_size}{f' or {below}' * (below > 0)}."
        )


def _heads_divide(heads: int, width: int) -> None:
    if width % heads:
        raise ValueError(f"expected a width that heads {heads} divides, found {width}.")
