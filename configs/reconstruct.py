r"""Reconstructs images with a trained tokenizer: pictures, and PSNR, SSIM, LPIPS per image.

    python main.py --config=configs/reconstruct.py --config.checkpoint=runs/demo \
        --config.input=photographs

The model comes from the checkpoint. LPIPS is left out, and that is said, while its weights are
not on this machine.
"""

import ml_collections

from configs import common


def get_config(arg=None):
    common.parse_arg(arg)
    return ml_collections.ConfigDict(
        {
            "name": "reconstruct",
            "task": "reconstruct",
            "checkpoint": "",  # a workdir, its checkpoints/, or one step
            "input": "",  # an image or a folder of images
            "weights_kind": "auto",  # "ema", "raw"; auto takes the EMA copy
            "eval": {"batch": 16},
            "cluster": common.cluster_config(),
            "weights": {"folder": ""},  # frozen networks; "" is ~/.cache/gigatok_jax
        }
    )
