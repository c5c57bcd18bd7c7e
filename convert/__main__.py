from llavamed_jax.cli.convert import main

raise SystemExit(main())
