"""A layout to the graphs of its bundle: one model, or the four stages of a pipeline."""

from __future__ import annotations

from toolkit import names
from toolkit.checkpoint.config import ModelConfig
from toolkit.graph.builder import StageGraph
from toolkit.graph.decoder import build_decoder
from toolkit.graph.layout import Layout
from toolkit.graph.stages import build_embeddings, build_lm_head, build_transformer
from toolkit.recipe import Recipe
from toolkit.target import Target


def lower(
    config: ModelConfig, layout: Layout, target: Target, recipe: Recipe, pad_token_id: int
) -> list[StageGraph]:
    """Every stage with its graph, in the order they run.

    Raises UnsupportedError for what the target's operators cannot do.
    """
    form, length = target.form, recipe.context_length
    graphs = []
    for stage in target.stages(recipe.window):
        if stage.name == names.MODEL:
            graph = build_decoder(config, layout, form, length)
        elif stage.name == names.EMBEDDINGS:
            graph = build_embeddings(config, layout, form)
        elif stage.name == names.HEAD:
            graph = build_lm_head(config, layout, form, pad_token_id)
        else:
            graph = build_transformer(config, layout, form, length, stage.name, stage.sequence_length)
        graphs.append(StageGraph(stage, graph))
    return graphs
