"""Evaluate a pipeline on held-out people: prompt suites, metrics, scores, the judge and the report."""
