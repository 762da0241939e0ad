"""XL-XXL tokenizer: 2.9B parameters, 256x256 images to 256 tokens.

    python main.py --config=configs/xlxxl.py --config.data.folder=DIR
    python main.py --config=configs/xlxxl.py:smoke       # tiny: CPU, one minute
    python main.py --config=configs/xlxxl.py --dry_run   # its parameters, in seconds

Published (arXiv:2504.08736), 300 epochs: rFID 0.79, LPIPS 0.1947, PSNR 21.65, SSIM 0.699 on
ImageNet val; with a 111M prior gFID 3.15, probing 72.0%. Ours: not run yet.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg, latent_tokens=256)
    config = common.tokenizer("xlxxl", "XL-XXL", latent_tokens=arg.latent_tokens)
    config.train.epochs, config.train.global_batch = 300, 256
    config.optim.warmup_epochs = 1.0
    config.loss.entropy = 5e-3  # keeps the codebook in use at this size
    config.loss.shortcut_end = 0  # the authors drop the shortcut phase at this size
    config.optim.decay_mask = "no_norm"  # as the trainer they used for this size
    # Compiled apart its blocks gain little, since little is kept of them, and take minutes more.
    config.train.update(remat="blocks", unroll="")
    return common.finish(config, arg)
