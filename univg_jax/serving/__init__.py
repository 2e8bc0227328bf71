"""A trained model for others: a page to try it, and an HTTP server."""
