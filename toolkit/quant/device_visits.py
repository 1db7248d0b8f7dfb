"""GPTQ's loop over a matrix' columns on a device that rounds them itself: what comes to the host is packed already.

N output features, K input features, Kp = K padded to whole blocks, J blocks a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.device.arrays import device_of
from toolkit.quant.blockwise import QuantSpec, pack_last_axis
from toolkit.quant.device_columns import searched_stride, standing_stride
from toolkit.quant.device_revisit import revisit_on_device
from toolkit.quant.visits import Columns, Visits, worth_of_errors

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class RoundedThere:
    """A rounded matrix in its own order: integers and zero points packed as `quantize_blocks` does, scales [N, J], all
    on the host, and on the device what they stand for [N, K]."""

    packed: NDArray[np.uint8]
    scales: Floats
    zeros: NDArray[np.uint8] | None
    restored: Floats


def round_on_device(
    weight: Floats, columns: Columns, order: Visits, spec: QuantSpec, revisits: int, standing: Floats | None
) -> RoundedThere:
    """`weight` [N, K] rounded column after column and revisited, by scales `standing` [N, J] on the host or by such as
    are searched on the way."""
    on, (N, K), padded = device_of(weight), weight.shape, order.order.size
    levels, visited, J = on.empty((N, padded)), on.empty((N, padded)), spec.num_blocks(K)
    scales, zeros = (on.empty((N, 0 if standing is not None else padded // spec.block_size)) for _ in range(2))
    heard = order.diagonal[order.order] > 0
    for some in order.strides(spec):
        left, triangle = columns.left(some, visited[:, : some.start])
        if standing is not None:
            each = on.from_host(np.ascontiguousarray(standing[:, order.order[some] // spec.block_size]))
            levels[:, some], visited[:, some] = standing_stride(left, triangle, each, spec.bits)
        else:
            worth = worth_of_errors(on.to_host(on.contiguous(triangle.diagonal())), heard[some])
            blocks = slice(some.start // spec.block_size, some.stop // spec.block_size)
            levels[:, some], visited[:, some], scales[:, blocks], zeros[:, blocks] = searched_stride(
                left, triangle, worth, spec
            )
    if revisits and standing is None and (whole := columns.whole()):
        revisit_on_device(*whole, order.strides(spec), spec, levels, visited, scales, zeros, revisits)
    places = np.argsort(order.order)
    restored = on.contiguous(visited[:, on.index(places[:K])])
    packed = _packed(levels[:, on.index(places)], spec, J)
    if standing is not None:
        return RoundedThere(packed, standing, None, restored)
    blocks_in_place = on.index(np.argsort(order.order[:: spec.block_size] // spec.block_size)[:J])
    points = None if spec.symmetric else pack_last_axis(on.bytes_of(zeros[:, blocks_in_place]), spec.bits)
    return RoundedThere(packed, on.to_host(on.contiguous(scales[:, blocks_in_place])), points, restored)


def _packed(levels: Floats, spec: QuantSpec, J: int) -> NDArray[np.uint8]:
    """Integers [N, Kp] on the host, [N, J, block_size * bits / 8], the even one of two in the low nibble; a last block
    that the columns do not fill ends in what stands for zero."""
    on, (N, padded), width = device_of(levels), levels.shape, J * spec.block_size
    levels = levels[:, :width]
    if padded < width:
        levels = on.concatenate([levels, on.zeros((N, width - padded)) + float(1 << (spec.bits - 1))], axis=1)
    blocks = levels.reshape(N, J, spec.block_size)
    if spec.bits == 8 or spec.block_size % 2:
        return pack_last_axis(on.bytes_of(blocks), spec.bits)
    return on.bytes_of(blocks[..., ::2] + 16 * blocks[..., 1::2])
