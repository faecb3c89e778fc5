"""Entropy coding of quantised matrices, close to what their statistics allow, with asymmetric numeral systems.

A row's or a column's size says how large its symbols are. So each gets a class, its root mean square on a logarithmic
scale, and the two of a symbol together choose the table of frequencies it is coded with. All matrices share the tables.
Coding itself is the package constriction's (Bamler 2022); tables are integers, and its arithmetic on them uses only
exact and correctly rounded operations, so that every machine decodes the same.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PER_OCTAVE = 4  # classes to a factor of two
LOWEST, HIGHEST = -32, 40  # classes of a symbol
LARGEST = 127  # symbols lie between -127 and 127
SYMBOLS = 2 * LARGEST + 1
MANTISSA = 5  # bits of a stored frequency


def classes_of(symbols: Array) -> tuple[Array, Array]:
    """Classes of the rows and of the columns of a matrix of symbols.

    Args:
        symbols: (R, C) integers.

    Returns:
        (R,) and (C,) int8.
    """
    squares = np.square(symbols.astype(np.float32))
    rows = np.sqrt(squares.mean(1)).clip(2.0 ** (LOWEST / PER_OCTAVE))
    columns = np.sqrt((squares / np.square(rows)[:, None]).mean(0)).clip(2.0 ** (LOWEST / PER_OCTAVE))
    return _logarithm(rows), _logarithm(columns)


def _logarithm(sizes: Array) -> Array:
    return np.round(PER_OCTAVE * np.log2(sizes)).clip(LOWEST, HIGHEST).astype(np.int8)


def _masks(classes: list[tuple[Array, Array]]) -> Iterator[tuple[int, list[Array]]]:
    """Every class that occurs, with a mask of its symbols in each flattened matrix."""
    joint = [
        (rows.astype(np.int16)[:, None] + columns[None]).clip(LOWEST, HIGHEST).astype(np.int8).reshape(-1)
        for rows, columns in classes
    ]
    for index in range(LOWEST, HIGHEST + 1):
        masks = [each == index for each in joint]
        if any(each.any() for each in masks):
            yield index, masks


def encode(matrices: list[Array], classes: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Code matrices together.

    Args:
        matrices: (R, C) int8 each.
        classes: Of their rows and columns.

    Returns:
        (tables, SYMBOLS) uint16 frequencies, as `_unpack` reads them, and (words,) uint32.
    """
    import constriction  # noqa: PLC0415 - the reference recipe does without

    flat = [matrix.reshape(-1) for matrix in matrices]
    tables, messages = [], []
    for _, masks in _masks(classes):
        message = np.concatenate([each[mask] for each, mask in zip(flat, masks, strict=True)]).astype(np.int32)
        tables.append(_pack(np.bincount(message + LARGEST, minlength=SYMBOLS)))
        messages.append(message + LARGEST)
    coder = constriction.stream.stack.AnsCoder()
    for table, message in zip(reversed(tables), reversed(messages), strict=True):  # a stack: the last comes out first
        coder.encode_reverse(message, constriction.stream.model.Categorical(_unpack(table), perfect=False))
    return np.stack(tables), coder.get_compressed()


def decode(
    shapes: list[tuple[int, int]], classes: list[tuple[Array, Array]], tables: Array, words: Array
) -> list[Array]:
    """The inverse of `encode`.

    Raises:
        ValueError: If tables and words are not those of matrices of these shapes and classes.
    """
    import constriction  # noqa: PLC0415

    flat = [np.empty(rows * columns, dtype=np.int8) for rows, columns in shapes]
    coder = constriction.stream.stack.AnsCoder(words)
    used = 0
    for used, (_, masks) in enumerate(_masks(classes), 1):
        if used > len(tables):
            raise ValueError("it has fewer tables of frequencies than its classes need")
        frequencies = _unpack(tables[used - 1])
        if not frequencies.any():
            raise ValueError("a table of frequencies is empty")
        lengths = [int(np.count_nonzero(mask)) for mask in masks]
        message = (
            coder.decode(constriction.stream.model.Categorical(frequencies, perfect=False), sum(lengths)) - LARGEST
        )
        for each, mask, part in zip(flat, masks, np.split(message, np.cumsum(lengths)[:-1]), strict=True):
            each[mask] = part
    if used != len(tables) or not coder.is_empty():
        raise ValueError("its coded symbols do not end where its matrices do")
    return [each.reshape(shape) for each, shape in zip(flat, shapes, strict=True)]


def _pack(counts: Array) -> Array:
    """Counts as uint16: an exponent and the leading bits, rounded down, but never a one to nothing."""
    exponents = np.array([max(int(count).bit_length() - MANTISSA, 0) for count in counts])
    return ((exponents << MANTISSA) | (counts >> exponents)).astype(np.uint16)


def _unpack(table: Array) -> Array:
    values = table.astype(np.int64)
    exponents, leading = (values >> MANTISSA).clip(0, 40), values & (2**MANTISSA - 1)
    return (leading << exponents).astype(np.float64)
