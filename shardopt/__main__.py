"""``python -m shardopt``, as the console script does."""

from shardopt.cli import main

raise SystemExit(main())
