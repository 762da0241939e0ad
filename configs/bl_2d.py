"""B-L 2D tokenizer: 491M parameters, 256x256 images to a 16x16 grid of tokens.

    python main.py --config=configs/bl_2d.py --config.data.folder=DIR
    python main.py --config=configs/bl_2d.py:smoke       # tiny: CPU, one minute
    python main.py --config=configs/bl_2d.py:smoke_full  # these widths, batch 2, 3 steps

Published (the authors' issue thread), 200 epochs: rFID 0.86, LPIPS 0.2046 on ImageNet val. Ours:
not run yet.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg)
    config = common.tokenizer("bl_2d", "B-L-2D")
    config.train.epochs, config.train.global_batch = 200, 256
    config.loss.entropy = 5e-3
    return common.finish(config, arg)
