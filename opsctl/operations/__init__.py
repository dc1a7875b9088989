"""The jobs opsctl does: plain functions from stores and words to a Report."""
