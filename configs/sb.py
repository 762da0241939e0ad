"""S-B tokenizer: 232M parameters, 256x256 images to 256 tokens.

    python main.py --config=configs/sb.py --config.data.folder=DIR
    python main.py --config=configs/sb.py:smoke       # tiny: CPU, one minute
    python main.py --config=configs/sb.py:smoke_full  # these widths, batch 2, 3 steps

Published (arXiv:2504.08736), 200 epochs: rFID 0.89, LPIPS 0.2121, PSNR 20.93, SSIM 0.677 on
ImageNet val; with a 111M prior gFID 3.83, probing 62.9%. Ours: not run yet.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg, latent_tokens=256)
    config = common.tokenizer("sb", "S-B", latent_tokens=arg.latent_tokens)
    config.train.epochs = 200
    return common.finish(config, arg)
