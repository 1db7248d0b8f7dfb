"""Which files a bundle's stages run from: their graphs, or the EPContext files that a compiler made of them."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit import names
from toolkit.bundle.settings import Settings


def compiled_settings(settings: Settings, stages: Sequence[str]) -> Settings:
    """Returns a bundle's settings with these stages run from their EPContext files."""
    return settings.with_files({stage: names.compiled_file(stage) for stage in stages})


def uncompiled_settings(settings: Settings) -> Settings:
    """Returns the same with every stage run from its graph: what a machine without the device can run."""
    return settings.with_files({stage: names.stage_file(stage) for stage in compiled_stages(settings)})


def compiled_stages(settings: Settings) -> list[str]:
    """Returns the stages that run from EPContext files."""
    return [stage.name for stage in settings.stages if stage.filename == names.compiled_file(stage.name)]
