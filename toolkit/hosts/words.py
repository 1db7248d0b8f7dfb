"""What hosts are called: words that the command line offers before anything of a host is imported."""

from __future__ import annotations

from typing import Final

FOUNDRY_LOCAL: Final = "foundry-local"
AI_TOOLKIT: Final = "ai-toolkit"
LEMONADE: Final = "lemonade"
WINDOWS_ML_CATALOG: Final = "windows-ml-catalog"
PACKAGE: Final = "package"
HOSTS: Final = (FOUNDRY_LOCAL, AI_TOOLKIT, LEMONADE, WINDOWS_ML_CATALOG, PACKAGE)
