"""`python -m saevlm_fast ...` is the installed command `saevlm-fast ...`."""

from saevlm_fast.cli import main

if __name__ == "__main__":
    main()
