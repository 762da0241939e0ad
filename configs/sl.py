"""S-L tokenizer: 533M parameters, 256x256 images to 256 tokens.

    python main.py --config=configs/sl.py --config.data.folder=DIR
    python main.py --config=configs/sl.py:smoke       # tiny: CPU, one minute
    python main.py --config=configs/sl.py:smoke_full  # these widths, batch 2, 3 steps

Published (arXiv:2504.08736): no figures for this size; 200 epochs as the B-L run. Ours: not run
yet.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg, latent_tokens=256)
    config = common.tokenizer("sl", "S-L", latent_tokens=arg.latent_tokens)
    config.train.epochs, config.train.global_batch = 200, 256
    return common.finish(config, arg)
