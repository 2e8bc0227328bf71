"""Tests of the command line, the only ones that may import it."""
