"""A published answer of GSM8K."""

from __future__ import annotations

# As published: https://github.com/openai/grade-school-math, test.jsonl, first line.
GSM8K = (
    "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n"
    "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer’s market.\n#### 18"
)
