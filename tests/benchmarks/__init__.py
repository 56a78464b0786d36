"""Measurements of the package; ``python -m tests.benchmarks`` runs them all."""
