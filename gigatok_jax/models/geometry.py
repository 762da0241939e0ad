"""Initial weights of a 1D tokenizer that encode places in the image. Axes: n positions, c width.

The published start draws position tables at random, so faint beside the content and so unrelated
that attention has to learn which latent token belongs to which part of the image; with a user's
own pictures attention does not learn this within thousands of updates. Here each row of a table
encodes the place and size of the image region of its token, and keys start with the queries'
weights, so that a query and a key of near places have a large product from the first update on.
Shapes and paths of parameters stay as they are.
"""

from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from gigatok_jax.model_config import SIZES, grid_size, pooled_grids

DEVIATION = 2.0  # of the tables; attention is local enough with 2 and no better with 3 or 4
FINEST = 8.0  # half-waves over the image of the fastest feature


def first_weights(params: Any, model: ml_collections.ConfigDict) -> Any:
    """Returns a new 1D tokenizer's parameters with tables of places and keys tied to queries.

    The position tables become `features` of image regions; every key kernel becomes a copy of the
    query kernel.

    Args:
        params: parameters of `models.tokenizer.Tokenizer`, as initialised.
        model: the tokenizer's config from `model_config`.

    Returns:
        The same tree with other values in the position tables and key kernels of both transformers.
    """
    grid = grid_size(model)
    cells, regions = places([(grid, grid)]), places(pooled_grids(model.latent_tokens))
    tables = {
        "encoder": {"positions": cells, "query_positions": regions},
        "decoder": {"positions": cells, "latent_positions": regions},
    }
    widths = {"encoder": SIZES[model.encoder][2], "decoder": SIZES[model.decoder][2]}
    changed = {
        name: _with_tied_keys(params[name])
        | {table: jnp.asarray(features(where, widths[name])) for table, where in own.items()}
        for name, own in tables.items()
    }
    return {**params, **changed}


def places(levels: list[tuple[int, int]]) -> np.ndarray:
    """Computes centre x, centre y, width and height of each tile, as shares of the image: f64[n 4].

    Args:
        levels: (columns, rows) of grids of equal tiles, each read row by row.
    """
    tiles = [
        ((x + 0.5) / columns, (y + 0.5) / rows, 1 / columns, 1 / rows)
        for columns, rows in levels
        for y in range(rows)
        for x in range(columns)
    ]
    return np.array(tiles)


def features(where: np.ndarray, width: int) -> np.ndarray:
    """Computes position features f32[n width] of tiles: sines and cosines of the position.

    Each sine and cosine is averaged over the tile and scaled by sqrt(2) * `DEVIATION`.

    Args:
        where: f64[n 4], see `places`.
        width: a multiple of 4; a quarter of it is the number of frequencies.

    Source: Fourier features (arXiv:2006.10739) in half-waves over the image, 1 to `FINEST`.
    """
    waves = 2 ** np.linspace(0, np.log2(FINEST), width // 4)
    table = []
    for axis in range(2):
        phase = np.pi * where[:, axis, None] * waves
        damped = np.sqrt(2) * DEVIATION * np.sinc(where[:, axis + 2, None] * waves / 2)
        table += [np.cos(phase) * damped, np.sin(phase) * damped]
    return np.concatenate(table, axis=1).astype(np.float32)


def _with_tied_keys(tree: Any) -> Any:
    """Returns the parameters with each `key/kernel` a copy of the `query/kernel` beside it."""
    if not isinstance(tree, dict):
        return tree
    tree = {name: _with_tied_keys(value) for name, value in tree.items()}
    if "query" in tree and "key" in tree:
        tree["key"] = {**tree["key"], "kernel": jnp.copy(tree["query"]["kernel"])}
    return tree
