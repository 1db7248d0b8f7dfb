"""A layout to the graphs of its bundle: one model, or the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.graph.builder import StageGraph
from toolkit.graph.decoder import build_decoder
from toolkit.graph.layout import Layout
from toolkit.graph.stages import TransformerPart, build_embeddings, build_lm_head, build_transformer
from toolkit.partition.parts import cut_layers, layer_bytes
from toolkit.quant.ranges import ActivationRange
from toolkit.recipe import Recipe
from toolkit.speculation import CHECKED_ROWS, MTP, NONE
from toolkit.target import Target


def lower(
    config: ModelConfig,
    layout: Layout,
    target: Target,
    recipe: Recipe,
    pad_token_id: int,
    ranges: Mapping[str, ActivationRange] | None = None,
) -> list[StageGraph]:
    """Every stage with its graph, in the order they run; a recipe without `parts` has one. `ranges` by point are for a
    form of uint16, None for graphs that are only looked at.

    Raises UnsupportedError for what the target's operators cannot do.
    """
    form, length, parts = target.form, recipe.context_length, recipe.parts or 1
    spans = cut_layers(layer_bytes(layout, config.num_hidden_layers), parts)
    graphs = []
    for stage in target.stages(recipe.window, parts):
        if stage.name == names.MODEL:
            rows = 1 if recipe.speculation == NONE else CHECKED_ROWS
            graph = build_decoder(config, layout, form, length, rows, recipe.speculation == MTP)
        elif stage.name == names.EMBEDDINGS:
            graph = build_embeddings(config, layout, form)
        elif stage.name == names.HEAD:
            graph = build_lm_head(config, layout, form, pad_token_id)
        else:
            part = TransformerPart(stage.name, stage.part, parts, spans[stage.part])
            graph = build_transformer(config, layout, form, length, part, stage.sequence_length, ranges)
        graphs.append(StageGraph(stage, graph))
    return graphs
