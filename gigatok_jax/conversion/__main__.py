r"""Converts checkpoints of the PyTorch original to ours and back. No PyTorch is needed.

    python -m gigatok_jax.conversion from_torch IN OUT     # OUT: x.safetensors, or a workdir
    python -m gigatok_jax.conversion to_torch IN OUT       # OUT: x.pt or x.safetensors
    python -m gigatok_jax.conversion compare A B [--tolerance=1e-6]
    python -m gigatok_jax.conversion inspect IN

IN is a file of the original (.pt), a .safetensors, a folder with model.safetensors, or a workdir of
ours, its checkpoints/ or one step in it. The name of OUT decides what is written:

    x.safetensors   the weights of one model; a config.json is written beside it
    x.pt            to_torch: a file for the original's loaders; of a workdir also what its trainer
                    resumes from: both optimizers, the average, the discriminator, the step
    anything else   from_torch: a workdir, in which main.py goes on with --workdir=OUT
"""

import argparse
import sys

from gigatok_jax.run import command_line


def main(arguments: list[str] | None = None) -> int:
    """Runs a command on checkpoints, such as from_torch or compare, and returns its exit status."""
    options = _parser().parse_args(arguments)
    with command_line.one_line_errors(OSError):
        return _run(options)


def _run(options) -> int:
    # Imported after the options are checked: jax takes seconds.
    from gigatok_jax.conversion import compare

    if options.command == "compare":
        same = compare.compare(options.a, options.b, options.tolerance, options.weights)
        return 0 if same else 1
    if options.command == "inspect":
        compare.inspect(options.input)
        return 0
    from gigatok_jax.conversion import convert

    overrides = convert.parse_overrides(options.set)
    if options.command == "to_torch":
        convert.to_torch(options.input, options.out, weights=options.weights, **overrides)
        return 0
    convert.from_torch(
        options.input,
        options.out,
        weights=options.weights,
        overrides=overrides,
        config=options.config,
        tokenizer_path=options.tokenizer,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_line.Parser(
        "python -m gigatok_jax.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="what a checkpoint holds")
    inspect.add_argument("input", metavar="IN")
    both = commands.add_parser("compare", help="differences of two; status 1 above the tolerance")
    both.add_argument("a", metavar="A")
    both.add_argument("b", metavar="B")
    both.add_argument("--tolerance", type=float, default=0.0, help="largest difference that passes")
    ours = commands.add_parser("from_torch", help="to .safetensors, or to a workdir of ours")
    theirs = commands.add_parser("to_torch", help="to .pt or .safetensors")
    for command in (ours, theirs):
        command.add_argument("input", metavar="IN")
        command.add_argument("out", metavar="OUT")
        text = "a field of the model's config that names and shapes do not show: rotation=False"
        command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=text)
    ours.add_argument("--config", default="", help="of the run that continues: configs/bl.py")
    ours.add_argument("--tokenizer", default="", help="checkpoint whose codes a prior learned")
    for command in (both, ours, theirs):
        text = "auto: the average of a tokenizer if it was saved, the trained copy of a prior"
        command.add_argument("--weights", choices=("auto", "ema", "raw"), default="auto", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
