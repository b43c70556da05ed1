"""The data card of a build and its funnel."""
