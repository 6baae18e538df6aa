"""`python -m bnport` is the console script."""

from bnport.cli import entry

entry()
