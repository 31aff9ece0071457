"""``python -m manifold_merge`` is the command ``manifold-merge``."""

from manifold_merge.cli import main

if __name__ == "__main__":
    main()
