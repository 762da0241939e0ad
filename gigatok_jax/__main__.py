"""Command `python -m gigatok_jax`: prints which commands the package has."""

import gigatok_jax

TEXT = f"""\
gigatok_jax {gigatok_jax.__version__}: GigaTok image tokenizers and priors in JAX.

Train, generate, evaluate (from a checkout; --help shows all flags):
    python main.py --config=configs/<run>.py [--workdir=DIR] [--config.any.key=value ...]
Convert checkpoints to and from PyTorch:
    python -m gigatok_jax.conversion --help
Measure on this machine:
    python -m gigatok_jax.benchmarks.{{kernels,training,sampling,plan}} --help
In Python:
    import gigatok_jax
    tokenizer = gigatok_jax.load_tokenizer(path)
    codes = tokenizer.encode(images)\
"""

if __name__ == "__main__":
    print(TEXT)
