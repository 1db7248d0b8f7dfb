"""Writes recipes/planned.json, what each recipe's bundle weighs, from the plans: `python docs/planned_recipes.py`."""

from toolkit.pipeline.planned_recipe import write_down

if __name__ == "__main__":
    write_down()
