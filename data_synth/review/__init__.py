"""Human review of pairs: the decisions, and the server of the review page."""
