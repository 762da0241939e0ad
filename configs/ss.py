"""S-S tokenizer: 136M parameters, 256x256 images to 256 tokens.

    python main.py --config=configs/ss.py --config.data.folder=DIR
    python main.py --config=configs/ss.py:smoke       # tiny: CPU, one minute
    python main.py --config=configs/ss.py:smoke_full  # these widths, batch 2, 3 steps

Published (arXiv:2504.08736), 100 epochs: rFID 1.01, LPIPS 0.2226, PSNR 20.74, SSIM 0.670 on
ImageNet val; with a 111M prior gFID 4.05, probing 62.6%. Ours: not run yet.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg, latent_tokens=256)
    config = common.tokenizer("ss", "S-S", latent_tokens=arg.latent_tokens)
    config.train.epochs = 100
    return common.finish(config, arg)
