"""`python -m kvkeep` is `kvkeep`."""

from __future__ import annotations

from kvkeep.cli import main

if __name__ == "__main__":
    main()
