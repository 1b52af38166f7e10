"""`python -m ia3`: the command `ia3`."""

from __future__ import annotations

from ia3.cli.main import main

if __name__ == "__main__":
    main()
