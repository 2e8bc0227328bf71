from univg_jax.cli.main import main

raise SystemExit(main())
