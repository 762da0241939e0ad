"""Tokenizers and discriminators under the original's names: every manifest, both ways."""

import json

import numpy as np
import pytest
from rule import GOLDEN, SHARED, rule_state

from gigatok_jax.conversion import ar
from gigatok_jax.conversion import tokenizer as convert
from gigatok_jax.model_config import model_config
from gigatok_jax.models import discriminator as modules
from gigatok_jax.weights import discriminator_names, names, recognise, tables

TOKENIZERS = {
    "SS256": "S-S", "SB256": "S-B", "BL256": "B-L", "XLXXL256": "XL-XXL",
    "SS256_2d": "S-S-2D", "SB256_2d": "S-B-2D", "BL256_2d": "B-L-2D",
}  # fmt: skip
PRIORS = sorted(path.stem for path in (GOLDEN / "manifests").glob("GPT-*.json"))
JUDGES = {"patchgan": modules.PatchGAN, "dino": modules.DinoDiscriminator}


def manifest(name: str) -> dict:
    return json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())


def outlines(content: dict) -> dict[str, np.ndarray]:
    """A state dict of a manifest's shapes that takes no memory."""
    shapes = content["state_dict"]
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def check_there_and_back(state: dict, model) -> None:
    """The same names in the same order, shapes and types, through our tree."""
    entries = tables.entries(model)
    there = names.leaves(state, entries)
    wanted = tables.shapes(model)
    assert {p: (x.shape, x.dtype) for p, x in there.items()} == {
        p: (x.shape, x.dtype) for p, x in wanted.items()
    }
    back = names.tensors(there, entries)
    assert list(back) == list(state)
    assert [(x.shape, x.dtype) for x in back.values()] == [
        (x.shape, x.dtype) for x in state.values()
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_manifest_is_recognised_and_goes_both_ways(name):
    state = outlines(manifest(f"tok_VQ_{name}"))
    model = convert.infer_config(state)
    assert model == model_config(TOKENIZERS[name])
    check_there_and_back(state, model)


@pytest.mark.parametrize("name", PRIORS)
def test_a_priors_manifest_is_recognised_and_goes_both_ways(name):
    state = outlines(manifest(name))
    model = ar.infer_config(state)
    size, _, option = name.removeprefix("GPT-").partition("_")
    assert option or model == model_config(f"prior-{size}")
    check_there_and_back(state, model)


def test_recipes_that_share_a_model_share_its_manifest():
    for name in ("BL256_dino_disc", "BL256_train_new"):
        path = SHARED / "manifests" / f"tok_VQ_{name}.json"
        if not path.exists():
            pytest.skip(f"golden {path.name} is not here")
        ours = manifest("tok_VQ_BL256")["state_dict"]
        assert list(json.loads(path.read_text())["state_dict"].items()) == list(ours.items())


@pytest.mark.parametrize("name, kind", [("disc_patchgan", "patchgan"), ("disc_dino_heads", "dino")])
def test_discriminators_go_both_ways_in_the_originals_order(name, kind):
    content = manifest(name)
    state = rule_state(content["state_dict"].items(), "discriminator.")
    for counter in (n for n in state if n.endswith("num_batches_tracked")):
        state[counter] = np.asarray(3, np.int64)
    assert recognise.kind_of(state) == kind
    back = discriminator_names.to_torch(discriminator_names.from_torch(state, kind), kind)
    assert list(back) == list(content["state_dict"])
    for tensor, value in state.items():
        assert back[tensor].dtype == value.dtype
        np.testing.assert_array_equal(back[tensor], value)


def test_a_history_that_training_code_lacks_is_written_as_zeros():
    shapes = recognise.tensor_shapes(model_config("S-S"))
    assert shapes["quantize.codebook_used"] == (tables.HISTORY,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SS256", "SS256_2d"])
def test_a_published_size_goes_there_and_back_bit_for_bit(name):
    state = rule_state(manifest(f"tok_VQ_{name}")["state_dict"].items())
    model = model_config(TOKENIZERS[name])
    back = convert.to_torch(convert.from_torch(state, model), model)
    for tensor, value in state.items():
        np.testing.assert_array_equal(back[tensor], value)
