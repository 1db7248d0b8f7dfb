"""A YAML recipe, read into a frozen `Recipe`: one model for one target, and how its weights are quantized."""

from toolkit.recipe.check import BITS, BLOCK_SIZES, FIGURES, RULE_ALGORITHMS, check_one_checkpoint
from toolkit.recipe.matrix import Matrix, MatrixCell, read_matrix
from toolkit.recipe.read import REQUIRED_KEYS, load_recipe, parse_recipe
from toolkit.recipe.recipe import QuantRule, Recipe
from toolkit.recipe.sized import sized
from toolkit.recipe.tree import data_folder, known_license, meant_recipe, model_facts, model_names, recipe_names
from toolkit.recipe.words import is_path, nearest

__all__ = [
    "BITS",
    "BLOCK_SIZES",
    "FIGURES",
    "REQUIRED_KEYS",
    "RULE_ALGORITHMS",
    "Matrix",
    "MatrixCell",
    "QuantRule",
    "Recipe",
    "check_one_checkpoint",
    "data_folder",
    "is_path",
    "known_license",
    "load_recipe",
    "meant_recipe",
    "model_facts",
    "model_names",
    "nearest",
    "parse_recipe",
    "read_matrix",
    "recipe_names",
    "sized",
]
