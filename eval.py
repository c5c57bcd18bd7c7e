import sys
from llavamed_jax.cli.eval import main
sys.exit(main())
