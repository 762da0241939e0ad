r"""Codes of a data set by a trained tokenizer: what a prior learns from.

    python main.py --config=configs/extract_codes.py --config.checkpoint=runs/ss \
        --config.data.folder=photographs --workdir=runs/codes

The same command again goes on where it was cut off. Held-out images, for the validation loss of a
prior, are extracted with `--config.split=held_out` into a folder of their own.
"""

import ml_collections

from configs import common


def get_config(arg=None):
    common.parse_arg(arg)
    data = common.data_config()
    return ml_collections.ConfigDict(
        {
            "name": "extract_codes",
            "task": "extract_codes",
            "checkpoint": "",  # a tokenizer: a workdir, its checkpoints/, or one step
            "weights_kind": "auto",  # "ema", "raw"; auto takes the EMA copy
            "split": "train",  # "held_out": the images that training leaves out
            # "center", "flip" (and its mirror image), "ten_crop", or "ten_crop_both": ten crops of
            # 1.1 times the size and ten of 1.05 times, as the original mixes them.
            "crops": "ten_crop_both",
            "batch": 128,  # crops that go through the tokenizer at once
            "data": {name: data[name] for name in data if name not in ("crop", "flip")},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "cpu_devices": 1},
            "cluster": common.cluster_config(),
        }
    )
