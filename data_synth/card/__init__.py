"""The data card and the funnel of a build."""
