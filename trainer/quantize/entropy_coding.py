"""Entropy coding of quantized matrices with asymmetric numeral systems (ANS), close to their entropy.

The magnitude of a symbol depends on its row and its column. Each row and column has a class, its root mean square on a
logarithmic scale, and the two classes of a symbol together select the table of frequencies that codes it. All matrices
share the tables. The package constriction (Bamler 2022) does the coding. Tables are integers, and its arithmetic on
them uses only exact and correctly rounded operations, so that every machine decodes the same.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

PER_OCTAVE = 4  # classes per factor of two
MIN_CLASS, MAX_CLASS = -32, 40
MAX_SYMBOL = 127  # symbols lie between -127 and 127, and most take 2 to 6 bits
SYMBOLS = 2 * MAX_SYMBOL + 1
MANTISSA = 5  # bits of a stored frequency


def classes_of(symbols: Array) -> tuple[Array, Array]:
    """Classes of the rows and of the columns of a matrix of symbols.

    Args:
        symbols: (R, C) integers.

    Returns:
        (R,) and (C,) int8.
    """
    squares = np.square(symbols.astype(np.float32))
    rows = np.sqrt(squares.mean(1)).clip(2.0 ** (MIN_CLASS / PER_OCTAVE))
    columns = np.sqrt((squares / np.square(rows)[:, None]).mean(0)).clip(2.0 ** (MIN_CLASS / PER_OCTAVE))
    return _logarithm(rows), _logarithm(columns)


def _logarithm(sizes: Array) -> Array:
    return np.round(PER_OCTAVE * np.log2(sizes)).clip(MIN_CLASS, MAX_CLASS).astype(np.int8)


def _masks(classes: list[tuple[Array, Array]]) -> Iterator[tuple[int, list[Array]]]:
    """Every class that occurs, with the mask of its symbols in each flattened matrix."""
    joint = [
        (rows.astype(np.int16)[:, None] + columns[None]).clip(MIN_CLASS, MAX_CLASS).astype(np.int8).reshape(-1)
        for rows, columns in classes
    ]
    for index in range(MIN_CLASS, MAX_CLASS + 1):
        masks = [each == index for each in joint]
        if any(each.any() for each in masks):
            yield index, masks


def encode(matrices: list[Array], classes: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Code several matrices together.

    Args:
        matrices: (R, C) int8 each.
        classes: Classes of their rows and columns.

    Returns:
        (tables, SYMBOLS) uint16 frequencies, as `_unpack` reads them, and (words,) uint32.
    """
    import constriction  # noqa: PLC0415 - the reference recipe does not need it

    flat = [matrix.reshape(-1) for matrix in matrices]
    tables, messages = [], []
    for _, masks in _masks(classes):
        message = np.concatenate([each[mask] for each, mask in zip(flat, masks, strict=True)]).astype(np.int32)
        tables.append(_pack(np.bincount(message + MAX_SYMBOL, minlength=SYMBOLS)))
        messages.append(message + MAX_SYMBOL)
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
            coder.decode(constriction.stream.model.Categorical(frequencies, perfect=False), sum(lengths)) - MAX_SYMBOL
        )
        for each, mask, part in zip(flat, masks, np.split(message, np.cumsum(lengths)[:-1]), strict=True):
            each[mask] = part
    if used != len(tables) or not coder.is_empty():
        raise ValueError("its coded symbols do not end where its matrices do")
    return [each.reshape(shape) for each, shape in zip(flat, shapes, strict=True)]


def _pack(counts: Array) -> Array:
    """Counts as uint16: an exponent and the leading bits, rounded down but never from one to zero."""
    exponents = np.array([max(int(count).bit_length() - MANTISSA, 0) for count in counts])
    return ((exponents << MANTISSA) | (counts >> exponents)).astype(np.uint16)


def _unpack(table: Array) -> Array:
    values = table.astype(np.int64)
    exponents, leading = (values >> MANTISSA).clip(0, 40), values & (2**MANTISSA - 1)
    return (leading << exponents).astype(np.float64)
