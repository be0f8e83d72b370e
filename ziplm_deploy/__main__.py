"""``python -m ziplm_deploy``: the command line, where the script is not on the path."""

from __future__ import annotations

from ziplm_deploy.cli.commands import main

if __name__ == "__main__":
    main()
