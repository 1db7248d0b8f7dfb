"""`report.schema.json`, generated from the sections: `python -m toolkit.report.schema` writes it anew."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toolkit.files import json_text, write_text
from toolkit.report.sections import Report
from toolkit.typed_json import json_schema

SCHEMA_FILE: Final = Path(__file__).with_name("report.schema.json")


def schema_text() -> str:
    """The JSON Schema (2020-12) of report.json."""
    return json_text(json_schema(Report, "report.json of a bundle"))


if __name__ == "__main__":
    write_text(SCHEMA_FILE, schema_text())
