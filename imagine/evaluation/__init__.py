"""Measure a pipeline on held-out people: suites, scores, metrics, the judge and the report."""
