r"""Prior over the codes of a tokenizer: class label to 256 codes. Sizes b, l, xl, xxl and more.

    python main.py --config=configs/ar.py:size=b --config.codes=runs/codes \
        --config.tokenizer=runs/ss
    python main.py --config=configs/ar.py:size=b --config.tokenizer=runs/ss \
        --config.data.folder=DIR                                # codes made on the way
    python main.py --config=configs/ar.py:size=b,smoke          # tiny: CPU, one minute
    python main.py --config=configs/ar.py:size=b,smoke_full     # these widths, batch 2, 3 steps

`codes` is a folder of `configs/extract_codes.py`. The learning rate decays over the last fifth of
the run. To decide later how long a run is, keep it constant, and branch off as often as wanted:

    ... --config.optim.schedule=constant --workdir=runs/ar_b
    ... --config.cooldown_from=runs/ar_b/checkpoints/100000 --config.train.steps=125000 \
        --workdir=runs/ar_b_125

The smoke versions learn codes of a tokenizer with random weights, and say so. Published
(arXiv:2504.08736), 300 epochs: gFID 4.05 (S-S), 3.83 (S-B), 3.26 (B-L) with the 111M prior, 2.13
with 775M on B-L, 2.03 with 1.4B on B-L, 1.98 on XL-XXL. Ours: not run yet.
"""

from configs import common


def get_config(arg=None):
    arg = common.run_arg(arg, size="b")
    config = common.prior(f"ar_{arg.size.lower()}", f"prior-{arg.size.upper()}")
    if arg.size.lower() == "xxl":
        config.train.global_batch = 512
    return common.finish(config, arg)
