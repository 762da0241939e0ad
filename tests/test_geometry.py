"""First weights from geometry: attention that begins local, and nothing else that changes."""

import jax
import numpy as np
import pytest

from configs import common
from gigatok_jax.errors import ConfigError
from gigatok_jax.model_config import pooled_grids
from gigatok_jax.model_config import tokenizer as model_config
from gigatok_jax.models import geometry
from gigatok_jax.models.tokenizer import make
from gigatok_jax.train import settings

TINY = {"encoder": "pico", "decoder": "pico", "latent_tokens": 64, "stem": "patch"}
TINY |= {"image_size": 64, "patch_size": 8, "codebook_size": 32, "align_block": 0}


@pytest.fixture(scope="module")
def weights():
    model = model_config(**TINY)
    params = jax.jit(make(model).init)(jax.random.key(0), np.zeros((1, 64, 64, 3), "f4"))["params"]
    return params, geometry.first_weights(params, model)


def test_only_positions_and_keys_change(weights):
    before, after = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(x)}
        for x in weights
    )
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    assert changed and all("positions'" in k or "['key']['kernel']" in k for k in changed)
    assert not any("cnn" in k or "quant" in k for k in changed)


def test_a_cell_attends_most_to_the_finest_latent_of_its_region(weights):
    """Products of query and key from positions alone, mean over heads, in the first block."""
    _, after = weights
    decoder = after["decoder"]
    attention = jax.tree.map(lambda x: np.asarray(x[0]), decoder["blocks"]["cross_attention"])
    queries = np.asarray(decoder["positions"]) @ attention["query"]["kernel"]
    keys = np.asarray(decoder["latent_positions"]) @ attention["key"]["kernel"]
    nearest = (queries @ keys.T).argmax(axis=1)
    columns, rows = pooled_grids(64)[-1]
    y, x = np.divmod(np.arange(64), 8)
    own = 64 // 2 + (y * rows // 8) * columns + x * columns // 8
    assert np.mean(nearest == own) > 0.9


def test_places_are_the_tiles_of_pooled_queries():
    where = geometry.places(pooled_grids(8))
    np.testing.assert_allclose(where[0], [0.5, 0.5, 1, 1])
    np.testing.assert_allclose(where[2], [0.25, 0.5, 0.5, 1])  # the left half
    np.testing.assert_allclose(where[4], [0.25, 0.25, 0.5, 0.5])  # the first quarter
    area = where[:, 2] * where[:, 3]
    np.testing.assert_allclose(area, [1, 1, *[1 / 2] * 2, *[1 / 4] * 4])


def test_2d_tokenizers_are_refused():
    config = common.tokenizer("tiny", "S-S-2D")
    config.train.first_weights = "geometry"
    with pytest.raises(ConfigError, match="which is for 1D tokenizers"):
        settings.check(config)
