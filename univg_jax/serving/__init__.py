"""A trained model for others: an HTTP server, and a page to try it."""
