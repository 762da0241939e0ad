"""S-S 2D tokenizer: 136M parameters, 256x256 images to a 16x16 grid of tokens.

    python main.py --config=configs/ss_2d.py --config.data.folder=DIR
    python main.py --config=configs/ss_2d.py:smoke       # tiny: CPU, one minute
    python main.py --config=configs/ss_2d.py:smoke_full  # these widths, batch 2, 3 steps

Published (the authors' issue thread), 100 epochs: rFID 1.22, LPIPS 0.2227 on ImageNet val. Ours:
not run yet.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg)
    config = common.tokenizer("ss_2d", "S-S-2D")
    config.train.epochs = 100
    return common.finish(config, arg)
