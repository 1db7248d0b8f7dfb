"""Gemma 3 that sees (4B, 12B, 27B): its decoder alone, which is gemma3_text's.

transformers 4 saves the decoder's tensors under `language_model.`, transformers 5 may under `model.language_model.`.
"""

from __future__ import annotations

from dataclasses import replace

from toolkit.checkpoint.families import gemma3_text

FAMILY = replace(
    gemma3_text.FAMILY,
    model_type="gemma3",
    text_config="text_config",
    text_model=("language_model.model.", "model.language_model."),
)
