"""Shim: `python cli.py ...` in a checkout is the installed command `saevlm-fast ...`."""

from saevlm_fast.cli import main

if __name__ == "__main__":
    main()
