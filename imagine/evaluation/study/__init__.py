"""The human study: a page with questions about pictures, the answers, and what follows from them."""
