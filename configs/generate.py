r"""Generates images of classes with a trained prior and the tokenizer whose codes it learned.

    python main.py --config=configs/generate.py --config.prior=runs/ar_b \
        --config.tokenizer=runs/ss --config.class_ids=panda,volcano,207

A PNG per image, a grid per class, `samples.npz` and a page. The same command again goes on where
it was cut off; a larger `num_images` adds to what is there.
"""

import ml_collections

from configs import common


def get_config(arg=None):
    common.parse_arg(arg)
    return ml_collections.ConfigDict(
        {
            "name": "generate",
            "task": "generate",
            "prior": "",  # a workdir, its checkpoints/, or one step
            "tokenizer": "",  # the same
            "weights_kind": "auto",  # of the prior: "ema", "raw"; auto is the trained copy
            # Numbers, ranges, names or parts of names: "207, 0-9, panda" or "all". Image i is of
            # class i modulo their number. Empty is all, where there are at most 16.
            "class_ids": "",
            "num_images": 0,  # images 0 to num_images - 1; 0 is eight of each class
            "image_ids": "",  # these instead, such as "0-63, 100"; the same id is the same image
            "seed": 0,
            "cfg": common.cfg_config(),
            "temperature": 1.0,  # 0 takes the most likely code
            "top_k": 0,  # 0 keeps all codes
            "top_p": 1.0,  # 1 keeps all codes
            "batch": 64,
            "dtype": "auto",  # bfloat16 on accelerators, float32 on a CPU
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "cpu_devices": 1},
            "cluster": common.cluster_config(),
        }
    )
