"""Human review of pairs: decisions, agreement between reviewers, and the page's server."""
