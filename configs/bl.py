"""B-L tokenizer: 622M parameters, 256x256 images to 256 tokens.

    python main.py --config=configs/bl.py --config.data.folder=DIR
    python main.py --config=configs/bl.py:smoke       # tiny: CPU, one minute
    python main.py --config=configs/bl.py:smoke_full  # these widths, batch 2, 3 steps

Published (arXiv:2504.08736), 200 epochs: rFID 0.81, LPIPS 0.2059, PSNR 21.21, SSIM 0.685 on
ImageNet val; with a 111M prior gFID 3.26, probing 67.6%. Ours: not run yet.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg, latent_tokens=256)
    config = common.tokenizer("bl", "B-L", latent_tokens=arg.latent_tokens)
    config.train.epochs, config.train.global_batch = 200, 256
    config.train.remat = "dots"  # 128 images fit an H200; with 64, "none" is 1% faster
    return common.finish(config, arg)
