from llavamed_jax.cli.serve import main

if __name__ == "__main__":
    raise SystemExit(main())
