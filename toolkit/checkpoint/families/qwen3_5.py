"""Qwen3.5 as it is published, which sees: its decoder alone, which is qwen3_5_text's."""

from __future__ import annotations

from dataclasses import replace

from toolkit.checkpoint.families import qwen3_5_text

FAMILY = replace(
    qwen3_5_text.FAMILY, model_type="qwen3_5", text_config="text_config", text_model=("model.language_model.",)
)
