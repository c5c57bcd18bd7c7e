from llavamed_jax.cli.convert_door import main

raise SystemExit(main())
