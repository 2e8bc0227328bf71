"""A trained model for others: a page to try it."""
