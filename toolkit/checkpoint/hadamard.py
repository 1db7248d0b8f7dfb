"""Orthogonal matrices of plus and minus one, scaled, that multiply fast: Sylvester's for powers of two, Paley's for the
rest of a width (R. Paley, On orthogonal matrices, 1933), Kronecker products of both for hidden sizes such as 1536 =
12 x 128, 3584 = 28 x 128, 5120 = 20 x 256.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import UnsupportedError

Floats = NDArray[np.float32]
# Sylvester's factors are multiplied this wide at most: a product of n columns then costs n x 128 at most, not n x n.
_WIDEST: Final = 128


class Hadamard:
    """Q = diag(s) H / sqrt(n) [n, n] of `order` n, with random signs s, so that no fixed vector lies along one of H."""

    def __init__(self, n: int, seed: int) -> None:
        """Raises UnsupportedError for a width without a known construction."""
        self.order = n
        self._factors = [factor / np.float32(math.sqrt(len(factor))) for factor in _factors(n)]
        self._signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), n)

    def apply(self, x: Floats) -> Floats:
        """Returns x Q for x [..., n]."""
        shape = x.shape
        y = x * self._signs
        for k, factor in enumerate(self._factors):
            before = math.prod(len(other) for other in self._factors[:k])
            y = np.matmul(factor.T, y.reshape(-1, before, len(factor), shape[-1] // before // len(factor)))
        return np.ascontiguousarray(y.reshape(shape), np.float32)


def is_known(n: int) -> bool:
    """Returns whether `Hadamard` can make a matrix of order n."""
    try:
        _factors(n)
    except UnsupportedError:
        return False
    return True


def _factors(n: int) -> list[Floats]:
    """Hadamard matrices whose Kronecker product is one of order n."""
    power = 0
    while n % (2 << power) == 0:
        power += 1
    for k in range(power, -1, -1):
        rest = _paley(n >> k)
        if rest is not None:
            widths = [_WIDEST] * (k // 7) + ([1 << k % 7] if k % 7 else [])
            return [factor for factor in (rest, *map(_sylvester, widths)) if len(factor) > 1]
    raise UnsupportedError(f"no Hadamard matrix of order {n} is known here: set rotate=false")


def _sylvester(n: int) -> Floats:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _paley(n: int) -> Floats | None:
    """Of order n: 1, q + 1 for a prime q = 3 mod 4, or 2 (q + 1) for a prime q = 1 mod 4."""
    if n == 1:
        return np.ones((1, 1), np.float32)
    if n % 4 == 0 and _is_prime(n - 1):
        # I + S with S skew: S'S = (n - 1) I and S' = -S.
        return _bordered(n - 1, -1) + np.eye(n, dtype=np.float32)
    if n % 4 == 0 and _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        conference = _bordered(n // 2 - 1, 1)
        ones, eye = np.array([[1, 1], [1, -1]], np.float32), np.array([[1, -1], [-1, -1]], np.float32)
        return np.asarray(np.kron(conference, ones) + np.kron(np.eye(n // 2, dtype=np.float32), eye), np.float32)
    return None


def _bordered(q: int, sign: int) -> Floats:
    """[q + 1, q + 1] with a zero diagonal: Jacobsthal's matrix of quadratic residues mod q, bordered by ones and, below
    the diagonal, by `sign`."""
    squares = {k * k % q for k in range(1, q)}
    character = np.array([0, *(1 if k in squares else -1 for k in range(1, q))], np.float32)
    matrix = np.zeros((q + 1, q + 1), np.float32)
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    matrix[1:, 1:] = character[(np.arange(q)[:, None] - np.arange(q)[None, :]) % q]
    return matrix


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % k for k in range(2, math.isqrt(q) + 1))
