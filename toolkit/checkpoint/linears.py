"""What a layer's halves are put together from: linears, norms, and what each linear reads."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit import names


@dataclass(frozen=True)
class Linear:
    """A matrix [out_features, in_features] under the checkpoint's name of its module, and perhaps a bias.

    One that is `exact` is never quantized.
    """

    module: str
    in_features: int
    out_features: int
    has_bias: bool = False
    exact: bool = False

    @property
    def weight(self) -> str:
        """Returns the name of its matrix in the checkpoint."""
        return names.weight(self.module)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of its matrix, and of its bias if there is one, by name."""
        matrix: dict[str, tuple[int, ...]] = {self.weight: (self.out_features, self.in_features)}
        return matrix | ({names.bias(self.module): (self.out_features,)} if self.has_bias else {})


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over `width` channels under the checkpoint's name of its module; `eps` where it is not the config's
    rms_norm_eps."""

    module: str
    width: int
    eps: float | None = None

    @property
    def weight(self) -> str:
        """Returns the name of its gains in the checkpoint."""
        return names.weight(self.module)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of its gains by their name."""
        return {self.weight: (self.width,)}


@dataclass(frozen=True)
class LinearInput:
    """One activation vector of `width` channels: the linears that read it, and the module that writes its channels.

    A scale moved from a channel's readers to its writer changes no output (AWQ, arXiv 2306.00978, section 3.2).
    `writer` is None where nothing linear stands before the input alone. Where it is `routed` only some of a text's
    tokens come here. Under grouped-query attention one row of
    v_proj makes `shared` channels of o_proj's input, head by head: channel (k * shared + g) * Dh + d comes from row
    k * Dh + d.
    """

    linears: tuple[Linear, ...]
    writer: Norm | Linear | None
    width: int
    shared: int = 1
    head_dim: int = 1
    routed: bool = False

    @property
    def name(self) -> str:
        """The module that reads it first."""
        return self.linears[0].module

    @property
    def readers(self) -> tuple[str, ...]:
        """The modules whose weight columns it meets."""
        return tuple(linear.module for linear in self.linears)

    @property
    def writers(self) -> tuple[str, ...]:
        """The tensors whose rows, or elements, make its channels."""
        return tuple(self.writer.tensors) if self.writer else ()
