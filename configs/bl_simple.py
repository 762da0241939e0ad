"""B-L tokenizer by the recipe its authors now recommend for every size.

    python main.py --config=configs/bl_simple.py --config.data.folder=DIR
    python main.py --config=configs/bl_simple.py:smoke       # tiny: CPU, one minute
    python main.py --config=configs/bl_simple.py:smoke_full  # these widths, batch 2, 3 steps

Published: no figures. It leaves out the rotation trick and the shortcut phase of `bl.py`, adds
the entropy loss and one epoch of warm-up. Ours: not run yet.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg, latent_tokens=256)
    config = common.tokenizer("bl_simple", "B-L", latent_tokens=arg.latent_tokens)
    config.train.epochs, config.train.global_batch = 200, 256
    config.train.remat = "dots"  # 128 images fit an H200; with 64, "none" is 1% faster
    config.model.rotation = False  # straight-through gradients
    config.loss.shortcut_end = 0
    config.loss.entropy = 5e-3
    config.optim.warmup_epochs = 1.0
    return common.finish(config, arg)
