"""S-B 2D tokenizer: 197M parameters, 256x256 images to a 16x16 grid of tokens.

    python main.py --config=configs/sb_2d.py --config.data.folder=DIR
    python main.py --config=configs/sb_2d.py:smoke       # tiny: CPU, one minute
    python main.py --config=configs/sb_2d.py:smoke_full  # these widths, batch 2, 3 steps

Published (the authors' issue thread), 200 epochs: rFID 0.97, LPIPS 0.2118 on ImageNet val. Ours:
not run yet.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg)
    config = common.tokenizer("sb_2d", "S-B-2D")
    config.train.epochs = 200
    return common.finish(config, arg)
