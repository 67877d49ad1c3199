"""What every section of a recipe is."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator


class Section(BaseModel):
    """Fields that are all known, of strict types, finite, and never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def kind_or(default: str) -> Discriminator:
    """Which of several kinds a section is of: the default's, where it does not say."""

    def kind(section: Any) -> Any:
        return section.get("kind", default) if isinstance(section, dict) else getattr(section, "kind", None)

    return Discriminator(kind)
