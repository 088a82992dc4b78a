"""`python -m saevlm_fast.cli`, and `torchrun -m saevlm_fast.cli`."""

from saevlm_fast.cli import main

main()
