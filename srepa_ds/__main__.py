"""`python -m srepa_ds` is `srepa-ds`."""

from srepa_ds.cli import main

main()
