"""A bundle whose transformer stages are EPContext files: its settings, its rows of the report, what must hold of it.

The uncompiled graphs and their data stay beside them: they run on the CPU, which is how a bundle is validated, and are
what another SoC or a newer compiler would be given. A device needs neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from toolkit import names
from toolkit.bundle.settings import Settings, read_settings
from toolkit.bundle.stage_files import compiled_stages
from toolkit.graph.interface import GraphInterface, ValueType, read_interface
from toolkit.soc import SOCS, Soc

_COMPATIBILITY: Final = "ep_compatibility_info.QNNExecutionProvider"
# Where a SoC stands in it: version, …, HTP arch, SoC model, …
_ARCH_FIELD, _SOC_FIELD = 4, 5


def compatibility_of(bundle: Path, settings: Settings) -> str:
    """Returns what a compiled bundle's provider says it was compiled for, in the provider's own words; empty for a
    bundle that is not compiled."""
    stages = compiled_stages(settings)
    return read_interface(bundle / names.compiled_file(stages[0])).metadata.get(_COMPATIBILITY, "") if stages else ""


def binary_of(compiled: GraphInterface) -> str:
    """Returns the file with a compiled stage's weights and code, which its part's other stage shares."""
    return next((str(node.attributes.get("ep_cache_context", "")) for node in compiled.nodes), "")


def lint_compiled(bundle: Path, soc_name: str) -> list[str]:
    """Returns one line for each thing wrong with a bundle's EPContext files; none if it has none.

    Raises BundleError for a file that cannot be read.
    """
    stages = compiled_stages(read_settings(bundle))
    binaries: dict[int, set[str]] = {}
    problems = []
    for stage in stages:
        path = bundle / names.compiled_file(stage)
        if not path.is_file():
            continue  # the linter's to say
        compiled = read_interface(path)
        problems += [f"{path.name}: {line}" for line in _lint_file(compiled, bundle, SOCS[soc_name])]
        graph = bundle / names.stage_file(stage)
        if graph.is_file() and _signature(read_interface(graph)) != _signature(compiled):
            problems.append(f"{path.name}: its inputs and outputs are not those of {graph.name}: compile it again")
        part = int(stage.removeprefix(names.stage_kind(stage)).strip("_") or 0)
        binaries.setdefault(part, set()).add(binary_of(compiled))
    problems += [
        f"part {part} has {len(found)} binaries ({', '.join(sorted(found))}): context and iterator should share one"
        for part, found in binaries.items()
        if len(found) > 1
    ]
    return problems


def _lint_file(compiled: GraphInterface, bundle: Path, soc: Soc) -> list[str]:
    outside = [node for node in compiled.nodes if node.operator != names.EP_CONTEXT]
    if outside or not compiled.nodes:
        return [f"{len(outside)} nodes stand outside EPContext" if outside else "no node at all"]
    problems = []
    for node in compiled.nodes:
        binary = node.attributes.get("ep_cache_context")
        if node.attributes.get("embed_mode") != 0:
            problems.append("the binary is inside the ONNX file, which may have 2 GiB: embed_mode is not 0")
        elif not isinstance(binary, str) or Path(binary).name != binary or not (bundle / binary).is_file():
            problems.append(f"its binary {binary!r} is no file of the bundle")
    fields = compiled.metadata.get(_COMPATIBILITY, "").split(":")
    found = fields[_ARCH_FIELD : _SOC_FIELD + 1]
    if found != [str(soc.htp_arch), str(soc.soc_model)]:
        problems.append(
            f"was compiled for HTP arch and SoC model {' and '.join(found) or 'unknown'}, the recipe's soc {soc.name} "
            f"has {soc.htp_arch} and {soc.soc_model}: compile it again"
        )
    return problems


def _signature(graph: GraphInterface) -> tuple[dict[str, ValueType], dict[str, ValueType]]:
    return graph.inputs, graph.outputs
