"""What this machine and installation can do, and whether it does it right: for `saevlm-fast doctor`."""
