r"""Loss of a trained prior over held-out images: nats per code and perplexity, each image once.

    python main.py --config=configs/evaluate.py --config.checkpoint=runs/ar_b \
        --config.codes=runs/codes
    python main.py --config=configs/evaluate.py --config.checkpoint=runs/ar_b \
        --config.tokenizer=runs/ss --config.data.eval_folder=photographs

With the `codes` or `data` of a run, its held-out share; `eval_codes` and `data.eval_folder` are
taken whole.
"""

import ml_collections

from configs import common

DATA = ("source", "folder", "eval_folder", "eval_images", "min_size", "max_unreadable")


def get_config(arg=None):
    common.parse_arg(arg)
    data = common.data_config()
    return ml_collections.ConfigDict(
        {
            "name": "evaluate",
            "task": "evaluate",
            "checkpoint": "",  # of a prior: a workdir, its checkpoints/, or one step
            "weights_kind": "auto",  # "ema", "raw"; auto is the trained copy
            "codes": "",  # workdir of extract_codes
            "eval_codes": "",
            "tokenizer": "",  # for images: a workdir, its checkpoints/, or one step
            "data": {name: data[name] for name in DATA},
            "eval": {"batch": 64},
            "dtype": "auto",  # bfloat16 on accelerators, float32 on a CPU
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "cpu_devices": 1},
            "cluster": common.cluster_config(),
        }
    )
