"""B-L tokenizer with the DINO discriminator: 622M parameters, 256x256 images to 256 tokens.

    python main.py --config=configs/bl_dinodisc.py --config.data.folder=DIR
    python main.py --config=configs/bl_dinodisc.py:smoke       # tiny: CPU, one minute
    python main.py --config=configs/bl_dinodisc.py:smoke_full  # these widths, batch 2, 3 steps

Published (arXiv:2504.08736), 200 epochs: rFID 0.51, LPIPS 0.206, PSNR 21.32, SSIM 0.691 on
ImageNet val; with a 111M prior gFID 3.33, probing 67.7%. Ours: not run yet. On an H200 (jax
0.11.2) its step was still being compiled after six minutes: expect a long start, or take bl.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg, latent_tokens=256)
    config = common.tokenizer("bl_dinodisc", "B-L", latent_tokens=arg.latent_tokens)
    config.train.epochs, config.train.global_batch = 200, 256
    config.train.remat = "dots"  # 128 images fit an H200; with 64, "none" is 1% faster
    config.loss.discriminator = "dino"
    config.loss.discriminator_start = 80_000
    return common.finish(config, arg)
