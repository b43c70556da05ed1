"""Human review of pairs: the decisions, the agreement between reviewers, and the server of the review page."""
