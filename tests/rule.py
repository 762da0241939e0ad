"""Weights and images by rule: every golden was made with them, so no weights are stored.

A tensor is drawn from its name, shape and a seed; `rule_tensor` is the whole rule.
"""

import json
import pathlib
import zlib

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"
SHARED = pathlib.Path(__file__).parents[2] / "shared" / "goldens"

_UNTOUCHED = {"num_batches_tracked", "codebook_used", "shift", "scale", "x_scale", "x_shift"}
_QKV = ("in_proj_weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "wqkv.weight")
_ATTENTION_OUT = ("out_proj.weight", "attn.wo.weight")


def golden_path(name: str) -> pathlib.Path:
    """Path of a golden: `tests/golden` first, then the shared folder; skips when in neither."""
    for path in (GOLDEN / pathlib.Path(name).name, SHARED / name):
        if path.exists():
            return path
    pytest.skip(f"golden {name} is not here")


def shared_path(name: str) -> pathlib.Path:
    """Path of a golden that is not copied into the repository; skips when it is absent."""
    if not (SHARED / name).exists():
        pytest.skip(f"golden {name} is not here")
    return SHARED / name


def load(path) -> tuple[dict, dict]:
    """Arrays of a golden file and its decoded `meta`."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays.pop("meta", "{}")))


def _gain(name: str) -> float:
    if name.startswith("lpips.net."):
        return float(np.sqrt(2))
    if name.endswith(_QKV):
        return 1.5
    return 0.5 if name.endswith(_ATTENTION_OUT) else 1.0


def _matrix(name: str, leaf: str, n: np.ndarray) -> np.ndarray:
    if "." in name and leaf in ("positional_embedding", "latent_token_positional_embedding"):
        return n * np.float32(0.7)
    if leaf in ("pos_embed", "cls_token", "mask_token"):
        return n * np.float32(0.1)
    return n * np.float32(_gain(name) / np.sqrt(np.prod(n.shape[1:])))


def _vector(name: str, leaf: str, n: np.ndarray) -> np.ndarray:
    if leaf == "running_mean":
        return n * np.float32(0.1)
    if leaf == "running_var":
        return 1 + np.float32(0.1) * np.abs(n)
    if leaf in ("weight_u", "weight_v"):
        return (n / np.sqrt(np.square(n.astype(np.float64)).sum())).astype(np.float32)
    if leaf.endswith("bias"):
        return n * np.float32(0.02)
    scale = 1 + np.float32(0.1) * n
    parent = name.split(".")[-2] if "." in name else ""
    return np.float32(1.5) * scale if parent in ("q_norm", "k_norm") else scale


def rule_tensor(name: str, shape, seed: int = 0) -> np.ndarray | None:
    """float32 tensor of that full name and shape, or None where the rule leaves it untouched."""
    leaf = name.split(".")[-1]
    if leaf in _UNTOUCHED or len(shape) == 0:
        return None
    state = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    n = state.standard_normal(tuple(shape)).astype(np.float32)
    return _matrix(name, leaf, n) if n.ndim >= 2 else _vector(name, leaf, n)


def rule_state(shapes, prefix: str = "") -> dict[str, np.ndarray]:
    """State dict of {name: shape} by rule; untouched entries are zeros."""
    state = {}
    for name, shape in shapes:
        tensor = rule_tensor(prefix + name, shape)
        state[name] = np.zeros(shape, np.float32) if tensor is None else tensor
    return state


def block_images() -> np.ndarray:
    """uint8[4 256 256 3]: the images of the portable goldens, coloured 8 x 8 blocks."""
    small = np.random.RandomState(7).randint(0, 256, (4, 32, 32, 3))
    return np.repeat(np.repeat(small, 8, 1), 8, 2).astype(np.uint8)


def pixels(images: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] from uint8, with the arithmetic of the goldens."""
    return (images.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def lpips_heads() -> list[np.ndarray]:
    """The five public LPIPS v0.1 heads f32[c]; skips when no package or file here has them."""
    from gigatok_jax.weights import frozen

    if frozen.available("lpips-vgg16"):
        params = frozen.load_frozen("lpips-vgg16")
        return [np.asarray(params[f"head_{i}"]) for i in range(5)]
    with np.load(shared_path("lpips_lin.npz")) as file:
        return [file[f"lin{i}.model.1.weight"].reshape(-1) for i in range(5)]


def lpips_state() -> dict[str, np.ndarray]:
    """State dict of LPIPS under the original's names: VGG16 by rule, the public heads."""
    heads = lpips_heads()
    state = {f"lin{i}.model.1.weight": h.reshape(1, -1, 1, 1) for i, h in enumerate(heads)}
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    slots = [(1, 0), (1, 2), (2, 5), (2, 7), (3, 10), (3, 12), (3, 14), (4, 17), (4, 19), (4, 21),
             (5, 24), (5, 26), (5, 28)]  # fmt: skip
    for (stage, index), ins, outs in zip(slots, widths[:-1], widths[1:], strict=True):
        for leaf, shape in (("weight", (outs, ins, 3, 3)), ("bias", (outs,))):
            name = f"net.slice{stage}.{index}.{leaf}"
            state[name] = rule_tensor("lpips." + name, shape)
    return state
