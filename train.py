from llavamed_jax.cli.train import main

if __name__ == "__main__":  # the loader's worker processes import this file again
    raise SystemExit(main())
